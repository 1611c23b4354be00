//! One answer on its way: everything that is needed to continue it on another worker.
//!
//! The transcript is kept here and nowhere else. A worker's messages are appended by the task that
//! reads that worker; the client's task reads at its own pace, so that a slow client holds up nobody;
//! the driver (`drive.rs`) waits for the phase to change. Its size is bounded by the model's length.

use crate::api::error::ApiError;
use crate::routing::Route;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;
use vicuna_protocol::inference::{Delta, Done, Generate, ModelOffer, TokenLogprob};
use vicuna_protocol::tools::Dialect;

/// Log probabilities of a prompt's tokens and their alternatives that are kept of a choice.
const MAX_PROMPT_SCORES: usize = 1 << 18;
/// How often a client that waits for the whole answer looks at what there is, so that its memory is counted.
const TOKENS_A_LOOK: usize = 64;

/// What is asked, shared by the choices of a prompt.
#[derive(Clone, Debug, Default)]
pub struct Job {
    /// As it goes to a worker, but for the choice and what is there of it.
    pub generate: Generate,
    /// Whose request it is, for fairness: the name of its API key.
    pub key: String,
    pub route: Route,
    /// How long it may wait for its first worker.
    pub patience: Duration,
}

impl Job {
    /// `chatcmpl-…` or `cmpl-…`
    pub fn id(&self) -> &str {
        &self.generate.request
    }

    pub fn model(&self) -> &str {
        &self.generate.model
    }

    /// It says where an answer may end: only some workers heed that.
    pub fn says_ends(&self) -> bool {
        self.generate.sampling.as_ref().is_some_and(|sampling| sampling.ignore_end || sampling.min_tokens > 0)
    }
}

/// What has to be equal where an answer continues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variant {
    pub weights_digest: Arc<str>,
    pub template: Arc<str>,
    pub quantization: Arc<str>,
    /// How calls of tools are written; a function of the template.
    pub dialect: Option<Dialect>,
}

impl From<&ModelOffer> for Variant {
    fn from(offer: &ModelOffer) -> Self {
        Self {
            weights_digest: offer.weights_digest.as_str().into(),
            template: offer.template.as_str().into(),
            quantization: offer.quantization.as_str().into(),
            dialect: Dialect::named(&offer.tool_dialect),
        }
    }
}

/// A worker as a choice sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    pub id: u64,
    pub name: Arc<str>,
    pub variant: Variant,
    /// Prompt and completion together, in tokens.
    pub max_length: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// Waits for a worker.
    Queued,
    Running,
    /// The worker is gone or failed; the driver looks for another.
    Lost,
    Ended(Outcome),
}

#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Done { finish_reason: String, prompt_tokens: u32, completion_tokens: u32, cached_tokens: u32 },
    Failed(ApiError),
}

/// Why a worker does not finish an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// It went away.
    Gone,
    /// It failed, or sent nothing for too long: better another one next time.
    Failed,
    /// It has no room: another one, or the same a moment later.
    Overloaded,
}

/// A message that does not fit to what is there: the worker cannot be trusted any more.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Broken {
    #[error("tokens {expected} to {position} of {request} are missing")]
    Gap { request: String, expected: usize, position: u32 },
    #[error("{request} is longer than the model allows")]
    Endless { request: String },
}

/// What there is of an answer: enough to go on with it on another worker, for another client's
/// connection, at another gateway.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Transcript {
    pub tokens: Vec<u32>,
    pub text: String,
    /// One a token, where they were asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// Of the prompt's tokens, where they were asked for.
    pub prompt_scores: Vec<TokenLogprob>,
    /// What its tokens are of; none as long as there are none.
    pub variant: Option<Variant>,
    /// Zero as long as no worker has said.
    pub prompt_tokens: u32,
    /// Set once a worker has ended it.
    pub done: Option<Outcome>,
}

impl Transcript {
    /// What it takes in memory, about.
    pub fn bytes(&self) -> usize {
        const PER_SCORE: usize = 80;
        let alternatives = |scores: &[TokenLogprob]| scores.first().map_or(0, |score| score.top.len());
        // The first of a prompt's tokens has none.
        let of = |scores: &[TokenLogprob]| scores.len() * (1 + alternatives(scores.get(1..).unwrap_or_default()));
        self.text.len() + 4 * self.tokens.len() + PER_SCORE * (of(&self.logprobs) + of(&self.prompt_scores))
    }
}

#[derive(Debug)]
pub struct Choice {
    pub job: Arc<Job>,
    pub index: u32,
    state: Mutex<State>,
    /// Nobody wants it any more, and nothing knows of it but who still holds it.
    left: AtomicBool,
    /// Wakes the driver, of which there is one.
    phase_changed: Notify,
    /// Wakes the client's task, of which there is one a request.
    news: Arc<Notify>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    transcript: Transcript,
    server: Option<Server>,
    /// Failed on it, or had no room.
    avoid: Option<u64>,
    resumes: u32,
    failures: u32,
    /// Workers in a row that went or failed before they had sent a token of it.
    fruitless: u32,
    /// The last worker had no room for it.
    overloaded: bool,
    /// When the phase last changed or something arrived.
    moved: Instant,
    /// Since when no worker works on it; one that had no room does not count.
    waiting_since: Instant,
    /// What this worker has done of it.
    work: Work,
    /// When this worker sent its first token of it, and how many there were then.
    first_token: Option<(Instant, usize)>,
    /// When there was a first token, of any worker.
    begun: Option<Instant>,
    /// When the last one came.
    heard: Option<Instant>,
    /// When the worker before this one sent its last token, as long as this one has sent none.
    silent_since: Option<Instant>,
}

/// What a message of a worker has brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Appended {
    /// Tokens that are new.
    pub new: usize,
    /// How long no token came because the worker before was lost; with the first token after that.
    pub gap: Option<Duration>,
}

/// How far a worker is with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Nothing is heard of it, or it waits at the worker.
    None,
    /// So many of the tokens that it begins with are computed.
    Reading { computed: u32, all: u32 },
    /// Tokens come.
    Generating,
}

/// What is new for the client since it last looked.
#[derive(Clone, Debug, PartialEq)]
pub struct News {
    pub text: String,
    /// Of the tokens that the client has not heard of.
    pub logprobs: Vec<TokenLogprob>,
    /// Tokens of the completion so far.
    pub position: usize,
    /// When the first of those came that workers have sent here.
    pub begun: Option<Instant>,
    /// Zero as long as no worker has said.
    pub prompt_tokens: u32,
    pub resumes: u32,
    pub worker: Option<Arc<str>>,
    /// The weights that the answer is of.
    pub fingerprint: Option<Arc<str>>,
    /// How calls of tools are written in it.
    pub dialect: Option<Dialect>,
    pub phase: Phase,
}

/// How far the client is: bytes of text and tokens that it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub bytes: usize,
    pub tokens: usize,
}

/// What the driver sees.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    pub phase: Phase,
    pub moved: Instant,
    pub waiting_since: Instant,
    pub resumes: u32,
    pub failures: u32,
    pub fruitless: u32,
    pub overloaded: bool,
    /// Tokens so far.
    pub position: usize,
}

impl Choice {
    pub fn new(job: Arc<Job>, index: u32, news: Arc<Notify>) -> Self {
        Self::restored(job, index, news, Transcript::default())
    }

    /// One that goes on from what there is.
    pub fn restored(job: Arc<Job>, index: u32, news: Arc<Notify>, transcript: Transcript) -> Self {
        let state = State {
            phase: transcript.done.clone().map_or(Phase::Queued, Phase::Ended),
            transcript,
            server: None,
            avoid: None,
            resumes: 0,
            failures: 0,
            fruitless: 0,
            overloaded: false,
            moved: Instant::now(),
            waiting_since: Instant::now(),
            work: Work::None,
            first_token: None,
            begun: None,
            heard: None,
            silent_since: None,
        };
        let (state, left) = (Mutex::new(state), AtomicBool::new(false));
        Self { job, index, state, left, phase_changed: Notify::new(), news }
    }

    /// What a worker must be to take it: once tokens are out, the same as the last one.
    pub fn variant(&self) -> Option<Variant> {
        let state = self.state.lock();
        state.transcript.variant.clone().filter(|_| state.has_begun())
    }

    /// A worker that is better left out if there is another.
    pub fn avoid(&self) -> Option<u64> {
        self.state.lock().avoid
    }

    /// Gives it to a worker, if it still waits for one; what is returned is to be sent there.
    pub fn begin(&self, server: Server) -> Option<Generate> {
        let mut state = self.state.lock();
        if state.phase != Phase::Queued {
            return None;
        }
        if !state.transcript.tokens.is_empty() {
            state.resumes += 1;
            state.silent_since = state.heard;
        }
        if !state.has_begun() {
            state.transcript.variant = Some(server.variant.clone());
        }
        state.server = Some(server);
        state.overloaded = false;
        state.work = Work::None;
        state.first_token = None;
        let generated = state.transcript.tokens.clone();
        self.enter(&mut state, Phase::Running);
        Some(Generate { choice: self.index, generated, ..self.job.generate.clone() })
    }

    /// Takes what worker `from` generated. A worker that it is no longer with is not listened to.
    pub fn append(&self, from: u64, delta: Delta) -> Result<Appended, Broken> {
        let mut state = self.state.lock();
        if !state.is_with(from) {
            return Ok(Appended::default());
        }
        let (have, position) = (state.transcript.tokens.len(), delta.position as usize);
        let end = position + delta.tokens.len();
        if end < have || (end == have && !delta.tokens.is_empty()) {
            return Ok(Appended::default());
        }
        let request = || self.job.id().to_owned();
        if position != have {
            return Err(Broken::Gap { request: request(), expected: have, position: delta.position });
        }
        if self.job.generate.logprobs.is_some() && delta.logprobs.len() != delta.tokens.len() {
            let error = ApiError::worker_failed("the worker sent no log probabilities");
            self.enter(&mut state, Phase::Ended(Outcome::Failed(error)));
            return Ok(Appended::default());
        }
        let new = delta.tokens.len();
        let gap = state.extend(delta);
        let bounded = state.is_bounded();
        drop(state);
        if !self.job.generate.whole || have / TOKENS_A_LOOK != end / TOKENS_A_LOOK {
            self.news.notify_one();
        }
        match bounded {
            true => Ok(Appended { new, gap }),
            false => Err(Broken::Endless { request: request() }),
        }
    }

    /// Takes log probabilities of the prompt's tokens from `first` on. Another worker sends them again.
    pub fn score_prompt(&self, from: u64, first: usize, scores: Vec<TokenLogprob>) {
        let mut state = self.state.lock();
        let limit = state.server.as_ref().map_or(0, |server| server.max_length as usize);
        let (alternatives, length) = (self.job.generate.prompt_logprobs.unwrap_or(0) as usize, first + scores.len());
        let fits = first <= state.transcript.prompt_scores.len() && length <= limit;
        if state.is_with(from) && fits && length * (1 + alternatives) > MAX_PROMPT_SCORES {
            let message = format!(
                "The prompt's log probabilities are more than {MAX_PROMPT_SCORES}; ask for fewer alternatives, or \
                 leave `echo` out."
            );
            let error = ApiError::bad_field("logprobs", message);
            return self.enter(&mut state, Phase::Ended(Outcome::Failed(error)));
        }
        if state.is_with(from) && fits {
            state.transcript.prompt_scores.truncate(first);
            state.transcript.prompt_scores.extend(scores);
            state.moved = Instant::now();
        }
    }

    /// The worker is at it, though it has no token yet: a sign of life.
    pub fn works(&self, from: u64, work: Work) {
        let mut state = self.state.lock();
        if state.is_with(from) {
            state.moved = Instant::now();
            // One that has generated and waits or reads again has not lost what it did.
            if state.work != Work::Generating {
                state.work = work;
            }
        }
    }

    /// The worker is through with it. Tells at what speed it generated, in tokens per second.
    pub fn finish(&self, from: u64, done: Done) -> Option<f64> {
        let mut state = self.state.lock();
        if !state.is_with(from) {
            return None;
        }
        let speed = state.speed();
        state.transcript.text.push_str(&done.text);
        state.transcript.prompt_tokens = done.prompt_tokens;
        let outcome = Outcome::Done {
            finish_reason: done.finish_reason,
            prompt_tokens: done.prompt_tokens,
            completion_tokens: done.completion_tokens.max(state.transcript.tokens.len() as u32),
            cached_tokens: done.cached_tokens,
        };
        state.transcript.done = Some(outcome.clone());
        self.enter(&mut state, Phase::Ended(outcome));
        speed
    }

    /// The worker does not finish it, another may.
    pub fn lose(&self, from: u64, loss: Loss) {
        let mut state = self.state.lock();
        if state.is_with(from) {
            state.avoid = (loss != Loss::Gone).then_some(from);
            state.failures += u32::from(loss == Loss::Failed);
            if loss != Loss::Overloaded && state.work != Work::Generating {
                state.fruitless += 1;
            }
            // A worker that leaves has no room any more, too, but it had.
            state.overloaded = loss == Loss::Overloaded && state.work == Work::None;
            if !state.overloaded {
                state.waiting_since = Instant::now();
            }
            self.enter(&mut state, Phase::Lost);
        }
    }

    /// Takes it from a worker that has sent nothing for `timeout`, and tells which one that is.
    pub fn lose_if_stalled(&self, timeout: Duration) -> Option<u64> {
        let stalled = self.state.lock().moved.elapsed() >= timeout;
        let worker = self.last_worker().filter(|_| stalled)?;
        self.lose(worker, Loss::Failed);
        Some(worker)
    }

    /// Back to the queue after a loss; tells whether that is where it goes.
    pub fn requeue(&self) -> bool {
        let mut state = self.state.lock();
        let lost = state.phase == Phase::Lost;
        if lost {
            self.enter(&mut state, Phase::Queued);
        }
        lost
    }

    /// Nobody will finish it.
    pub fn fail(&self, error: ApiError) {
        let mut state = self.state.lock();
        if !matches!(state.phase, Phase::Ended(_)) {
            self.enter(&mut state, Phase::Ended(Outcome::Failed(error)));
        }
    }

    /// No worker has taken it in time.
    pub fn expire(&self, error: ApiError) {
        let mut state = self.state.lock();
        if state.phase == Phase::Queued {
            self.enter(&mut state, Phase::Ended(Outcome::Failed(error)));
        }
    }

    /// Nobody wants it any more; tells whether that is new.
    pub fn leave(&self) -> bool {
        !self.left.swap(true, Ordering::AcqRel)
    }

    /// A worker has ended it, and knows that.
    pub fn is_done(&self) -> bool {
        self.state.lock().transcript.done.is_some()
    }

    pub fn is_queued(&self) -> bool {
        self.state.lock().phase == Phase::Queued
    }

    /// The worker that it was given to last.
    pub fn last_worker(&self) -> Option<u64> {
        self.state.lock().server.as_ref().map(|server| server.id)
    }

    pub fn progress(&self) -> Progress {
        let state = self.state.lock();
        Progress {
            phase: state.phase.clone(),
            moved: state.moved,
            waiting_since: state.waiting_since,
            resumes: state.resumes,
            failures: state.failures,
            fruitless: state.fruitless,
            overloaded: state.overloaded,
            position: state.transcript.tokens.len(),
        }
    }

    /// What its worker does; none where it has none.
    pub fn work(&self) -> Option<Work> {
        let state = self.state.lock();
        (state.phase == Phase::Running).then_some(state.work)
    }

    /// Waits until the phase may have changed. Only the driver may wait.
    pub async fn phase_changed(&self) {
        self.phase_changed.notified().await;
    }

    /// Everything that is beyond `seen`.
    pub fn news(&self, seen: Seen) -> News {
        let state = self.state.lock();
        let transcript = &state.transcript;
        News {
            text: transcript.text.get(seen.bytes..).unwrap_or_default().to_owned(),
            logprobs: transcript.logprobs.get(seen.tokens..).unwrap_or_default().to_vec(),
            position: transcript.tokens.len(),
            begun: state.begun,
            prompt_tokens: transcript.prompt_tokens,
            resumes: state.resumes,
            worker: state.server.as_ref().map(|server| server.name.clone()),
            fingerprint: transcript.variant.as_ref().map(|variant| variant.weights_digest.clone()),
            dialect: transcript.variant.as_ref().and_then(|variant| variant.dialect),
            phase: state.phase.clone(),
        }
    }

    /// What there is of it takes, about, in memory.
    pub fn bytes(&self) -> usize {
        self.state.lock().transcript.bytes()
    }

    pub fn transcript(&self) -> Transcript {
        self.state.lock().transcript.clone()
    }

    fn enter(&self, state: &mut State, phase: Phase) {
        state.phase = phase;
        state.moved = Instant::now();
        self.phase_changed.notify_one();
        self.news.notify_one();
    }
}

impl State {
    fn has_begun(&self) -> bool {
        !self.transcript.tokens.is_empty() || !self.transcript.text.is_empty()
    }

    fn is_with(&self, worker: u64) -> bool {
        let server = self.server.as_ref();
        self.phase == Phase::Running && server.is_some_and(|server| server.id == worker)
    }

    /// Tells for how long no token came, if this is the first after a worker was lost.
    fn extend(&mut self, delta: Delta) -> Option<Duration> {
        let now = Instant::now();
        let mut gap = None;
        if !delta.tokens.is_empty() {
            gap = self.silent_since.take().map(|since| now.duration_since(since));
            self.heard = Some(now);
            self.work = Work::Generating;
            self.fruitless = 0;
            self.begun.get_or_insert(now);
        }
        self.transcript.tokens.extend(delta.tokens);
        self.transcript.text.push_str(&delta.text);
        self.transcript.logprobs.extend(delta.logprobs);
        self.transcript.prompt_tokens = self.transcript.prompt_tokens.max(delta.prompt_tokens);
        self.first_token.get_or_insert((now, self.transcript.tokens.len()));
        self.moved = now;
        gap
    }

    /// Tokens per second of this worker, where there are enough to tell.
    fn speed(&self) -> Option<f64> {
        const ENOUGH: usize = 8;
        let (since, before) = self.first_token?;
        let count = self.transcript.tokens.len() - before;
        let seconds = self.moved.duration_since(since).as_secs_f64();
        (count >= ENOUGH && seconds > 0.0).then(|| count as f64 / seconds)
    }

    /// Whether a worker could have meant this: no more tokens than the model holds, and no more text
    /// than its longest tokens make.
    fn is_bounded(&self) -> bool {
        const LONGEST_TOKEN: usize = 1024;
        let limit = self.server.as_ref().map_or(0, |server| server.max_length as usize);
        self.transcript.tokens.len() <= limit && self.transcript.text.len() <= (limit + 1) * LONGEST_TOKEN
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub fn job() -> Arc<Job> {
        let generate = Generate { request: "r".into(), model: "ns/m".into(), ..Generate::default() };
        Arc::new(Job { generate, ..Job::default() })
    }

    pub fn server(id: u64) -> Server {
        Server {
            id,
            name: format!("w{id}").into(),
            variant: Variant {
                weights_digest: "d".into(),
                template: "t".into(),
                quantization: "q".into(),
                dialect: None,
            },
            max_length: 8,
        }
    }

    pub fn delta(position: u32, tokens: &[u32], text: &str) -> Delta {
        Delta {
            request: "r".into(),
            choice: 0,
            position,
            tokens: tokens.to_vec(),
            text: text.into(),
            ..Delta::default()
        }
    }

    fn running() -> Choice {
        let choice = Choice::new(job(), 0, Arc::default());
        choice.begin(server(1));
        choice
    }

    #[test]
    fn duplicates_are_dropped_and_gaps_are_noticed() {
        let choice = running();
        assert_eq!(choice.append(1, delta(0, &[1, 2], "ab")).map(|appended| appended.new), Ok(2));
        assert_eq!(choice.append(1, delta(0, &[1, 2], "ab")).map(|appended| appended.new), Ok(0));
        assert_eq!(choice.append(1, delta(1, &[2], "b")).map(|appended| appended.new), Ok(0));
        assert!(matches!(choice.append(1, delta(3, &[4], "d")), Err(Broken::Gap { expected: 2, .. })));
        assert!(matches!(choice.append(1, delta(1, &[2, 3], "bc")), Err(Broken::Gap { .. })));
        assert_eq!(choice.append(1, delta(2, &[3], "c")).map(|appended| appended.new), Ok(1));
        let text = |bytes| choice.news(Seen { bytes, tokens: 0 }).text;
        assert_eq!((text(0), text(2)), ("abc".to_owned(), "c".to_owned()));
    }

    #[tokio::test]
    async fn who_waits_for_the_whole_answer_is_woken_seldom() {
        let news = Arc::new(Notify::new());
        let woken = || tokio::time::timeout(Duration::ZERO, news.notified());
        for whole in [false, true] {
            let generate = Generate { whole, ..job().generate.clone() };
            let job = Arc::new(Job { generate, ..Job::default() });
            let choice = Choice::new(job, 0, news.clone());
            choice.begin(Server { max_length: 1 << 10, ..server(1) });
            woken().await.expect("that it has a worker is news");
            choice.append(1, delta(0, &[1], "a")).unwrap();
            assert_eq!(woken().await.is_err(), whole);
            choice.append(1, delta(1, &[0; TOKENS_A_LOOK], "c")).unwrap();
            woken().await.expect("so much is");
            choice.finish(1, Done::default());
            woken().await.expect("the end is");
        }
    }

    #[test]
    fn a_worker_that_lost_it_is_not_listened_to() {
        let choice = running();
        choice.append(1, delta(0, &[1], "a")).unwrap();
        choice.lose(1, Loss::Gone);
        assert!(choice.requeue());
        assert_eq!(choice.variant(), Some(server(1).variant));
        assert_eq!(choice.begin(server(2)).unwrap().generated, [1]);
        assert_eq!(choice.append(1, delta(1, &[9], "x")).map(|appended| appended.new), Ok(0));
        choice.finish(1, Done::default());
        choice.lose(1, Loss::Gone);
        assert_eq!(choice.append(2, delta(1, &[2], "b")).map(|appended| appended.new), Ok(1));
        let news = choice.news(Seen::default());
        assert_eq!((news.text.as_str(), news.resumes, news.phase), ("ab", 1, Phase::Running));
    }

    #[test]
    fn an_endless_answer_is_noticed() {
        let choice = running();
        let tokens = [0; 9];
        assert!(matches!(choice.append(1, delta(0, &tokens, "")), Err(Broken::Endless { .. })));
    }

    #[test]
    fn any_worker_may_begin_an_answer_of_which_nothing_is_out() {
        let choice = running();
        choice.lose(1, Loss::Failed);
        assert!(choice.begin(server(2)).is_none(), "it is not in the queue yet");
        choice.requeue();
        assert_eq!(choice.variant(), None);
        assert_eq!(choice.avoid(), Some(1));
        assert_eq!(choice.begin(server(2)).unwrap().generated, [0u32; 0]);
        assert_eq!(choice.progress().resumes, 0);
    }

    #[test]
    fn an_answer_that_has_waited_too_long_is_not_begun() {
        let choice = Choice::new(job(), 0, Arc::default());
        choice.expire(ApiError::no_capacity("m"));
        assert!(choice.begin(server(1)).is_none());
        assert!(matches!(choice.progress().phase, Phase::Ended(Outcome::Failed(_))));
    }

    #[test]
    fn log_probabilities_come_with_their_tokens_or_the_request_fails() {
        let job = Arc::new(Job { generate: Generate { logprobs: Some(1), ..Generate::default() }, ..Job::default() });
        let choice = Choice::new(job, 0, Arc::default());
        choice.begin(server(1));
        let scored = |token| TokenLogprob { token, ..TokenLogprob::default() };
        let with = Delta { logprobs: vec![scored(1), scored(2)], ..delta(0, &[1, 2], "ab") };
        assert_eq!(choice.append(1, with).map(|appended| appended.new), Ok(2));
        let news = choice.news(Seen { bytes: 1, tokens: 1 });
        assert_eq!((news.text.as_str(), news.logprobs), ("b", vec![scored(2)]));
        assert_eq!(choice.append(1, delta(2, &[3], "c")).map(|appended| appended.new), Ok(0));
        assert!(matches!(choice.progress().phase, Phase::Ended(Outcome::Failed(_))));
    }

    #[test]
    fn a_restored_answer_goes_on_where_it_was_with_the_weights_that_it_had() {
        let choice = running();
        choice.append(1, delta(0, &[1, 2], "ab")).unwrap();
        let restored = Choice::restored(job(), 0, Arc::default(), choice.transcript());
        assert_eq!(restored.variant(), Some(server(1).variant));
        assert!(restored.is_queued());
        assert_eq!(restored.begin(server(2)).unwrap().generated, [1, 2]);
        restored.append(2, delta(2, &[3], "c")).unwrap();
        restored.finish(2, Done { completion_tokens: 3, ..Done::default() });
        let ended = Choice::restored(job(), 0, Arc::default(), restored.transcript());
        assert!(ended.is_done() && !ended.is_queued());
        assert_eq!(ended.news(Seen::default()).text, "abc");
    }

    #[test]
    fn scores_of_a_prompt_come_in_parts_and_again_from_another_worker() {
        let choice = running();
        let scored = |token| TokenLogprob { token, ..TokenLogprob::default() };
        let told = || choice.transcript().prompt_scores.iter().map(|score| score.token).collect::<Vec<_>>();
        choice.score_prompt(1, 0, vec![scored(1), scored(2)]);
        choice.score_prompt(1, 2, vec![scored(3)]);
        assert_eq!(told(), [1, 2, 3]);
        choice.score_prompt(1, 7, vec![scored(9)]);
        assert_eq!(told(), [1, 2, 3], "what is between is missing");
        choice.score_prompt(1, 0, vec![scored(1)]);
        assert_eq!(told(), [1]);
    }

    #[test]
    fn losses_count_that_bring_no_token() {
        let choice = running();
        let lose = |loss| {
            choice.lose(1, loss);
            choice.requeue();
            choice.begin(server(1));
            choice.progress().fruitless
        };
        assert_eq!([lose(Loss::Gone), lose(Loss::Failed), lose(Loss::Overloaded)], [1, 2, 2]);
        choice.append(1, delta(0, &[1], "a")).unwrap();
        assert_eq!(choice.progress().fruitless, 0);
        assert_eq!([lose(Loss::Gone), lose(Loss::Gone)], [0, 1]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_gap_is_told_once_from_the_last_token_of_the_lost_worker() {
        let choice = running();
        assert_eq!(choice.append(1, delta(0, &[1], "a")).unwrap().gap, None);
        tokio::time::advance(Duration::from_secs(2)).await;
        choice.works(1, Work::Generating);
        tokio::time::advance(Duration::from_secs(3)).await;
        choice.lose(1, Loss::Gone);
        choice.requeue();
        choice.begin(server(2));
        let gap = |position| choice.append(2, delta(position, &[2], "b")).unwrap().gap;
        assert_eq!((gap(1), gap(2)), (Some(Duration::from_secs(5)), None));
    }
}
