//! The JSON that goes back, of both endpoints, whole and in chunks.

use super::error::ApiError;
use crate::choice::{Choice, News, Outcome, Phase};
use crate::routing::hash;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use vicuna_protocol::tools::Call;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Chat,
    Completion,
}

impl Endpoint {
    pub fn new_id(self) -> String {
        let prefix = match self {
            Endpoint::Chat => "chatcmpl",
            Endpoint::Completion => "cmpl",
        };
        format!("{prefix}-{}", uuid::Uuid::now_v7().simple())
    }

    fn whole(self) -> &'static str {
        match self {
            Endpoint::Chat => "chat.completion",
            Endpoint::Completion => "text_completion",
        }
    }

    fn chunk(self) -> &'static str {
        match self {
            Endpoint::Chat => "chat.completion.chunk",
            Endpoint::Completion => "text_completion",
        }
    }
}

/// What all parts of one answer have in common.
#[derive(Clone, Debug)]
pub struct Shape {
    pub endpoint: Endpoint,
    pub id: String,
    /// Unix time in seconds.
    pub created: u64,
    pub model: String,
    /// What it is called instead, where its name is a secret: then nothing else tells which one it is.
    pub alias: Option<&'static str>,
}

/// Tokens of a request: each prompt once, all choices' completions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt: u32,
    pub completion: u32,
    pub cached: u32,
    pub resumes: u32,
}

impl Usage {
    pub fn of(choices: &[Arc<Choice>], answers: &[News]) -> Self {
        let mut usage = Self::default();
        let mut prompts = HashMap::new();
        for (choice, news) in choices.iter().zip(answers) {
            usage.resumes += news.resumes;
            let (prompt_tokens, completion_tokens, cached_tokens) = match news.phase {
                Phase::Ended(Outcome::Done { prompt_tokens, completion_tokens, cached_tokens, .. }) => {
                    (prompt_tokens, completion_tokens, cached_tokens)
                }
                _ => (news.prompt_tokens, news.position as u32, 0),
            };
            usage.completion += completion_tokens;
            let (prompt, cached) = prompts.entry(choice.job.id()).or_insert((0, u32::MAX));
            *prompt = prompt_tokens.max(*prompt);
            *cached = cached_tokens.min(*cached);
        }
        for (prompt, cached) in prompts.values() {
            usage.prompt += prompt;
            usage.cached += cached;
        }
        usage
    }

    pub fn total(self) -> u32 {
        self.prompt + self.completion
    }

    fn json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": self.total(),
            "prompt_tokens_details": { "cached_tokens": self.cached },
        })
    }
}

/// One choice of an answer that is not streamed.
pub struct Whole {
    pub text: String,
    pub calls: Vec<(String, Call)>,
    /// The calls are told as the one `function_call` of OpenAI's old way.
    pub legacy: bool,
    pub logprobs: Option<Value>,
    pub finish_reason: Option<String>,
}

/// What a chunk tells.
#[derive(Default)]
pub struct Part<'a> {
    pub opens: bool,
    pub text: Option<&'a str>,
    pub calls: Vec<Value>,
    /// As in [`Whole`].
    pub legacy: bool,
    pub logprobs: Option<Value>,
    pub finish_reason: Option<&'a str>,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'a str,
    created: u64,
    model: &'a str,
    system_fingerprint: Option<&'a str>,
    choices: [ChunkChoice<'a>; 1],
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Delta<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    logprobs: Option<Value>,
    finish_reason: Option<&'a str>,
}

#[derive(Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    function_call: Option<Value>,
}

impl Shape {
    /// What the client calls the model.
    fn called(&self) -> &str {
        self.alias.unwrap_or(&self.model)
    }

    /// What would tell which model it is, where that is no secret.
    pub fn shown<'a>(&self, telling: Option<&'a str>) -> Option<&'a str> {
        telling.filter(|_| self.alias.is_none())
    }

    /// An error, without the model's name where that is a secret.
    pub fn told(&self, error: ApiError) -> ApiError {
        match self.alias {
            Some(alias) => error.veiled(alias),
            None => error,
        }
    }

    pub fn whole(&self, choices: Vec<Whole>, usage: Usage, fingerprint: Option<&str>) -> Value {
        let choices: Vec<_> = choices.into_iter().enumerate().map(|(index, whole)| self.choice(index, whole)).collect();
        json!({
            "id": self.id, "object": self.endpoint.whole(), "created": self.created, "model": self.called(),
            "system_fingerprint": self.shown(fingerprint), "choices": choices, "usage": usage.json(),
            "vicuna": { "resumes": usage.resumes },
        })
    }

    fn choice(&self, index: usize, whole: Whole) -> Value {
        let (logprobs, reason) = (whole.logprobs, whole.finish_reason);
        if self.endpoint == Endpoint::Completion {
            return json!({ "index": index, "text": whole.text, "logprobs": logprobs, "finish_reason": reason });
        }
        let mut message = json!({ "role": "assistant", "content": whole.text, "refusal": null });
        let mut calls: Vec<_> = whole.calls.iter().map(|(id, call)| call_json(id, call)).collect();
        if !calls.is_empty() {
            match whole.legacy {
                true => message["function_call"] = calls.swap_remove(0)["function"].take(),
                false => message["tool_calls"] = calls.into(),
            }
            if whole.text.is_empty() {
                message["content"] = Value::Null;
            }
        }
        json!({ "index": index, "message": message, "logprobs": logprobs, "finish_reason": reason })
    }

    /// One event's JSON; `index`: the choice's in the whole request.
    pub fn chunk(&self, index: usize, fingerprint: Option<&str>, part: Part<'_>) -> String {
        let (delta, text) = match self.endpoint {
            Endpoint::Chat => {
                let role = part.opens.then_some("assistant");
                let content = part.text.or(part.opens.then_some(""));
                let mut tool_calls = part.calls;
                let old = tool_calls.pop_if(|_| part.legacy);
                let function_call = old.map(|mut call| call["function"].take());
                (Some(Delta { role, content, tool_calls, function_call }), None)
            }
            Endpoint::Completion => (None, Some(part.text.unwrap_or_default())),
        };
        let choice = ChunkChoice { index, delta, text, logprobs: part.logprobs, finish_reason: part.finish_reason };
        let chunk = Chunk {
            id: &self.id,
            object: self.endpoint.chunk(),
            created: self.created,
            model: self.called(),
            system_fingerprint: self.shown(fingerprint),
            choices: [choice],
        };
        // Nothing in it can fail: no map has keys that are not text.
        serde_json::to_string(&chunk).unwrap_or_default()
    }

    pub fn usage(&self, usage: Usage) -> Value {
        json!({
            "id": self.id, "object": self.endpoint.chunk(), "created": self.created, "model": self.called(),
            "choices": [], "usage": usage.json(), "vicuna": { "resumes": usage.resumes },
        })
    }

    /// The same wherever the answer goes on.
    pub fn call_id(&self, choice: usize, number: usize) -> String {
        let hash = hash(&[self.id.as_bytes(), &choice.to_le_bytes(), &number.to_le_bytes()]);
        format!("call_{hash:016x}")
    }
}

pub fn call_json(id: &str, call: &Call) -> Value {
    json!({ "id": id, "type": "function", "function": { "name": call.name, "arguments": call.arguments } })
}
