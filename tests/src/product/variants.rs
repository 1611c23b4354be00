//! Ways to ask of which the answer is known beforehand: it is the same whatever becomes of the workers.
//!
//! Noise is a pure function of (seed, choice, position, token), and greedy decoding has none: so each stream must equal an
//! undisturbed one token for token.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::chat::{Chunk, Stream};

/// The tiny tokenizer's ids of `<|endoftext|>` and `<|im_end|>`: without them an answer has its full length.
pub const ENDS: [u32; 2] = [0, 2];
const CHAT: &str = "/v1/chat/completions";
const COMPLETION: &str = "/v1/completions";
const LONG: u32 = 300;
/// Of an answer whose end is in its form: as much as the tiny model has room for, since it likes white space.
const LONGEST: u32 = 450;
/// Log probabilities of an undisturbed answer and of one that was computed again elsewhere; kernels may add in another order.
const LOGPROB_TOLERANCE: f64 = 1e-3;
/// Letters of a stop string, and where in the answer it is looked for.
const STOP_LETTERS: usize = 6;

/// A way to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    Greedy,
    /// By the completions' endpoint, with the tokens' ids, so that a teacher can check it.
    Scored,
    Sampled,
    /// Two choices, each with noise of its own, and log probabilities.
    Two,
    /// As sampled, up to a text that is in its middle.
    Stopped,
    /// Held to a JSON schema.
    Held,
}

pub const VARIANTS: [Variant; 6] =
    [Variant::Greedy, Variant::Scored, Variant::Sampled, Variant::Two, Variant::Stopped, Variant::Held];

/// One request: what is sent, and where.
#[derive(Debug, Clone)]
pub struct Asked {
    pub variant: Variant,
    pub words: String,
    path: &'static str,
    body: Value,
}

/// What a client has of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Reply {
    /// By index.
    pub choices: BTreeMap<u64, ReplyChoice>,
    pub completion_tokens: u64,
    pub resumes: u64,
    pub longest_gap: Duration,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct ReplyChoice {
    pub text: String,
    /// Names and log probabilities, where they were asked for.
    pub tokens: Vec<(String, f64)>,
    pub finish_reason: Option<String>,
}

impl Variant {
    /// `sampled`: the text of the undisturbed sampled answer, if there is one yet.
    fn ask(self, model: &str, words: &str, sampled: &str) -> Asked {
        let path = if self == Self::Scored { COMPLETION } else { CHAT };
        let mut body = json!({
            "model": model, "max_tokens": LONG, "temperature": 0, "stream": true,
            "stream_options": { "include_usage": true },
            "logit_bias": ENDS.iter().map(|id| (id.to_string(), json!(-100))).collect::<serde_json::Map<_, _>>(),
        });
        match self {
            Self::Scored => body["prompt"] = json!(words),
            _ => body["messages"] = json!([{ "role": "user", "content": words }]),
        }
        let more = match self {
            Self::Greedy => json!({}),
            Self::Scored => json!({ "logprobs": 1, "return_tokens_as_token_ids": true }),
            Self::Sampled => sampling(json!({})),
            Self::Two => json!({ "temperature": 1.0, "seed": 11, "n": 2, "logprobs": true, "top_logprobs": 2 }),
            Self::Stopped => sampling(json!({ "stop": ["no such text", middle(sampled)] })),
            Self::Held => json!({
                "temperature": 1.0, "seed": 13, "logit_bias": {}, "max_tokens": LONGEST,
                "response_format": { "type": "json_schema", "json_schema": { "name": "answer", "schema": schema() } },
            }),
        };
        if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
            body.extend(more);
        }
        Asked { variant: self, words: words.to_owned(), path, body }
    }
}

/// Noise, penalties and log probabilities, with more options.
fn sampling(mut more: Value) -> Value {
    let options = [("temperature", 0.9), ("top_p", 0.95), ("frequency_penalty", 0.2)];
    options.into_iter().for_each(|(name, value)| more[name] = json!(value));
    (more["seed"], more["logprobs"]) = (json!(7), json!(true));
    more
}

/// An end that a random model comes to, after a while.
fn schema() -> Value {
    json!({
        "type": "object", "additionalProperties": false, "required": ["colour", "count", "words"],
        "properties": {
            "colour": { "enum": ["red", "green", "blue"] },
            "count": { "type": "integer", "minimum": 0, "maximum": 99 },
            "words": { "type": "array", "minItems": 3, "maxItems": 3, "items": { "type": "string", "maxLength": 16 } },
        },
    })
}

/// A few letters from beyond the middle of a text.
fn middle(text: &str) -> String {
    let letters: Vec<char> = text.chars().collect();
    letters.iter().skip(letters.len() * 3 / 5).take(STOP_LETTERS).collect()
}

impl Asked {
    /// Starts the stream, or goes on with it after the event of that id.
    pub fn stream(&self, gateway: SocketAddr, last_id: Option<&str>) -> Result<Stream> {
        Stream::open(gateway, self.path, &self.body, last_id)
    }

    /// Streams to the end.
    pub fn reply(&self, gateway: SocketAddr) -> Result<Reply> {
        let (mut stream, mut reply, mut last) = (self.stream(gateway, None)?, Reply::default(), Instant::now());
        while let Some(chunk) = stream.next_chunk()? {
            if reply.take(chunk, &mut last)? {
                return Ok(reply);
            }
        }
        bail!("the stream of {self:?} ended without [DONE] after {reply:?}")
    }
}

impl Reply {
    /// Takes a chunk in; whether it was the last. `last`: when there was text before.
    pub fn take(&mut self, chunk: Chunk, last: &mut Instant) -> Result<bool> {
        match chunk {
            Chunk::Comment(_) => Ok(false),
            Chunk::Done => Ok(true),
            Chunk::Data(data) => self.take_data(&data, last).map(|()| false),
        }
    }

    fn take_data(&mut self, data: &Value, last: &mut Instant) -> Result<()> {
        if let Some(error) = data["error"]["message"].as_str() {
            bail!("the stream failed: {error}");
        }
        for part in data["choices"].as_array().into_iter().flatten() {
            let choice = self.choices.entry(part["index"].as_u64().context("a choice without index")?).or_default();
            let text = part["delta"]["content"].as_str().or(part["text"].as_str()).unwrap_or_default();
            choice.text += text;
            choice.tokens.extend(scored(&part["logprobs"]));
            if let Some(reason) = part["finish_reason"].as_str() {
                choice.finish_reason = Some(reason.to_owned());
            }
            if !text.is_empty() {
                self.longest_gap = self.longest_gap.max(last.elapsed());
                *last = Instant::now();
            }
        }
        if let Some(tokens) = data["usage"]["completion_tokens"].as_u64() {
            self.completion_tokens = tokens;
            self.resumes = data["vicuna"]["resumes"].as_u64().unwrap_or(0);
        }
        Ok(())
    }

    /// Bytes of text so far.
    pub fn letters(&self) -> usize {
        self.choices.values().map(|choice| choice.text.len()).sum()
    }

    /// What of it is not as in the undisturbed answer.
    pub fn difference(&self, reference: &Self) -> Option<String> {
        let shown = |reply: &Self| format!("{} tokens, {:?}", reply.completion_tokens, reply.choices);
        let same = self.completion_tokens == reference.completion_tokens
            && self.choices.len() == reference.choices.len()
            && self
                .choices
                .iter()
                .all(|(index, choice)| reference.choices.get(index).is_some_and(|other| choice.is_as(other)));
        (!same).then(|| format!("{} is not {}", shown(self), shown(reference)))
    }
}

impl ReplyChoice {
    fn is_as(&self, other: &Self) -> bool {
        let alike = |((name, logprob), (other, expected)): (&(String, f64), &(String, f64))| {
            name == other && (logprob - expected).abs() <= LOGPROB_TOLERANCE
        };
        self.text == other.text
            && self.finish_reason == other.finish_reason
            && self.tokens.len() == other.tokens.len()
            && self.tokens.iter().zip(&other.tokens).all(alike)
    }
}

/// Names and log probabilities, in the shape of either endpoint.
fn scored(logprobs: &Value) -> Vec<(String, f64)> {
    let in_chat = logprobs["content"].as_array().into_iter().flatten();
    let in_chat = in_chat.map(|entry| (&entry["token"], &entry["logprob"]));
    let names = logprobs["tokens"].as_array().into_iter().flatten();
    let in_completion = names.zip(logprobs["token_logprobs"].as_array().into_iter().flatten());
    let pair = |(name, logprob): (&Value, &Value)| Some((name.as_str()?.to_owned(), logprob.as_f64()?));
    in_chat.chain(in_completion).filter_map(pair).collect()
}

/// What undisturbed workers answer, by request.
#[derive(Debug)]
pub struct References(Vec<(Asked, Reply)>);

impl References {
    /// Asks everything once; nothing may be disturbed meanwhile.
    pub fn ask(gateway: SocketAddr, model: &str, words: &[&str]) -> Result<Self> {
        let mut known = Vec::new();
        for words in words {
            let mut sampled = String::new();
            for variant in VARIANTS {
                let asked = variant.ask(model, words, &sampled);
                let reply = asked.reply(gateway).with_context(|| format!("{variant:?}, undisturbed"))?;
                check(variant, &reply, &sampled).with_context(|| format!("{variant:?} of {words:?}: {reply:?}"))?;
                if variant == Variant::Sampled {
                    sampled.clone_from(&reply.choices[&0].text);
                }
                known.push((asked, reply));
            }
        }
        Ok(Self(known))
    }

    /// A request and its answer; they come round.
    pub fn get(&self, number: usize) -> &(Asked, Reply) {
        &self.0[number % self.0.len()]
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// An undisturbed answer is what was asked for.
fn check(variant: Variant, reply: &Reply, sampled: &str) -> Result<()> {
    let first = reply.choices.get(&0).context("no choice")?;
    match variant {
        Variant::Greedy | Variant::Sampled => ensure!(reply.completion_tokens == u64::from(LONG), "too short"),
        Variant::Scored => ensure!(first.tokens.len() == LONG as usize, "not every token is scored"),
        Variant::Two => {
            let second = reply.choices.get(&1).context("no second choice")?;
            ensure!(first.text != second.text, "both choices are one");
            ensure!(reply.choices.values().all(|choice| choice.tokens.len() == LONG as usize), "not all is scored");
        }
        Variant::Stopped => {
            let end = sampled.find(&middle(sampled)).context("the stop string is not in the sampled answer")?;
            ensure!(first.text == sampled[..end] && end > 0, "it is not the sampled answer up to the stop string");
            ensure!(first.finish_reason.as_deref() == Some("stop"), "it was not stopped");
        }
        Variant::Held => {
            let value: Value = serde_json::from_str(&first.text).context("no JSON")?;
            let words = value["words"].as_array().map_or(0, Vec::len);
            ensure!(words == 3 && value["count"].is_u64() && value["colour"].is_string(), "not of the schema");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(chunks: &[Value]) -> Reply {
        let (mut reply, mut last) = (Reply::default(), Instant::now());
        for chunk in chunks {
            assert!(!reply.take(Chunk::Data(chunk.clone()), &mut last).unwrap());
        }
        assert!(reply.take(Chunk::Done, &mut last).unwrap());
        reply
    }

    fn part(index: u64, text: &str, logprob: f64) -> Value {
        let logprobs = json!({ "content": [{ "token": text, "logprob": logprob }] });
        json!({ "choices": [{ "index": index, "delta": { "content": text }, "logprobs": logprobs }] })
    }

    #[test]
    fn choices_are_told_apart_and_any_difference_is_seen() {
        let reference = reply(&[part(0, "a", -1.0), part(1, "b", -2.0), part(0, "c", -3.0)]);
        assert_eq!((reference.choices[&0].text.as_str(), reference.choices[&1].text.as_str()), ("ac", "b"));
        assert_eq!(
            reply(&[part(0, "a", -1.0001), part(0, "c", -3.0), part(1, "b", -2.0)]).difference(&reference),
            None
        );
        for other in [
            reply(&[part(0, "a", -1.0), part(1, "b", -2.0), part(0, "d", -3.0)]),
            reply(&[part(0, "ac", -1.0), part(1, "b", -2.0)]),
            reply(&[part(0, "a", -1.1), part(1, "b", -2.0), part(0, "c", -3.0)]),
            reply(&[part(0, "a", -1.0), part(0, "c", -3.0)]),
        ] {
            assert!(other.difference(&reference).is_some(), "{other:?}");
        }
    }

    #[test]
    fn an_error_in_the_stream_is_the_replys() {
        let chunk = Chunk::Data(json!({ "error": { "message": "lost" } }));
        let error = Reply::default().take(chunk, &mut Instant::now()).unwrap_err();
        assert!(error.to_string().contains("lost"));
    }
}
