//! The JSON that goes back, of both endpoints, whole and in chunks.

use crate::choice::{Choice, News, Outcome, Phase};
use serde_json::{Value, json};

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
}

/// Tokens of a request: the prompt once, all choices' completions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt: u32,
    pub completion: u32,
    pub resumes: u32,
}

impl Usage {
    pub fn of(choices: &[News]) -> Self {
        choices.iter().fold(Self::default(), |mut usage, news| {
            if let Phase::Ended(Outcome::Done { prompt_tokens, completion_tokens, .. }) = &news.phase {
                usage.prompt = usage.prompt.max(*prompt_tokens);
                usage.completion += completion_tokens;
            }
            usage.resumes += news.resumes;
            usage
        })
    }

    fn json(self) -> Value {
        let total = self.prompt + self.completion;
        json!({ "prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total })
    }
}

impl Shape {
    pub fn whole(&self, answers: &[News], fingerprint: Option<String>) -> Value {
        let choices: Vec<_> = answers.iter().enumerate().map(|(index, news)| self.choice(index, news)).collect();
        let usage = Usage::of(answers);
        json!({
            "id": self.id, "object": self.endpoint.whole(), "created": self.created, "model": self.model,
            "system_fingerprint": fingerprint, "choices": choices, "usage": usage.json(),
            "vicuna": { "resumes": usage.resumes },
        })
    }

    fn choice(&self, index: usize, news: &News) -> Value {
        let reason = match &news.phase {
            Phase::Ended(Outcome::Done { finish_reason, .. }) => Some(finish_reason),
            _ => None,
        };
        match self.endpoint {
            Endpoint::Chat => json!({
                "index": index, "message": { "role": "assistant", "content": news.text, "refusal": null },
                "logprobs": null, "finish_reason": reason,
            }),
            Endpoint::Completion => json!({
                "index": index, "text": news.text, "logprobs": null, "finish_reason": reason,
            }),
        }
    }

    /// The chunk that opens an answer; completions have none.
    pub fn opening(&self, choice: &Choice) -> Option<Value> {
        (self.endpoint == Endpoint::Chat)
            .then(|| self.chunk(choice, json!({ "role": "assistant", "content": "" }), None))
    }

    pub fn text(&self, choice: &Choice, text: &str) -> Value {
        match self.endpoint {
            Endpoint::Chat => self.chunk(choice, json!({ "content": text }), None),
            Endpoint::Completion => self.chunk(choice, json!(text), None),
        }
    }

    pub fn closing(&self, choice: &Choice, finish_reason: &str) -> Value {
        match self.endpoint {
            Endpoint::Chat => self.chunk(choice, json!({}), Some(finish_reason)),
            Endpoint::Completion => self.chunk(choice, json!(""), Some(finish_reason)),
        }
    }

    fn chunk(&self, choice: &Choice, part: Value, finish_reason: Option<&str>) -> Value {
        let part_name = match self.endpoint {
            Endpoint::Chat => "delta",
            Endpoint::Completion => "text",
        };
        let fingerprint = choice.weights_digest();
        json!({
            "id": self.id, "object": self.endpoint.chunk(), "created": self.created, "model": self.model,
            "system_fingerprint": fingerprint,
            "choices": [{
                "index": choice.index, part_name: part, "logprobs": null, "finish_reason": finish_reason,
            }],
        })
    }

    pub fn usage(&self, usage: Usage) -> Value {
        json!({
            "id": self.id, "object": self.endpoint.chunk(), "created": self.created, "model": self.model,
            "choices": [], "usage": usage.json(), "vicuna": { "resumes": usage.resumes },
        })
    }
}
