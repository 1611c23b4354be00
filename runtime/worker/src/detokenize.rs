//! From token ids to text, a little at a time. The text is that of all bytes so far, decoded as
//! UTF-8: a pure function of the tokens, so that it continues elsewhere without loss or repetition.

use std::collections::HashMap;
use std::sync::Arc;
use tokenizers::Tokenizer;

/// The bytes of every token of a vocabulary; control tokens have none, but for marks that are read as text.
#[derive(Debug)]
pub struct TokenBytes {
    bytes: Vec<Box<[u8]>>,
    /// SentencePiece puts a space before the first word, which is not part of the text.
    drop_first_space: bool,
}

impl TokenBytes {
    /// Reads byte-level BPE (GPT-2, SmolLM2, Llama 3) and SentencePiece-like vocabularies (LLaMA 2).
    /// `marks`: control tokens that are text here.
    pub fn of(tokenizer: &Tokenizer, marks: &[&str]) -> Self {
        let byte_level = decoder_is_byte_level(tokenizer);
        let added = tokenizer.get_added_tokens_decoder();
        let alphabet = byte_alphabet();
        let piece = |id: u32| -> Box<[u8]> {
            match (added.get(&id), tokenizer.id_to_token(id)) {
                (Some(token), _) if token.special && !marks.contains(&token.content.as_str()) => Box::default(),
                (Some(token), _) => token.content.as_bytes().into(),
                (None, Some(token)) if byte_level => byte_level_bytes(&alphabet, &token).into(),
                (None, Some(token)) => sentence_piece_bytes(&token).into(),
                (None, None) => Box::default(),
            }
        };
        let size = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id + 1);
        Self { bytes: (0..size).map(piece).collect(), drop_first_space: !byte_level }
    }

    /// Empty for control tokens and unknown ids.
    pub fn get(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], |bytes| bytes)
    }
}

fn decoder_is_byte_level(tokenizer: &Tokenizer) -> bool {
    let described = tokenizer.get_decoder().and_then(|decoder| serde_json::to_string(decoder).ok());
    described.is_some_and(|text| text.contains("\"ByteLevel\""))
}

/// GPT-2's printable stand-ins: printable Latin-1 is itself, other bytes follow from U+0100 on.
fn byte_alphabet() -> HashMap<char, u8> {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let shown = (0..=255u8).filter(printable).map(|byte| (char::from(byte), byte));
    let hidden = (0..=255u8).filter(|byte| !printable(byte));
    let stand_ins = ('\u{100}'..='\u{143}').zip(hidden);
    shown.chain(stand_ins).collect()
}

fn byte_level_bytes(alphabet: &HashMap<char, u8>, token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(|character| alphabet.get(&character).copied()).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

fn sentence_piece_bytes(token: &str) -> Vec<u8> {
    let byte = token.strip_prefix("<0x").and_then(|hex| u8::from_str_radix(hex.strip_suffix('>')?, 16).ok());
    match byte {
        Some(byte) => vec![byte],
        None => token.replace('\u{2581}', " ").into_bytes(),
    }
}

/// The text of one completion as it grows.
#[derive(Debug)]
pub struct Detokenizer {
    tokens: Arc<TokenBytes>,
    /// The beginning of a character that is not complete: at most 3 bytes.
    pending: Vec<u8>,
    started: bool,
}

impl Detokenizer {
    pub fn new(tokens: Arc<TokenBytes>) -> Self {
        Self { tokens, pending: Vec::new(), started: false }
    }

    /// What became printable with this token.
    pub fn push(&mut self, id: u32) -> String {
        let tokens = self.tokens.clone();
        let mut bytes = tokens.get(id);
        if !self.started && !bytes.is_empty() {
            self.started = true;
            if tokens.drop_first_space {
                bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            }
        }
        self.pending.extend_from_slice(bytes);
        self.take_complete()
    }

    /// What is left at the end: replacement characters for what never became whole.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }

    /// Everything but an incomplete last character. Bytes that can never become one are replaced.
    fn take_complete(&mut self) -> String {
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        let kept = loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    break Vec::new();
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    let Some(invalid) = error.error_len() else {
                        break after.to_vec();
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &after[invalid..];
                }
            }
        };
        self.pending = kept;
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(ids: &[u32], tokenizer: &Tokenizer) -> String {
        let mut detokenizer = Detokenizer::new(Arc::new(TokenBytes::of(tokenizer, &[])));
        let mut text: String = ids.iter().map(|id| detokenizer.push(*id)).collect();
        text.push_str(&detokenizer.finish());
        text
    }

    #[test]
    fn text_grows_to_what_the_tokenizer_decodes_whatever_the_tokens() {
        let tokenizer = vicuna_model::tiny::tokenizer();
        let encoded = tokenizer.encode("Grüße an das 🐫 <|im_end|> the end", false).unwrap();
        let sequences = [encoded.get_ids().to_vec(), (0..280).collect(), (0..280).rev().collect()];
        for ids in sequences {
            assert_eq!(all(&ids, &tokenizer), tokenizer.decode(&ids, true).unwrap());
        }
    }

    #[test]
    fn an_incomplete_character_is_held_back() {
        let tokenizer = vicuna_model::tiny::tokenizer();
        let mut detokenizer = Detokenizer::new(Arc::new(TokenBytes::of(&tokenizer, &[])));
        let ids = tokenizer.encode("🐫", false).unwrap();
        let texts: Vec<String> = ids.get_ids().iter().map(|id| detokenizer.push(*id)).collect();
        assert_eq!(texts, ["", "", "", "🐫"]);
    }

    #[test]
    fn sentence_piece_tokens_become_spaces_and_bytes() {
        assert_eq!(sentence_piece_bytes("▁the"), b" the");
        assert_eq!(sentence_piece_bytes("<0xF0>"), [0xf0]);
        assert_eq!(sentence_piece_bytes("<0xzz>"), b"<0xzz>");
    }
}
