//! One answer on its way: everything that is needed to continue it on another worker.
//!
//! The transcript is kept here and nowhere else. A worker's messages are appended by the task that
//! reads that worker; the client's task reads at its own pace, so that a slow client holds up nobody;
//! the driver (`drive.rs`) waits for the phase to change. Its size is bounded by the model's length.

use crate::api::error::ApiError;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;
use vicuna_protocol::inference::{Delta, Done, Generate, Message, ModelOffer, Sampling};

/// What is asked, shared by the choices of a request.
#[derive(Clone, Debug)]
pub struct Job {
    /// `chatcmpl-…` or `cmpl-…`
    pub id: String,
    pub model: String,
    pub messages: Vec<Message>,
    /// Instead of messages.
    pub prompt: Option<String>,
    pub sampling: Sampling,
}

/// What has to be equal where an answer continues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variant {
    pub weights_digest: String,
    pub template: String,
    pub quantization: String,
}

impl From<&ModelOffer> for Variant {
    fn from(offer: &ModelOffer) -> Self {
        Self {
            weights_digest: offer.weights_digest.clone(),
            template: offer.template.clone(),
            quantization: offer.quantization.clone(),
        }
    }
}

/// A worker as a choice sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    pub id: u64,
    pub name: String,
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
    Done { finish_reason: String, prompt_tokens: u32, completion_tokens: u32 },
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

#[derive(Debug)]
pub struct Choice {
    pub job: Arc<Job>,
    pub index: u32,
    state: Mutex<State>,
    /// Wakes the driver, of which there is one.
    phase_changed: Notify,
    /// Wakes the client's task, of which there is one a request.
    news: Arc<Notify>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    tokens: Vec<u32>,
    text: String,
    server: Option<Server>,
    /// Failed on it, or had no room.
    avoid: Option<u64>,
    resumes: u32,
    failures: u32,
    overloaded: bool,
    /// When the phase last changed or something arrived.
    moved: Instant,
    /// Since when no worker works on it; one that had no room does not count.
    waiting_since: Instant,
}

/// What is new for the client since it last looked.
#[derive(Clone, Debug, PartialEq)]
pub struct News {
    pub text: String,
    /// Tokens of the completion so far.
    pub position: usize,
    pub resumes: u32,
    pub worker: Option<String>,
    pub phase: Phase,
}

/// What the driver sees.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    pub phase: Phase,
    pub moved: Instant,
    pub waiting_since: Instant,
    pub resumes: u32,
    pub failures: u32,
    pub overloaded: bool,
}

impl Choice {
    pub fn new(job: Arc<Job>, index: u32, news: Arc<Notify>) -> Self {
        let state = State {
            phase: Phase::Queued,
            tokens: Vec::new(),
            text: String::new(),
            server: None,
            avoid: None,
            resumes: 0,
            failures: 0,
            overloaded: false,
            moved: Instant::now(),
            waiting_since: Instant::now(),
        };
        Self { job, index, state: Mutex::new(state), phase_changed: Notify::new(), news }
    }

    /// What a worker must be to take it: once tokens are out, the same as the last one.
    pub fn variant(&self) -> Option<Variant> {
        let state = self.state.lock();
        let begun = !state.tokens.is_empty() || !state.text.is_empty();
        state.server.as_ref().filter(|_| begun).map(|server| server.variant.clone())
    }

    /// A worker that is better left out if there is another.
    pub fn avoid(&self) -> Option<u64> {
        self.state.lock().avoid
    }

    /// Gives it to a worker; what is returned is to be sent there.
    pub fn begin(&self, server: Server) -> Generate {
        let mut state = self.state.lock();
        if !state.tokens.is_empty() {
            state.resumes += 1;
        }
        state.server = Some(server);
        state.overloaded = false;
        let generated = state.tokens.clone();
        self.enter(&mut state, Phase::Running);
        Generate {
            request: self.job.id.clone(),
            choice: self.index,
            model: self.job.model.clone(),
            messages: self.job.messages.clone(),
            sampling: Some(self.job.sampling.clone()),
            generated,
            prompt: self.job.prompt.clone(),
        }
    }

    /// Takes what worker `from` generated and tells how many tokens were new. A worker that it is no
    /// longer with is not listened to.
    pub fn append(&self, from: u64, delta: Delta) -> Result<usize, Broken> {
        let mut state = self.state.lock();
        if !state.is_with(from) {
            return Ok(0);
        }
        let (have, position) = (state.tokens.len(), delta.position as usize);
        let end = position + delta.tokens.len();
        if end < have || (end == have && !delta.tokens.is_empty()) {
            return Ok(0);
        }
        if position != have {
            return Err(Broken::Gap { request: self.job.id.clone(), expected: have, position: delta.position });
        }
        let new = delta.tokens.len();
        state.tokens.extend(delta.tokens);
        state.text.push_str(&delta.text);
        state.moved = Instant::now();
        let bounded = state.is_bounded();
        drop(state);
        self.news.notify_one();
        match bounded {
            true => Ok(new),
            false => Err(Broken::Endless { request: self.job.id.clone() }),
        }
    }

    /// The worker is through with it.
    pub fn finish(&self, from: u64, done: Done) {
        let mut state = self.state.lock();
        if state.is_with(from) {
            state.text.push_str(&done.text);
            let completion_tokens = done.completion_tokens.max(state.tokens.len() as u32);
            let outcome = Outcome::Done {
                finish_reason: done.finish_reason,
                prompt_tokens: done.prompt_tokens,
                completion_tokens,
            };
            self.enter(&mut state, Phase::Ended(outcome));
        }
    }

    /// The worker does not finish it, another may.
    pub fn lose(&self, from: u64, loss: Loss) {
        let mut state = self.state.lock();
        if state.is_with(from) {
            state.avoid = (loss != Loss::Gone).then_some(from);
            state.failures += u32::from(loss == Loss::Failed);
            state.overloaded = loss == Loss::Overloaded;
            if !state.overloaded {
                state.waiting_since = Instant::now();
            }
            self.enter(&mut state, Phase::Lost);
        }
    }

    /// Takes it from a worker that has sent nothing for `timeout`.
    pub fn lose_if_stalled(&self, timeout: Duration) {
        let stalled = self.state.lock().moved.elapsed() >= timeout;
        if let Some(worker) = self.last_worker().filter(|_| stalled) {
            self.lose(worker, Loss::Failed);
        }
    }

    /// Back to the queue after a loss.
    pub fn requeue(&self) {
        let mut state = self.state.lock();
        if state.phase == Phase::Lost {
            self.enter(&mut state, Phase::Queued);
        }
    }

    /// Nobody will finish it.
    pub fn fail(&self, error: ApiError) {
        let mut state = self.state.lock();
        if !matches!(state.phase, Phase::Ended(_)) {
            self.enter(&mut state, Phase::Ended(Outcome::Failed(error)));
        }
    }

    /// A worker has ended it, and knows that.
    pub fn is_done(&self) -> bool {
        matches!(self.state.lock().phase, Phase::Ended(Outcome::Done { .. }))
    }

    /// The worker that it was given to last.
    pub fn last_worker(&self) -> Option<u64> {
        self.state.lock().server.as_ref().map(|server| server.id)
    }

    /// The weights that the answer is of.
    pub fn weights_digest(&self) -> Option<String> {
        let state = self.state.lock();
        state.server.as_ref().map(|server| server.variant.weights_digest.clone())
    }

    pub fn progress(&self) -> Progress {
        let state = self.state.lock();
        Progress {
            phase: state.phase.clone(),
            moved: state.moved,
            waiting_since: state.waiting_since,
            resumes: state.resumes,
            failures: state.failures,
            overloaded: state.overloaded,
        }
    }

    /// Waits until the phase may have changed. Only the driver may wait.
    pub async fn phase_changed(&self) {
        self.phase_changed.notified().await;
    }

    /// Everything beyond the first `seen` bytes of text.
    pub fn news(&self, seen: usize) -> News {
        let state = self.state.lock();
        News {
            text: state.text.get(seen..).unwrap_or_default().to_owned(),
            position: state.tokens.len(),
            resumes: state.resumes,
            worker: state.server.as_ref().map(|server| server.name.clone()),
            phase: state.phase.clone(),
        }
    }

    fn enter(&self, state: &mut State, phase: Phase) {
        state.phase = phase;
        state.moved = Instant::now();
        self.phase_changed.notify_one();
        self.news.notify_one();
    }
}

impl State {
    fn is_with(&self, worker: u64) -> bool {
        let server = self.server.as_ref();
        self.phase == Phase::Running && server.is_some_and(|server| server.id == worker)
    }

    /// Whether a worker could have meant this: no more tokens than the model holds, and no more text
    /// than its longest tokens make.
    fn is_bounded(&self) -> bool {
        const LONGEST_TOKEN: usize = 1024;
        let limit = self.server.as_ref().map_or(0, |server| server.max_length as usize);
        self.tokens.len() <= limit && self.text.len() <= (limit + 1) * LONGEST_TOKEN
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub fn job() -> Arc<Job> {
        Arc::new(Job {
            id: "r".into(),
            model: "ns/m".into(),
            messages: Vec::new(),
            prompt: None,
            sampling: Sampling::default(),
        })
    }

    fn server(id: u64) -> Server {
        Server {
            id,
            name: format!("w{id}"),
            variant: Variant { weights_digest: "d".into(), template: "t".into(), quantization: "q".into() },
            max_length: 8,
        }
    }

    fn delta(position: u32, tokens: &[u32], text: &str) -> Delta {
        Delta { request: "r".into(), choice: 0, position, tokens: tokens.to_vec(), text: text.into() }
    }

    fn running() -> Choice {
        let choice = Choice::new(job(), 0, Arc::default());
        choice.begin(server(1));
        choice
    }

    #[test]
    fn duplicates_are_dropped_and_gaps_are_noticed() {
        let choice = running();
        assert_eq!(choice.append(1, delta(0, &[1, 2], "ab")), Ok(2));
        assert_eq!(choice.append(1, delta(0, &[1, 2], "ab")), Ok(0));
        assert_eq!(choice.append(1, delta(1, &[2], "b")), Ok(0));
        assert!(matches!(choice.append(1, delta(3, &[4], "d")), Err(Broken::Gap { expected: 2, .. })));
        assert!(matches!(choice.append(1, delta(1, &[2, 3], "bc")), Err(Broken::Gap { .. })));
        assert_eq!(choice.append(1, delta(2, &[3], "c")), Ok(1));
        assert_eq!(choice.news(0).text, "abc");
        assert_eq!(choice.news(2).text, "c");
    }

    #[test]
    fn a_worker_that_lost_it_is_not_listened_to() {
        let choice = running();
        choice.append(1, delta(0, &[1], "a")).unwrap();
        choice.lose(1, Loss::Gone);
        choice.requeue();
        assert_eq!(choice.variant(), Some(server(1).variant));
        assert_eq!(choice.begin(server(2)).generated, [1]);
        assert_eq!(choice.append(1, delta(1, &[9], "x")), Ok(0));
        choice.finish(1, Done::default());
        choice.lose(1, Loss::Gone);
        assert_eq!(choice.append(2, delta(1, &[2], "b")), Ok(1));
        let news = choice.news(0);
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
        assert_eq!(choice.variant(), None);
        assert_eq!(choice.avoid(), Some(1));
        assert_eq!(choice.begin(server(2)).generated, [0u32; 0]);
        assert_eq!(choice.progress().resumes, 0);
    }
}
