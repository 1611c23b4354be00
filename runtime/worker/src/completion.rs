//! One completion: which tokens it has, what text they make, when it ends. Nothing here knows of
//! batches; a completion that begins with tokens of another worker is in the state it had there.

use crate::detokenize::{Detokenizer, TokenBytes};
use crate::sampling::Sampler;
use crate::stop::StopStrings;
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use vicuna_protocol::inference::worker_message::Body;
use vicuna_protocol::inference::{Delta, Done, Generate};

/// OpenAI allows 4; a few more do no harm.
const MAX_STOP_STRINGS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;

/// What completions of one model have in common.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    pub bytes: Arc<TokenBytes>,
    /// Any of these ends a completion and is not part of it.
    pub end_tokens: Arc<[u32]>,
    pub size: usize,
    /// Prompt and completion together.
    pub max_length: usize,
}

#[derive(Debug)]
pub struct Completion {
    request: String,
    choice: u32,
    sampler: Sampler,
    end_tokens: Arc<[u32]>,
    detokenizer: Detokenizer,
    stops: StopStrings,
    prompt_tokens: usize,
    max_tokens: usize,
    tokens: Vec<u32>,
    counts: HashMap<u32, u32>,
    finished: Option<Finish>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Finish {
    EndToken,
    StopString,
    Length,
}

impl Finish {
    fn reason(self) -> &'static str {
        match self {
            Self::EndToken | Self::StopString => "stop",
            Self::Length => "length",
        }
    }
}

impl Completion {
    /// Takes over the tokens that the client already has. The error is for the client.
    pub fn new(generate: &Generate, prompt_tokens: usize, vocabulary: &Vocabulary) -> Result<Self, String> {
        let sampling = generate.sampling.clone().unwrap_or_default();
        check_stops(&sampling.stop)?;
        if let Some(id) = generate.generated.iter().find(|id| **id as usize >= vocabulary.size) {
            return Err(format!("token {id} is not in the model's vocabulary of {}", vocabulary.size));
        }
        let room = room_for_completion(prompt_tokens, vocabulary.max_length)?;
        let wanted = if sampling.max_tokens == 0 { room } else { sampling.max_tokens as usize };
        let mut completion = Self {
            request: generate.request.clone(),
            choice: generate.choice,
            sampler: Sampler::new(&sampling, generate.choice)?,
            end_tokens: vocabulary.end_tokens.clone(),
            detokenizer: Detokenizer::new(vocabulary.bytes.clone()),
            stops: StopStrings::new(&sampling.stop),
            prompt_tokens,
            max_tokens: wanted.min(room),
            tokens: Vec::new(),
            counts: HashMap::new(),
            finished: None,
        };
        for id in &generate.generated {
            if completion.finished.is_none() {
                completion.take(*id);
            }
        }
        Ok(completion)
    }

    pub fn request(&self) -> &str {
        &self.request
    }

    pub fn choice(&self) -> u32 {
        self.choice
    }

    /// Tokens so far, those of other workers too.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The next token by these logits `[V]`; `None` if they are not numbers.
    pub fn choose(&self, logits: &mut [f32]) -> Option<u32> {
        self.sampler.choose(logits, &self.counts, self.tokens.len() as u32)
    }

    /// Takes the next token; returns what the gateway is to be told of it.
    pub fn accept(&mut self, id: u32) -> Option<Body> {
        let position = self.tokens.len() as u32;
        let text = self.take(id)?;
        Some(Body::Delta(Delta {
            request: self.request.clone(),
            choice: self.choice,
            position,
            tokens: vec![id],
            text,
        }))
    }

    /// If the completion has ended: its last message.
    pub fn done(&mut self) -> Option<Body> {
        let finish = self.finished?;
        Some(Body::Done(Done {
            request: self.request.clone(),
            choice: self.choice,
            finish_reason: finish.reason().to_owned(),
            prompt_tokens: self.prompt_tokens as u32,
            completion_tokens: self.tokens.len() as u32,
            text: if finish == Finish::StopString { String::new() } else { self.held_back() },
        }))
    }

    /// Adds a token and returns the text that it makes printable; `None` for an end token.
    fn take(&mut self, id: u32) -> Option<String> {
        if self.end_tokens.contains(&id) {
            self.finished = Some(Finish::EndToken);
            return None;
        }
        self.tokens.push(id);
        *self.counts.entry(id).or_default() += 1;
        let text = self.detokenizer.push(id);
        match self.stops.push(&text) {
            ControlFlow::Break(text) => {
                self.finished = Some(Finish::StopString);
                Some(text)
            }
            ControlFlow::Continue(text) => {
                if self.tokens.len() >= self.max_tokens {
                    self.finished = Some(Finish::Length);
                }
                Some(text)
            }
        }
    }

    fn held_back(&mut self) -> String {
        let last = self.detokenizer.finish();
        match self.stops.push(&last) {
            ControlFlow::Break(text) => text,
            ControlFlow::Continue(text) => text + &self.stops.finish(),
        }
    }
}

fn check_stops(stops: &[String]) -> Result<(), String> {
    if stops.len() > MAX_STOP_STRINGS || stops.iter().any(|stop| stop.len() > MAX_STOP_BYTES) {
        return Err(format!("stop takes at most {MAX_STOP_STRINGS} strings of {MAX_STOP_BYTES} bytes"));
    }
    Ok(())
}

fn room_for_completion(prompt_tokens: usize, max_length: usize) -> Result<usize, String> {
    if prompt_tokens == 0 {
        return Err("the prompt is empty".to_owned());
    }
    match max_length.saturating_sub(prompt_tokens) {
        0 => Err(format!(
            "the prompt has {prompt_tokens} tokens, which leaves no room for an answer: this model takes {max_length} tokens, prompt and answer together"
        )),
        room => Ok(room),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vicuna_protocol::inference::Sampling;

    fn vocabulary() -> Vocabulary {
        Vocabulary {
            bytes: Arc::new(TokenBytes::of(&vicuna_model::tiny::tokenizer())),
            end_tokens: [2].into(),
            size: vicuna_model::tiny::config().vocab,
            max_length: 20,
        }
    }

    fn ids(text: &str) -> Vec<u32> {
        vicuna_model::tiny::tokenizer().encode(text, false).unwrap().get_ids().to_vec()
    }

    fn completion(sampling: Sampling, generated: Vec<u32>) -> Result<Completion, String> {
        let generate = Generate { request: "r".into(), sampling: Some(sampling), generated, ..Generate::default() };
        Completion::new(&generate, 10, &vocabulary())
    }

    fn text(body: &Option<Body>) -> &str {
        match body {
            Some(Body::Delta(delta)) => &delta.text,
            Some(Body::Done(done)) => &done.text,
            _ => "",
        }
    }

    fn reason(body: Option<Body>) -> String {
        match body {
            Some(Body::Done(done)) => done.finish_reason,
            _ => String::new(),
        }
    }

    #[test]
    fn an_end_token_ends_it_and_is_not_part_of_it() {
        let mut completion = completion(Sampling::default(), vec![]).unwrap();
        assert_eq!(text(&completion.accept(ids("a")[0])), "a");
        assert!(completion.done().is_none());
        assert!(completion.accept(2).is_none());
        assert_eq!(reason(completion.done()), "stop");
        assert_eq!(completion.tokens().len(), 1);
    }

    #[test]
    fn the_length_is_bounded_by_the_request_and_by_the_model() {
        for (max_tokens, expected) in [(3, 3), (0, 10), (1000, 10)] {
            let mut completion = completion(Sampling { max_tokens, ..Sampling::default() }, vec![]).unwrap();
            let mut count = 0;
            while completion.done().is_none() {
                completion.accept(ids("a")[0]);
                count += 1;
            }
            assert_eq!(count, expected);
            assert_eq!(reason(completion.done()), "length");
        }
    }

    #[test]
    fn what_was_held_back_comes_at_the_end_but_no_stop_string() {
        let stop = Sampling { stop: vec!["xyz".into()], max_tokens: 3, ..Sampling::default() };
        let mut held = completion(stop.clone(), vec![]).unwrap();
        let texts: Vec<Option<Body>> = ["a", "x", "y"].iter().map(|part| held.accept(ids(part)[0])).collect();
        assert_eq!(texts.iter().map(text).collect::<Vec<_>>(), ["a", "", ""]);
        assert_eq!(text(&held.done()), "xy");
        let mut stopped = completion(stop, ids("xy")).unwrap();
        assert_eq!(text(&stopped.accept(ids("z")[0])), "");
        let done = stopped.done();
        assert_eq!((text(&done), reason(done.clone())), ("", "stop".to_owned()));
    }

    #[test]
    fn a_completion_that_was_complete_is_done_at_once() {
        let mut whole = completion(Sampling { max_tokens: 2, ..Sampling::default() }, ids("ab")).unwrap();
        assert_eq!(reason(whole.done()), "length");
    }

    #[test]
    fn what_cannot_be_done_is_refused_with_the_reason() {
        let refused = |sampling, generated| completion(sampling, generated).unwrap_err();
        assert!(refused(Sampling::default(), vec![99_999]).contains("vocabulary"));
        assert!(refused(Sampling { top_p: 2.0, ..Sampling::default() }, vec![]).contains("top_p"));
        assert!(refused(Sampling { stop: vec!["s".into(); 17], ..Sampling::default() }, vec![]).contains("stop"));
        let generate = Generate::default();
        assert!(Completion::new(&generate, 20, &vocabulary()).unwrap_err().contains("20 tokens"));
        assert!(Completion::new(&generate, 0, &vocabulary()).unwrap_err().contains("empty"));
    }
}
