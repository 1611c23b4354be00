//! Log probabilities in the shapes of the two endpoints.

use serde_json::{Map, Value, json};
use vicuna_protocol::inference::TokenLogprob;

/// What a token is called. Several may have the same text, and one may have none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Names {
    #[default]
    Text,
    /// `token_id:7`, as vLLM's `return_tokens_as_token_ids` has it.
    Ids,
}

impl Names {
    fn in_chat(self, token: &TokenLogprob) -> String {
        match self {
            Self::Text => String::from_utf8_lossy(&token.bytes).into_owned(),
            Self::Ids => by_id(token),
        }
    }

    fn in_completion(self, token: &TokenLogprob) -> String {
        match self {
            Self::Text => text(&token.bytes),
            Self::Ids => by_id(token),
        }
    }
}

fn by_id(token: &TokenLogprob) -> String {
    format!("token_id:{}", token.token)
}

/// Of /v1/chat/completions.
pub fn chat(tokens: &[TokenLogprob], names: Names) -> Value {
    let entry = |token: &TokenLogprob| json!({ "token": names.in_chat(token), "logprob": number(token.logprob), "bytes": token.bytes });
    let content: Vec<_> = tokens
        .iter()
        .map(|token| {
            let mut told = entry(token);
            told["top_logprobs"] = token.top.iter().map(entry).collect();
            told
        })
        .collect();
    json!({ "content": content, "refusal": null })
}

/// Of /v1/completions. The first `prompt` tokens are the prompt's, whose first has no probability;
/// `offset`: letters of the text before them.
pub fn completion(tokens: &[TokenLogprob], prompt: usize, mut offset: usize, names: Names) -> Value {
    let (mut texts, mut logprobs, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (index, token) in tokens.iter().enumerate() {
        let first = index == 0 && prompt > 0;
        texts.push(names.in_completion(token));
        logprobs.push(if first { Value::Null } else { number(token.logprob) });
        tops.push(if first { Value::Null } else { top(token, names) });
        offsets.push(offset);
        offset += letters(&token.bytes);
    }
    json!({ "tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets })
}

/// The likeliest tokens, and the one that was taken.
fn top(token: &TokenLogprob, names: Names) -> Value {
    let all = token.top.iter().chain([token]);
    Value::Object(all.map(|token| (names.in_completion(token), number(token.logprob))).collect::<Map<_, _>>())
}

/// A token that is no text by itself is told by its bytes, as OpenAI does.
fn text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let escaped: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("bytes:{escaped}")
        }
    }
}

/// Letters that begin in these bytes, also where others have their ends.
pub fn letters(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte & 0xc0 != 0x80).count()
}

/// JSON has no infinity; OpenAI says -9999 for what cannot be.
fn number(logprob: f32) -> Value {
    json!(if logprob.is_finite() { f64::from(logprob) } else { -9999.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(bytes: &[u8], logprob: f32, top: Vec<TokenLogprob>) -> TokenLogprob {
        TokenLogprob { token: 1, bytes: bytes.to_vec(), logprob, top }
    }

    #[test]
    fn chat_tells_bytes_and_alternatives() {
        let tokens = [token(b"Hi", -0.5, vec![token(b"Hey", f32::NEG_INFINITY, Vec::new())])];
        let value = chat(&tokens, Names::Text);
        let expected = json!({ "content": [{
            "token": "Hi", "logprob": -0.5, "bytes": [72, 105],
            "top_logprobs": [{ "token": "Hey", "logprob": -9999.0, "bytes": [72, 101, 121] }],
        }], "refusal": null });
        assert_eq!(value, expected);
    }

    #[test]
    fn completions_tell_offsets_in_letters_and_nothing_of_the_first_prompt_token() {
        let tokens = [
            token(b"A", 0.0, Vec::new()),
            token(&[0xc3], -1.0, Vec::new()),
            token(&[0xa9], -1.0, vec![token(b"b", -0.25, Vec::new())]),
            token(b"c", -2.0, Vec::new()),
        ];
        let value = completion(&tokens, 2, 10, Names::Text);
        assert_eq!(value["tokens"], json!(["A", "bytes:\\xc3", "bytes:\\xa9", "c"]));
        assert_eq!(value["text_offset"], json!([10, 11, 12, 12]));
        assert_eq!(value["token_logprobs"], json!([null, -1.0, -1.0, -2.0]));
        assert_eq!(value["top_logprobs"][2], json!({ "b": -0.25, "bytes:\\xa9": -1.0 }));
        assert_eq!(value["top_logprobs"][0], Value::Null);
    }

    #[test]
    fn tokens_can_be_told_by_their_ids() {
        let other = TokenLogprob { token: 9, ..token(b"A", -2.0, Vec::new()) };
        let tokens = [token(b"A", -0.5, vec![other])];
        let value = completion(&tokens, 0, 0, Names::Ids);
        assert_eq!(value["tokens"], json!(["token_id:1"]));
        assert_eq!(value["top_logprobs"][0], json!({ "token_id:1": -0.5, "token_id:9": -2.0 }));
        let value = chat(&tokens, Names::Ids);
        assert_eq!(value["content"][0]["token"], "token_id:1");
        assert_eq!(value["content"][0]["top_logprobs"][0]["token"], "token_id:9");
    }
}
