//! One completion: which tokens it has, what text they make, when it ends. Nothing here knows of
//! batches; a completion that begins with tokens of another worker is in the state it had there.

use crate::detokenize::{Detokenizer, TokenBytes};
use crate::grammar::{Grammar, Grammars};
use crate::logprobs::{MAX_ALTERNATIVES, scored, unscored};
use crate::sampling::{History, Sampler};
use crate::stop::StopStrings;
use std::ops::ControlFlow;
use std::sync::Arc;
use vicuna_protocol::inference::generate::Format;
use vicuna_protocol::inference::worker_message::Body;
use vicuna_protocol::inference::{
    Delta, Done, Generate, PromptScores, Sampling, TokenLogprob, ToolUse, TranscriptChoice,
};
use vicuna_protocol::tools::{Dialect, Tool, Wanted};

/// OpenAI allows 4; a few more do no harm.
const MAX_STOP_STRINGS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
const MAX_STOP_TOKENS: usize = 64;
/// Entries in one message of a prompt's scores: with all alternatives a few MiB, where a gateway takes 32.
const SCORES_PER_MESSAGE: usize = 1024;

/// What completions of one model have in common.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    pub bytes: Arc<TokenBytes>,
    /// Any of these ends a completion and is not part of it.
    pub end_tokens: Arc<[u32]>,
    pub size: usize,
    /// Prompt and completion together.
    pub max_length: usize,
    /// `None`: this vocabulary cannot be held to a grammar.
    pub grammars: Option<Grammars>,
    /// How calls of tools are written; `None`: the template has no tools.
    pub dialect: Option<Dialect>,
}

#[derive(Debug)]
pub struct Completion {
    request: String,
    choice: u32,
    sampler: Sampler,
    end_tokens: Arc<[u32]>,
    bytes: Arc<TokenBytes>,
    detokenizer: Detokenizer,
    stops: StopStrings,
    grammar: Option<Grammar>,
    prompt_tokens: usize,
    cached_tokens: Option<usize>,
    min_tokens: usize,
    max_tokens: usize,
    tokens: Vec<u32>,
    history: History,
    /// What is shown so far.
    text: String,
    /// Alternatives to tell of each token.
    alternatives: Option<u32>,
    logprobs: Vec<TokenLogprob>,
    prompt_scores: Option<Scores>,
    /// The gateway has heard of a token from here.
    told: bool,
    finished: Option<Finish>,
}

/// Log probabilities of the prompt's tokens, as they become known.
#[derive(Debug)]
struct Scores {
    alternatives: u32,
    tokens: Vec<TokenLogprob>,
}

/// A token that is to follow.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    pub token: u32,
    logprob: Option<TokenLogprob>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Finish {
    EndToken,
    StopString,
    /// Its grammar allows nothing more.
    Complete,
    Length,
}

impl Finish {
    fn reason(self) -> &'static str {
        match self {
            Self::EndToken | Self::StopString | Self::Complete => "stop",
            Self::Length => "length",
        }
    }
}

impl Completion {
    /// Takes over the tokens that the client already has. The error is for the client.
    pub fn new(generate: &Generate, prompt: &[u32], vocabulary: &Vocabulary) -> Result<Self, String> {
        let sampling = generate.sampling.clone().unwrap_or_default();
        check_stops(&sampling)?;
        check_alternatives(generate)?;
        if let Some(id) = prompt.iter().chain(&generate.generated).find(|id| **id as usize >= vocabulary.size) {
            return Err(format!("token {id} is not in the model's vocabulary of {}", vocabulary.size));
        }
        let room = room_for_completion(prompt.len(), vocabulary.max_length)?;
        let wanted = if sampling.max_tokens == 0 { room } else { sampling.max_tokens as usize };
        let sampler = Sampler::new(&sampling, generate.choice)?;
        let mut history = History::default();
        if sampler.looks_at_the_prompt() {
            history.prompt.extend(prompt);
        }
        let grammar = grammar(generate, vocabulary)?;
        if grammar.is_some() && (sampling.ignore_end || sampling.min_tokens > 0) {
            return Err(
                "the form that the answer must have says where it ends; leave out min_tokens and ignore_eos".into()
            );
        }
        let mut completion = Self {
            request: generate.request.clone(),
            choice: generate.choice,
            sampler,
            end_tokens: end_tokens(vocabulary, &sampling),
            bytes: vocabulary.bytes.clone(),
            detokenizer: Detokenizer::new(vocabulary.bytes.clone()),
            stops: StopStrings::new(&sampling.stop),
            grammar,
            prompt_tokens: prompt.len(),
            cached_tokens: None,
            min_tokens: sampling.min_tokens as usize,
            max_tokens: wanted.min(room),
            tokens: Vec::new(),
            history,
            text: String::new(),
            alternatives: generate.logprobs,
            logprobs: Vec::new(),
            prompt_scores: scores(generate, prompt, &vocabulary.bytes),
            told: false,
            finished: None,
        };
        for id in &generate.generated {
            if completion.finished.is_none() {
                completion.take(*id)?;
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

    /// Whether the logits of the prompt's own tokens are wanted.
    pub fn scores_prompt(&self) -> bool {
        self.prompt_scores.is_some()
    }

    /// Tells how much of the prompt did not have to be computed. Only the first word counts: what is
    /// reused after a preemption was computed for it.
    pub fn reused(&mut self, tokens: usize) {
        self.cached_tokens.get_or_insert(tokens.min(self.prompt_tokens));
    }

    /// Tokens of the prompt that did not have to be computed.
    pub fn cached_tokens(&self) -> usize {
        self.cached_tokens.unwrap_or(0)
    }

    /// The prompt will be computed again.
    pub fn restart(&mut self) {
        if let Some(scores) = &mut self.prompt_scores {
            scores.tokens.truncate(1);
        }
    }

    /// The logits `[V]` of what follows the prompt up to `token`, which comes next in it.
    pub fn score_prompt(&mut self, logits: &[f32], token: u32) {
        if let Some(scores) = &mut self.prompt_scores {
            scores.tokens.push(scored(logits, token, scores.alternatives, &self.bytes));
        }
    }

    /// The scores of the whole prompt, once they are wanted and known, in messages of bounded size.
    pub fn take_prompt_scores(&mut self) -> Vec<Body> {
        let scores = self.prompt_scores.take_if(|scores| scores.tokens.len() >= self.prompt_tokens);
        let tokens = scores.map(|scores| scores.tokens).unwrap_or_default();
        let message = |(number, tokens): (usize, &[TokenLogprob])| {
            Body::PromptScores(PromptScores {
                request: self.request.clone(),
                choice: self.choice,
                first: (number * SCORES_PER_MESSAGE) as u32,
                tokens: tokens.to_vec(),
            })
        };
        tokens.chunks(SCORES_PER_MESSAGE).enumerate().map(message).collect()
    }

    /// The next token by these logits `[V]`, which are changed. The error is why there is none.
    pub fn choose(&mut self, logits: &mut [f32]) -> Result<Chosen, String> {
        let plain = self.alternatives.map(|_| logits.to_vec());
        if let Some(grammar) = &mut self.grammar {
            grammar.restrict(logits, &self.end_tokens)?;
        }
        if self.tokens.len() < self.min_tokens {
            for id in &*self.end_tokens {
                if let Some(logit) = logits.get_mut(*id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        let position = self.tokens.len() as u32;
        let token = self
            .sampler
            .choose(logits, &self.history, position)
            .ok_or("the model produced no numbers; are its weights whole?")?;
        let logprob = plain.map(|plain| scored(&plain, token, self.alternatives.unwrap_or(0), &self.bytes));
        Ok(Chosen { token, logprob })
    }

    /// Takes the next token; returns what the gateway is to be told of it.
    pub fn accept(&mut self, chosen: Chosen) -> Result<Option<Delta>, String> {
        let position = self.tokens.len() as u32;
        let Some(text) = self.take(chosen.token)? else {
            return Ok(None);
        };
        let prompt_tokens = if std::mem::replace(&mut self.told, true) { 0 } else { self.prompt_tokens as u32 };
        self.logprobs.extend(chosen.logprob.clone());
        Ok(Some(Delta {
            request: self.request.clone(),
            choice: self.choice,
            position,
            tokens: vec![chosen.token],
            text,
            logprobs: chosen.logprob.into_iter().collect(),
            prompt_tokens,
        }))
    }

    /// If the completion has ended: its last message.
    pub fn done(&mut self) -> Option<Body> {
        let finish = self.finished?;
        let text = if finish == Finish::StopString { String::new() } else { self.held_back() };
        self.text.push_str(&text);
        Some(Body::Done(Done {
            request: self.request.clone(),
            choice: self.choice,
            finish_reason: finish.reason().to_owned(),
            prompt_tokens: self.prompt_tokens as u32,
            completion_tokens: self.tokens.len() as u32,
            text,
            cached_tokens: self.cached_tokens() as u32,
        }))
    }

    /// All of it so far, to be continued anywhere.
    pub fn transcript(self, generate: Generate) -> TranscriptChoice {
        TranscriptChoice {
            generate: Some(generate),
            tokens: self.tokens,
            text: self.text,
            finish_reason: self.finished.map(|finish| finish.reason().to_owned()).unwrap_or_default(),
            logprobs: self.logprobs,
            prompt_tokens: self.prompt_tokens as u32,
        }
    }

    /// Adds a token and returns the text that it makes printable; `None` for an end token.
    fn take(&mut self, id: u32) -> Result<Option<String>, String> {
        if self.end_tokens.contains(&id) {
            self.finished = Some(Finish::EndToken);
            return Ok(None);
        }
        if let Some(grammar) = &mut self.grammar {
            grammar.take(id)?;
        }
        self.tokens.push(id);
        *self.history.counts.entry(id).or_default() += 1;
        let text = self.detokenizer.push(id);
        let shown = match self.tokens.len() < self.min_tokens {
            true => ControlFlow::Continue(text),
            false => self.stops.push(&text),
        };
        let text = match shown {
            ControlFlow::Break(text) => {
                self.finished = Some(Finish::StopString);
                text
            }
            ControlFlow::Continue(text) => {
                self.finished = self.reached_end();
                text
            }
        };
        self.text.push_str(&text);
        Ok(Some(text))
    }

    fn reached_end(&self) -> Option<Finish> {
        if self.grammar.as_ref().is_some_and(Grammar::is_complete) {
            return Some(Finish::Complete);
        }
        (self.tokens.len() >= self.max_tokens).then_some(Finish::Length)
    }

    fn held_back(&mut self) -> String {
        let last = self.detokenizer.finish();
        match self.stops.push(&last) {
            ControlFlow::Break(text) => text,
            ControlFlow::Continue(text) => text + &self.stops.finish(),
        }
    }
}

/// The vocabulary's, unless they are to be ignored, and the request's own.
fn end_tokens(vocabulary: &Vocabulary, sampling: &Sampling) -> Arc<[u32]> {
    match (sampling.ignore_end, sampling.stop_tokens.is_empty()) {
        (true, _) => sampling.stop_tokens.as_slice().into(),
        (false, true) => vocabulary.end_tokens.clone(),
        (false, false) => vocabulary.end_tokens.iter().chain(&sampling.stop_tokens).copied().collect(),
    }
}

fn grammar(generate: &Generate, vocabulary: &Vocabulary) -> Result<Option<Grammar>, String> {
    let calls = calls_grammar(generate, vocabulary.dialect)?;
    match (&calls, &generate.format, &vocabulary.grammars) {
        (None, None, _) => Ok(None),
        (Some(calls), _, Some(grammars)) => grammars.of_calls(calls).map(Some),
        (None, Some(format), Some(grammars)) => grammars.of(format),
        (_, _, None) => Err("this model cannot hold a completion to a format".to_owned()),
    }
}

/// Of answers that are calls, or must not be anything that only looks like one. What is guided by an expression or a
/// grammar of the client's own is that alone.
fn calls_grammar(generate: &Generate, dialect: Option<Dialect>) -> Result<Option<String>, String> {
    let not_json = |error| format!("the JSON schema is not valid JSON: {error}");
    let answer = match &generate.format {
        None | Some(Format::JsonObject(false)) => None,
        Some(Format::JsonObject(true)) => Some(serde_json::json!({ "type": "object" })),
        Some(Format::JsonSchema(schema)) => Some(serde_json::from_str(schema).map_err(not_json)?),
        Some(Format::Regex(_) | Format::Grammar(_)) => return Ok(None),
    };
    let Some(dialect) = dialect.filter(|_| !generate.tools_json.is_empty()) else {
        return Ok(None);
    };
    let tools = serde_json::from_str(&generate.tools_json).map_err(|error| format!("tools is not JSON: {error}"))?;
    let ToolUse { required, function, single } = generate.tool_use.clone().unwrap_or_default();
    let wanted = Wanted { required, function: (!function.is_empty()).then_some(function), single, answer };
    Ok(dialect.grammar(&Tool::list(&tools), &wanted))
}

fn scores(generate: &Generate, prompt: &[u32], bytes: &TokenBytes) -> Option<Scores> {
    let alternatives = generate.prompt_logprobs?;
    Some(Scores { alternatives, tokens: prompt.first().map(|id| unscored(*id, bytes)).into_iter().collect() })
}

fn check_stops(sampling: &Sampling) -> Result<(), String> {
    let stops = &sampling.stop;
    if stops.len() > MAX_STOP_STRINGS || stops.iter().any(|stop| stop.len() > MAX_STOP_BYTES) {
        return Err(format!("stop takes at most {MAX_STOP_STRINGS} strings of {MAX_STOP_BYTES} bytes"));
    }
    if sampling.stop_tokens.len() > MAX_STOP_TOKENS {
        return Err(format!("stop takes at most {MAX_STOP_TOKENS} token ids"));
    }
    Ok(())
}

fn check_alternatives(generate: &Generate) -> Result<(), String> {
    for (name, count) in [("logprobs", generate.logprobs), ("prompt_logprobs", generate.prompt_logprobs)] {
        if let Some(count) = count.filter(|count| *count > MAX_ALTERNATIVES) {
            return Err(format!("{name} asks for {count} alternatives; at most {MAX_ALTERNATIVES} are told"));
        }
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

    fn vocabulary() -> Vocabulary {
        Vocabulary {
            bytes: Arc::new(TokenBytes::of(&vicuna_model::tiny::tokenizer(), &[])),
            end_tokens: [2].into(),
            size: vicuna_model::tiny::config().vocab,
            max_length: 20,
            grammars: Grammars::new(
                &TokenBytes::of(&vicuna_model::tiny::tokenizer(), &[]),
                vicuna_model::tiny::config().vocab,
                2,
            )
            .ok(),
            dialect: None,
        }
    }

    fn ids(text: &str) -> Vec<u32> {
        vicuna_model::tiny::tokenizer().encode(text, false).unwrap().get_ids().to_vec()
    }

    fn completion(sampling: Sampling, generated: Vec<u32>) -> Result<Completion, String> {
        let generate = Generate { request: "r".into(), sampling: Some(sampling), generated, ..Generate::default() };
        Completion::new(&generate, &[5; 10], &vocabulary())
    }

    fn chosen(token: u32) -> Chosen {
        Chosen { token, logprob: None }
    }

    fn accept(completion: &mut Completion, token: u32) -> Option<Body> {
        completion.accept(chosen(token)).unwrap().map(Body::Delta)
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
        assert_eq!(text(&accept(&mut completion, ids("a")[0])), "a");
        assert!(completion.done().is_none());
        assert!(accept(&mut completion, 2).is_none());
        assert_eq!(reason(completion.done()), "stop");
        assert_eq!(completion.tokens().len(), 1);
    }

    #[test]
    fn the_length_is_bounded_by_the_request_and_by_the_model() {
        for (max_tokens, expected) in [(3, 3), (0, 10), (1000, 10)] {
            let mut completion = completion(Sampling { max_tokens, ..Sampling::default() }, vec![]).unwrap();
            let mut count = 0;
            while completion.done().is_none() {
                accept(&mut completion, ids("a")[0]);
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
        let texts: Vec<Option<Body>> = ["a", "x", "y"].iter().map(|part| accept(&mut held, ids(part)[0])).collect();
        assert_eq!(texts.iter().map(text).collect::<Vec<_>>(), ["a", "", ""]);
        assert_eq!(text(&held.done()), "xy");
        let mut stopped = completion(stop, ids("xy")).unwrap();
        assert_eq!(text(&accept(&mut stopped, ids("z")[0])), "");
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
        assert!(Completion::new(&generate, &[5; 20], &vocabulary()).unwrap_err().contains("20 tokens"));
        assert!(Completion::new(&generate, &[], &vocabulary()).unwrap_err().contains("empty"));
    }

    #[test]
    fn a_stop_token_of_the_request_ends_it_too() {
        let stop = Sampling { stop_tokens: vec![ids("b")[0]], ..Sampling::default() };
        let mut completion = completion(stop, vec![]).unwrap();
        assert!(accept(&mut completion, ids("b")[0]).is_none());
        assert_eq!(reason(completion.done()), "stop");
    }

    #[test]
    fn an_ignored_end_token_is_a_token_like_any() {
        let mut ignoring = completion(Sampling { ignore_end: true, ..Sampling::default() }, vec![]).unwrap();
        accept(&mut ignoring, 2);
        assert!(ignoring.done().is_none());
        assert_eq!(ignoring.tokens(), [2]);
        let own = Sampling { ignore_end: true, stop_tokens: vec![7], ..Sampling::default() };
        let mut stopped = completion(own, vec![]).unwrap();
        accept(&mut stopped, 7);
        assert_eq!(reason(stopped.done()), "stop", "what the request names itself still counts");
    }

    #[test]
    fn nothing_ends_it_before_it_has_so_many_tokens() {
        let end_is_likeliest = || {
            let mut logits = vec![0.0; vocabulary().size];
            (logits[2], logits[ids("a")[0] as usize]) = (9.0, 5.0);
            logits
        };
        let sampling = Sampling { min_tokens: 2, stop: vec!["a".into()], ..Sampling::default() };
        for generated in [vec![], ids("a")] {
            let mut completion = completion(sampling.clone(), generated).unwrap();
            while completion.tokens().len() < 2 {
                let chosen = completion.choose(&mut end_is_likeliest()).unwrap();
                assert_eq!(chosen.token, ids("a")[0]);
                completion.accept(chosen).unwrap();
            }
            assert_eq!(completion.choose(&mut end_is_likeliest()).unwrap().token, 2);
        }
        let mut stopped = completion(sampling, [ids("a"), ids("a")].concat()).unwrap();
        assert_eq!(reason(stopped.done()), "stop", "a stop string counts from then on");
    }

    #[test]
    fn what_has_a_form_ends_where_that_says() {
        for sampling in
            [Sampling { min_tokens: 1, ..Sampling::default() }, Sampling { ignore_end: true, ..Sampling::default() }]
        {
            let refused = with(|generate| {
                generate.sampling = Some(sampling);
                generate.format = Some(Format::JsonObject(true));
            });
            assert!(refused.unwrap_err().contains("min_tokens and ignore_eos"));
        }
    }

    fn with(change: impl FnOnce(&mut Generate)) -> Result<Completion, String> {
        let mut generate = Generate { sampling: Some(Sampling::default()), ..Generate::default() };
        change(&mut generate);
        Completion::new(&generate, &[5, 6, 7], &vocabulary())
    }

    #[test]
    fn log_probabilities_are_those_before_the_sampler_changed_anything() {
        let mut biased = with(|generate| {
            generate.logprobs = Some(2);
            generate.sampling = Some(Sampling { logit_bias: [(9, 50.0)].into(), ..Sampling::default() });
        })
        .unwrap();
        let mut logits = vec![0.0; vocabulary().size];
        logits[11] = 10.0;
        let chosen = biased.choose(&mut logits).unwrap();
        assert_eq!(chosen.token, 9);
        let told = chosen.logprob.clone().unwrap();
        assert!(told.logprob < -9.0, "{told:?}");
        assert_eq!((told.top[0].token, told.top.len()), (11, 2));
        assert_eq!(biased.accept(chosen).unwrap().unwrap().logprobs, [told]);
    }

    #[test]
    fn a_prompts_scores_are_told_once_all_are_known() {
        let mut completion = with(|generate| generate.prompt_logprobs = Some(1)).unwrap();
        let logits = vec![0.5; vocabulary().size];
        completion.score_prompt(&logits, 6);
        assert!(completion.take_prompt_scores().is_empty());
        completion.score_prompt(&logits, 7);
        let [Body::PromptScores(scores)] = &completion.take_prompt_scores()[..] else { panic!("no scores") };
        assert_eq!(scores.tokens.iter().map(|entry| entry.token).collect::<Vec<_>>(), [5, 6, 7]);
        assert_eq!((scores.tokens[0].logprob, scores.tokens[0].top.len()), (0.0, 0));
        assert!(scores.tokens[1].logprob < -1.0 && scores.tokens[2].top.len() == 1);
        assert!(completion.take_prompt_scores().is_empty());
    }

    #[test]
    fn scores_of_a_long_prompt_come_in_messages_that_a_gateway_takes() {
        let length = 2 * SCORES_PER_MESSAGE + 1;
        let prompt: Vec<_> = (0..length).map(|index| 3 + (index % 200) as u32).collect();
        let generate = Generate { prompt_logprobs: Some(1), ..Generate::default() };
        let vocabulary = Vocabulary { max_length: length + 1, ..vocabulary() };
        let mut completion = Completion::new(&generate, &prompt, &vocabulary).unwrap();
        let logits = vec![0.5; vocabulary.size];
        prompt[1..].iter().for_each(|token| completion.score_prompt(&logits, *token));
        let parts = completion.take_prompt_scores().into_iter().map(|body| match body {
            Body::PromptScores(scores) => scores,
            other => panic!("{other:?}"),
        });
        let parts: Vec<_> = parts.collect();
        assert_eq!(parts.iter().map(|part| part.first).collect::<Vec<_>>(), [0, 1024, 2048]);
        let tokens: Vec<_> = parts.iter().flat_map(|part| &part.tokens).map(|entry| entry.token).collect();
        assert_eq!(tokens, prompt);
    }

    #[test]
    fn a_grammar_decides_what_may_come_also_after_a_resume() {
        let schema = Some(Format::JsonSchema(r#"{"enum": ["yes"]}"#.to_owned()));
        let generated = ids("\"ye");
        let mut resumed = with(|generate| {
            generate.format = schema;
            generate.generated = generated;
        })
        .unwrap();
        for expected in ["s", "\""] {
            assert!(resumed.done().is_none());
            let chosen = resumed.choose(&mut vec![0.0; vocabulary().size]).unwrap();
            assert_eq!(chosen.token, ids(expected)[0]);
            resumed.accept(chosen).unwrap();
        }
        if resumed.done().is_none() {
            let end = resumed.choose(&mut vec![0.0; vocabulary().size]).unwrap();
            assert_eq!(end.token, 2);
        }
    }

    #[test]
    fn a_call_that_must_be_made_goes_on_where_it_was() {
        let tools = serde_json::json!([{ "type": "function", "function": { "name": "f" } }]).to_string();
        let with_tools = |generated: &[u32]| {
            let tool_use = Some(ToolUse { required: true, single: true, ..ToolUse::default() });
            let generated = generated.to_vec();
            let generate = Generate { tools_json: tools.clone(), tool_use, generated, ..Generate::default() };
            let vocabulary = Vocabulary { dialect: Some(Dialect::Llama), max_length: 100, ..vocabulary() };
            Completion::new(&generate, &[5], &vocabulary).unwrap()
        };
        let generated = ids(r#"{"name": "f", "parameters": {"#);
        let mut resumed = with_tools(&generated);
        let mut logits = vec![0.0; vocabulary().size];
        logits[ids("}")[0] as usize] = 9.0;
        for _ in 0..2 {
            let chosen = resumed.choose(&mut logits.clone()).unwrap();
            resumed.accept(chosen).unwrap();
        }
        assert!(resumed.done().is_some(), "nothing can follow the call");
        assert_eq!(resumed.text, r#"{"name": "f", "parameters": {}}"#);
        let mut elsewhere = with_tools(&[]);
        let chosen = elsewhere.choose(&mut logits).unwrap();
        assert_eq!(chosen.token, ids("{")[0], "an answer begins with a call and with nothing else");
    }

    #[test]
    fn a_transcript_holds_what_was_shown() {
        let mut completion = with(|_| {}).unwrap();
        accept(&mut completion, ids("a")[0]);
        accept(&mut completion, ids("b")[0]);
        let transcript = completion.transcript(Generate { request: "r".into(), ..Generate::default() });
        assert_eq!((transcript.text.as_str(), transcript.tokens.len()), ("ab", 2));
        assert_eq!((transcript.generate.unwrap().request.as_str(), transcript.finish_reason.as_str()), ("r", ""));
    }
}
