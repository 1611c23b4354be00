//! What a client asks: OpenAI's request bodies, checked.
//!
//! Fields that only describe (`metadata`, `store` …) are ignored; options that would change the answer
//! and that we do not have are refused, because leaving them out silently would be a wrong answer.

pub mod embeddings;
mod format;
mod messages;
mod sampling;
#[cfg(test)]
mod tests;
pub mod tools;
mod unsupported;

use super::error::ApiError;
use super::fields::{Fields, tokens, wrong};
use super::logprobs::Names;
use crate::config::Limits;
use serde_json::Value;
use tools::Tools;
use vicuna_protocol::inference::generate::Format;
use vicuna_protocol::inference::{Message, ModelOffer, Sampling};

/// Alternatives of each token that a client may ask for.
const MAX_TOP_LOGPROBS: u32 = 20;

/// A request, whichever of the two endpoints it came by.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    pub model: String,
    /// At least one; several only by /v1/completions.
    pub prompts: Vec<Prompt>,
    pub sampling: Sampling,
    /// Choices wanted of each prompt.
    pub n: u32,
    /// Generated of each prompt, of which the `n` likeliest are the answer (`best_of`).
    pub candidates: u32,
    pub stream: bool,
    /// A last chunk with the usage.
    pub include_usage: bool,
    /// Log probabilities of tokens, and of so many alternatives.
    pub logprobs: Option<u32>,
    /// What tokens are called beside their log probabilities.
    pub token_names: Names,
    /// The prompt is part of the answer.
    pub echo: bool,
    /// Nothing but the prompt is wanted (`max_tokens` 0).
    pub only_prompt: bool,
    pub format: Option<Format>,
    pub tools: Option<Tools>,
    /// The messages speak of tools, so that the template must know them.
    pub speaks_of_tools: bool,
    /// Requests with the same one belong together.
    pub session: Option<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// /v1/chat/completions
    Chat(Vec<Message>),
    /// /v1/completions: the text as it is
    Text(String),
    /// /v1/completions: token ids
    Tokens(Vec<u32>),
}

/// Of text, about.
const BYTES_A_TOKEN: usize = 4;

impl Prompt {
    fn tokens(&self) -> usize {
        match self {
            Self::Chat(messages) => messages.iter().map(|message| message.content.len()).sum::<usize>() / BYTES_A_TOKEN,
            Self::Text(text) => text.len() / BYTES_A_TOKEN,
            Self::Tokens(tokens) => tokens.len(),
        }
    }
}

impl Ask {
    pub fn chat(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let fields = Fields::parse(body)?;
        let messages = messages::messages(fields.required("messages")?)?;
        let limit = ["max_completion_tokens", "max_tokens"];
        let limit = limit.into_iter().find(|name| fields.get(name).is_some()).unwrap_or("max_tokens");
        let tools = tools::tools(&fields)?;
        Ok(Self {
            logprobs: chat_logprobs(&fields)?,
            format: format::format(&fields, tools.as_ref())?,
            speaks_of_tools: messages.iter().any(messages::speaks_of_tools),
            tools,
            ..Self::new(&fields, vec![Prompt::Chat(messages)], sampling::sampling(&fields, limit, 0, 1)?, limits)?
        })
    }

    pub fn completion(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let fields = Fields::parse(body)?;
        let prompts = prompts(fields.required("prompt")?, limits.max_prompts)?;
        // OpenAI's default for this endpoint.
        let default_tokens = 16;
        let echo = fields.boolean("echo")?;
        let mut sampling = sampling::sampling(&fields, "max_tokens", default_tokens, u32::from(!echo))?;
        let only_prompt = sampling.max_tokens == 0;
        if only_prompt {
            // A worker generates at least one, which is left out.
            sampling.max_tokens = 1;
        }
        Ok(Self {
            logprobs: completion_logprobs(&fields)?,
            format: format::format(&fields, None)?,
            echo,
            only_prompt,
            ..Self::new(&fields, prompts, sampling, limits)?
        })
    }

    fn new(fields: &Fields, prompts: Vec<Prompt>, sampling: Sampling, limits: &Limits) -> Result<Self, ApiError> {
        unsupported::refuse(fields)?;
        let (n, stream) = (fields.integer("n", 1, 1..=limits.max_choices)?, fields.boolean("stream")?);
        Ok(Self {
            model: fields.string("model")?.to_owned(),
            prompts,
            sampling,
            n,
            candidates: candidates(fields, n, stream, limits)?,
            stream,
            include_usage: match fields.object("stream_options")? {
                Some(options) => options.boolean("include_usage")?,
                None => false,
            },
            logprobs: None,
            token_names: match fields.boolean("return_tokens_as_token_ids")? {
                true => Names::Ids,
                false => Names::Text,
            },
            echo: false,
            only_prompt: false,
            format: None,
            tools: None,
            speaks_of_tools: false,
            session: session(fields)?,
        })
    }

    /// What it may use of its key's quota, about: what it allows its answers, and its prompts.
    pub fn tokens(&self) -> u32 {
        let answers = self.prompts.len() as u64 * u64::from(self.candidates) * u64::from(self.sampling.max_tokens);
        let prompts: usize = self.prompts.iter().map(Prompt::tokens).sum();
        u32::try_from(answers.saturating_add(prompts as u64)).unwrap_or(u32::MAX)
    }

    /// Calls are told in OpenAI's old way.
    pub fn is_legacy(&self) -> bool {
        self.tools.as_ref().is_some_and(|tools| tools.legacy)
    }

    /// The field that says where an answer may end, which older workers do not heed.
    pub fn ends_by(&self) -> Option<&'static str> {
        match (self.sampling.min_tokens > 0, self.sampling.ignore_end) {
            (true, _) => Some("min_tokens"),
            (false, true) => Some("ignore_eos"),
            (false, false) => None,
        }
    }

    /// Whether a model can do what is asked. Of one that has never had a worker nobody knows: what is
    /// asked waits for one, which it wakes, and which refuses what it cannot do.
    pub fn check(&self, offer: Option<&ModelOffer>) -> Result<(), ApiError> {
        let Some(offer) = offer else {
            return Ok(());
        };
        let cannot = |field: &str, what: &str| {
            let message = format!("The model {} {what}; leave `{field}` out or choose another.", self.model);
            Err(ApiError::unsupported(field, &message))
        };
        if self.tools.is_some() && offer.tool_dialect.is_empty() {
            return cannot("tools", "has no template for tools");
        }
        if self.speaks_of_tools && offer.tool_dialect.is_empty() {
            return cannot("messages", "has no template for tools");
        }
        let guided = match &self.format {
            Some(Format::Regex(_)) => Some("guided_regex"),
            Some(Format::Grammar(_)) => Some("guided_grammar"),
            _ => None,
        };
        if let Some(field) = guided.filter(|_| !offer.grammars) {
            return cannot(field, "cannot be held to expressions or grammars");
        }
        let held = self.tools.as_ref().and_then(Tools::held_by).or(self.format.as_ref().map(|_| "response_format"));
        if let Some(field) = held.filter(|_| !offer.json_schema) {
            return cannot(field, "cannot be held to a schema");
        }
        if let Some(field) = self.ends_by().filter(|_| !offer.min_tokens) {
            return cannot(field, "has workers only that end an answer by themselves");
        }
        let longest = self.prompts.iter().filter_map(|prompt| match prompt {
            Prompt::Tokens(tokens) => Some(tokens.len()),
            _ => None,
        });
        match longest.max() {
            Some(length) if length >= offer.max_length as usize => Err(ApiError::too_long(format!(
                "The prompt has {length} tokens, which leaves no room for an answer: this model takes {} tokens, \
                 prompt and answer together.",
                offer.max_length
            ))
            .about("prompt")),
            _ => Ok(()),
        }
    }
}

/// Of what is streamed nobody knows yet which one will be the best.
fn candidates(fields: &Fields, n: u32, stream: bool, limits: &Limits) -> Result<u32, ApiError> {
    match fields.integer("best_of", n, 1..=limits.max_choices)? {
        count if count < n => Err(fields.wrong("best_of", "at least what n is")),
        count if stream && count > n => {
            Err(fields.wrong("best_of", "what n is, or left out, where the answer is streamed"))
        }
        count => Ok(count),
    }
}

fn chat_logprobs(fields: &Fields) -> Result<Option<u32>, ApiError> {
    let wanted = fields.boolean("logprobs")?;
    let top = fields.integer("top_logprobs", 0, 0..=MAX_TOP_LOGPROBS)?;
    match (wanted, top) {
        (true, top) => Ok(Some(top)),
        (false, 0) => Ok(None),
        (false, _) => Err(wrong("top_logprobs", "left out unless `logprobs` is true")),
    }
}

fn completion_logprobs(fields: &Fields) -> Result<Option<u32>, ApiError> {
    // Some clients send the other endpoint's false.
    match fields.get("logprobs") {
        None | Some(Value::Bool(false)) => Ok(None),
        Some(_) => fields.integer("logprobs", 0, 0..=MAX_TOP_LOGPROBS).map(Some),
    }
}

/// A text, token ids, or a list of either.
fn prompts(value: &Value, max_prompts: usize) -> Result<Vec<Prompt>, ApiError> {
    let expected = format!("a text, a list of token ids, or a list of up to {max_prompts} of either, none empty");
    let one = |value: &Value| match value {
        Value::String(text) if !text.is_empty() => Some(Prompt::Text(text.clone())),
        Value::Array(ids) if !ids.is_empty() => tokens(ids).map(Prompt::Tokens),
        _ => None,
    };
    let prompts = match (one(value), value) {
        (Some(prompt), _) => Some(vec![prompt]),
        (None, Value::Array(values)) if !values.is_empty() && values.len() <= max_prompts => {
            values.iter().map(one).collect()
        }
        _ => None,
    };
    prompts.ok_or_else(|| wrong("prompt", &expected))
}

fn session(fields: &Fields) -> Result<Option<String>, ApiError> {
    let names = ["prompt_cache_key", "safety_identifier", "user"];
    let Some(name) = names.into_iter().find(|name| fields.get(name).is_some()) else {
        return Ok(None);
    };
    fields.string(name).map(|session| Some(session.to_owned()))
}
