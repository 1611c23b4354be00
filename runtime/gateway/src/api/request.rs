//! What a client asks: OpenAI's request bodies, checked.
//!
//! Fields that only describe (`user`, `metadata` …) are ignored; options that would change the answer
//! and that we do not have are refused, because leaving them out silently would be a wrong answer.

use super::error::ApiError;
use super::fields::{Fields, wrong};
use crate::config::Limits;
use serde_json::Value;
use vicuna_protocol::inference::{Message, Sampling};

/// A request, whichever of the two endpoints it came by.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    pub model: String,
    pub prompt: Prompt,
    pub sampling: Sampling,
    /// Choices wanted.
    pub n: u32,
    pub stream: bool,
    /// A last chunk with the usage.
    pub include_usage: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// /v1/chat/completions
    Chat(Vec<Message>),
    /// /v1/completions: the text as it is
    Text(String),
}

const MAX_STOPS: usize = 16;

impl Ask {
    pub fn chat(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let fields = Fields::parse(body)?;
        let prompt = Prompt::Chat(messages(fields.required("messages")?)?);
        let limit = ["max_completion_tokens", "max_tokens"];
        let limit = limit.into_iter().find(|name| fields.get(name).is_some());
        Self::new(&fields, prompt, limit.unwrap_or("max_tokens"), 0, limits)
    }

    pub fn completion(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let fields = Fields::parse(body)?;
        let prompt = match fields.required("prompt")? {
            Value::String(text) => text,
            Value::Array(texts) => match texts.as_slice() {
                [Value::String(text)] => text,
                _ => return Err(wrong("prompt", "one text; send one request for each prompt")),
            },
            _ => return Err(wrong("prompt", "a string")),
        };
        if prompt.is_empty() {
            return Err(wrong("prompt", "a text that is not empty"));
        }
        // OpenAI's default for this endpoint.
        let default_tokens = 16;
        let prompt = Prompt::Text(prompt.clone());
        Self::new(&fields, prompt, "max_tokens", default_tokens, limits)
    }

    fn new(
        fields: &Fields,
        prompt: Prompt,
        limit: &str,
        default_tokens: u32,
        limits: &Limits,
    ) -> Result<Self, ApiError> {
        refuse_unsupported(fields)?;
        Ok(Self {
            model: fields.string("model")?.to_owned(),
            prompt,
            sampling: sampling(fields, limit, default_tokens)?,
            n: fields.integer("n", 1, 1..=limits.max_choices)?,
            stream: fields.boolean("stream")?,
            include_usage: include_usage(fields)?,
        })
    }
}

fn sampling(fields: &Fields, limit: &str, default_tokens: u32) -> Result<Sampling, ApiError> {
    Ok(Sampling {
        max_tokens: fields.integer(limit, default_tokens, 1..=1 << 24)?,
        temperature: fields.number("temperature", 1.0, 0.0..=2.0)?,
        top_p: fields.number("top_p", 1.0, f32::MIN_POSITIVE..=1.0)?,
        top_k: fields.integer("top_k", 0, 0..=1 << 24)?,
        seed: seed(fields)?,
        stop: stop(fields)?,
        frequency_penalty: fields.number("frequency_penalty", 0.0, -2.0..=2.0)?,
        presence_penalty: fields.number("presence_penalty", 0.0, -2.0..=2.0)?,
    })
}

/// The seed is fixed here, once, so that another worker continues with the same noise.
fn seed(fields: &Fields) -> Result<u64, ApiError> {
    match fields.get("seed") {
        None => Ok(rand::random()),
        Some(value) => value
            .as_u64()
            .or_else(|| value.as_i64().map(|seed| seed as u64))
            .ok_or_else(|| wrong("seed", "an integer of 64 bits")),
    }
}

fn stop(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let expected = "a string or up to 16 strings, none of them empty";
    let stops = match fields.get("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(stops)) => stops.as_slice(),
        Some(one) => std::slice::from_ref(one),
    };
    let texts = stops.iter().map(|stop| stop.as_str().filter(|text| !text.is_empty()));
    match texts.map(|text| text.map(str::to_owned)).collect::<Option<Vec<_>>>() {
        Some(texts) if texts.len() <= MAX_STOPS => Ok(texts),
        _ => Err(wrong("stop", expected)),
    }
}

fn include_usage(fields: &Fields) -> Result<bool, ApiError> {
    let name = "stream_options.include_usage";
    match fields.get("stream_options") {
        None => Ok(false),
        Some(Value::Object(options)) => match options.get("include_usage") {
            None | Some(Value::Null) => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| wrong(name, "true or false")),
        },
        Some(_) => Err(wrong("stream_options", "an object")),
    }
}

fn messages(value: &Value) -> Result<Vec<Message>, ApiError> {
    match value {
        Value::Array(messages) if !messages.is_empty() => messages.iter().enumerate().map(message).collect(),
        _ => Err(wrong("messages", "a list with at least one message")),
    }
}

fn message((index, value): (usize, &Value)) -> Result<Message, ApiError> {
    let path = |field: &str| format!("messages[{index}].{field}");
    let role = match value.get("role").and_then(Value::as_str) {
        Some("system" | "developer") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        _ => return Err(wrong(&path("role"), "system, developer, user or assistant")),
    };
    let content = value.get("content").and_then(text_of);
    let content = content.ok_or_else(|| wrong(&path("content"), "text: a string, or a list of parts of type text"))?;
    Ok(Message { role: role.to_owned(), content })
}

fn text_of(content: &Value) -> Option<String> {
    match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => parts
            .iter()
            .map(|part| match part.get("type").and_then(Value::as_str) {
                Some("text") => part.get("text").and_then(Value::as_str),
                _ => None,
            })
            .collect(),
        _ => None,
    }
}

/// An option, and whether this value of it changes the answer.
type Unsupported = (&'static str, fn(&Value) -> bool);

const UNSUPPORTED: &[Unsupported] = &[
    ("tools", not_empty),
    ("tool_choice", |value| value != "none"),
    ("functions", not_empty),
    ("function_call", |value| value != "none"),
    ("logprobs", |value| *value != Value::Bool(false)),
    ("top_logprobs", |value| value.as_u64() != Some(0)),
    ("logit_bias", not_empty),
    ("response_format", |value| value.get("type").is_none_or(|kind| kind != "text")),
    ("modalities", |value| *value != serde_json::json!(["text"])),
    ("audio", |_| true),
    ("web_search_options", |_| true),
    ("echo", |value| *value != Value::Bool(false)),
    ("suffix", |value| value != ""),
    ("best_of", |value| value.as_u64() != Some(1)),
    ("repetition_penalty", |value| value.as_f64() != Some(1.0)),
    ("min_p", |value| value.as_f64() != Some(0.0)),
    ("min_tokens", |value| value.as_u64() != Some(0)),
    ("ignore_eos", |value| *value != Value::Bool(false)),
    ("guided_json", |_| true),
    ("guided_regex", |_| true),
    ("guided_choice", |_| true),
    ("guided_grammar", |_| true),
];

fn not_empty(value: &Value) -> bool {
    match value {
        Value::Array(items) => !items.is_empty(),
        Value::Object(items) => !items.is_empty(),
        _ => true,
    }
}

fn refuse_unsupported(fields: &Fields) -> Result<(), ApiError> {
    for (name, changes_the_answer) in UNSUPPORTED {
        if fields.get(name).is_some_and(changes_the_answer) {
            let message = format!("`{name}` is not supported here; leave it out.");
            return Err(ApiError::unsupported(name, &message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use serde_json::json;

    fn limits() -> Limits {
        let arguments = ["gateway", "--tls-cert", "c", "--tls-key", "k"];
        crate::config::Config::parse_from(arguments).limits
    }

    fn chat(extra: Value) -> Result<Ask, ApiError> {
        let mut body = json!({ "model": "a/b", "messages": [{ "role": "user", "content": "Hi" }] });
        for (name, value) in extra.as_object().unwrap() {
            body[name] = value.clone();
        }
        Ask::chat(body.to_string().as_bytes(), &limits())
    }

    #[test]
    fn everything_that_is_supported_arrives() {
        let ask = chat(json!({
            "temperature": 0, "top_p": 0.5, "top_k": 4, "seed": -1, "stop": "x", "n": 2, "stream": true,
            "max_completion_tokens": 9, "stream_options": { "include_usage": true }, "user": "u",
            "frequency_penalty": -1, "presence_penalty": 1.5, "tools": [], "response_format": { "type": "text" },
        }))
        .unwrap();
        let expected = Sampling {
            max_tokens: 9,
            temperature: 0.0,
            top_p: 0.5,
            top_k: 4,
            seed: u64::MAX,
            stop: vec!["x".into()],
            frequency_penalty: -1.0,
            presence_penalty: 1.5,
        };
        assert_eq!(ask.sampling, expected);
        assert!(ask.stream && ask.include_usage && ask.n == 2);
    }

    #[test]
    fn errors_name_the_field() {
        let cases = [
            (json!({ "temperature": 3 }), "temperature"),
            (json!({ "top_p": 0 }), "top_p"),
            (json!({ "n": 0 }), "n"),
            (json!({ "n": 100 }), "n"),
            (json!({ "max_tokens": "many" }), "max_tokens"),
            (json!({ "stop": [""] }), "stop"),
            (json!({ "model": null }), "model"),
            (json!({ "messages": [] }), "messages"),
            (json!({ "messages": [{ "role": "tool", "content": "x" }] }), "messages[0].role"),
            (json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }), "messages[0].content"),
            (json!({ "stream_options": { "include_usage": 1 } }), "stream_options.include_usage"),
            (json!({ "tools": [{}] }), "tools"),
            (json!({ "logprobs": true }), "logprobs"),
            (json!({ "response_format": { "type": "json_object" } }), "response_format"),
        ];
        for (extra, param) in cases {
            let error = chat(extra.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{extra}");
            assert_eq!(error.status, 400);
        }
        assert_eq!(Ask::chat(b"{", &limits()).unwrap_err().status, 400);
    }

    #[test]
    fn without_a_seed_each_request_has_its_own() {
        let seed = || chat(json!({})).unwrap().sampling.seed;
        assert_ne!(seed(), seed());
    }

    #[test]
    fn completions_take_one_text() {
        let completion = |prompt: Value| {
            let body = json!({ "model": "a/b", "prompt": prompt });
            Ask::completion(body.to_string().as_bytes(), &limits())
        };
        assert_eq!(completion(json!(["x"])).unwrap().prompt, Prompt::Text("x".into()));
        assert_eq!(completion(json!("x")).unwrap().sampling.max_tokens, 16);
        assert!(completion(json!(["x", "y"])).is_err());
        assert!(completion(json!([1, 2])).is_err());
    }
}
