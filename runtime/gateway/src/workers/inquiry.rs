//! Questions with one answer: embeddings, the length of a prompt, what has become of a request.

use super::connection::Connection;
use super::registry::Registry;
use crate::api::error::ApiError;
use crate::choice::Variant;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout_at};
use vicuna_protocol::inference::gateway_message::Body;
use vicuna_protocol::inference::{
    Cancel, Embeddings, Failure, ModelOffer, TokenCount, TranscriptChoice, TranscriptOf, failure,
};

/// Workers that may fail at a question, or go, before it is taken to be the cause.
const MAX_FAILURES: u32 = 4;
/// Before a worker that had no room is asked again.
const OVERLOADED_PAUSE: Duration = Duration::from_millis(250);
/// What a worker remembers is at hand.
const TRANSCRIPTS_TIMEOUT: Duration = Duration::from_secs(2);

/// What a worker says.
#[derive(Debug)]
pub enum Answer {
    Embeddings(Embeddings),
    TokenCount(TokenCount),
    Transcript(Vec<TranscriptChoice>),
    Failed(Failure),
}

/// A question that has been sent. Dropped, it is forgotten, its slot is another's, and a worker that is
/// still at it is told.
struct Asked {
    registry: Arc<Registry>,
    connection: Arc<Connection>,
    request: String,
    /// The answer takes the worker's time, which is spared if nobody wants it.
    computed: bool,
    /// Others who wait hear that its slot is free.
    announces: bool,
    answer: oneshot::Receiver<Answer>,
}

impl Asked {
    fn forget(&self) {
        if self.connection.forget(&self.request) && self.computed {
            let cancel = Cancel { request: self.request.clone(), choice: 0, keep: false };
            // One that does not read any more is found out by what else is sent to it.
            self.connection.send(Body::Cancel(cancel));
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.forget();
        if self.announces {
            self.registry.answered(&self.connection);
        }
    }
}

/// Whether a model can do what is asked of it.
pub type Check = Arc<dyn Fn(&ModelOffer) -> Result<(), ApiError> + Send + Sync>;

/// What a worker is to compute, and for whom.
#[derive(Clone)]
pub struct Task {
    pub model: String,
    /// Whose it is, for fairness.
    pub key: String,
    pub priority: i32,
    /// What it is called on the wire.
    pub request: String,
    pub body: Body,
    pub check: Check,
}

/// How long a task may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// The client's own deadline.
    pub until: Option<Instant>,
    /// For a worker to be free.
    pub queue: Duration,
    /// For the worker's answer, of which nothing is heard before it is there.
    pub stall: Duration,
}

impl Patience {
    fn in_at_most(&self, longest: Duration) -> Instant {
        self.at_most(Instant::now() + longest)
    }

    fn at_most(&self, at: Instant) -> Instant {
        self.until.map_or(at, |until| until.min(at))
    }
}

/// A task in the queue.
pub struct Question {
    pub model: String,
    pub key: String,
    pub priority: i32,
    /// A worker that failed at it, and is better left out.
    pub avoid: Option<u64>,
    task: Task,
    registry: Arc<Registry>,
    /// Who asks, until a worker has it.
    asker: Mutex<Option<oneshot::Sender<Result<Asked, ApiError>>>>,
}

impl Question {
    /// Gives it to a worker with a free slot. The registry is locked meanwhile.
    pub fn put_to(&self, connection: &Arc<Connection>) {
        let Some(asker) = self.asker.lock().take() else { return };
        let unsent = match self.send(connection) {
            Ok(asked) => asker.send(Ok(asked)),
            Err(error) => asker.send(Err(error)),
        };
        if let Err(Ok(mut asked)) = unsent {
            asked.forget();
            // Whoever gave it the slot looks on for who waits.
            asked.announces = false;
        }
    }

    fn send(&self, connection: &Arc<Connection>) -> Result<Asked, ApiError> {
        let offer = connection.offer(&self.model).ok_or_else(|| ApiError::no_capacity(&self.model))?;
        (self.task.check)(&offer)?;
        let answer = connection.expect(&self.task.request).ok_or_else(ApiError::too_many_requests)?;
        // A connection that takes nothing is given up, and the question with it.
        if !connection.send(self.task.body.clone()) {
            connection.forget(&self.task.request);
        }
        Ok(Asked {
            registry: self.registry.clone(),
            connection: connection.clone(),
            request: self.task.request.clone(),
            computed: true,
            announces: true,
            answer,
        })
    }

    /// It does not get a worker.
    pub fn refuse(&self, error: ApiError) {
        if let Some(asker) = self.asker.lock().take() {
            // One that has gone does not need to know.
            drop(asker.send(Err(error)));
        }
    }
}

/// Takes a question out of the queue once nobody waits for it.
struct Waiting(Arc<Question>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.registry.withdraw(&self.0);
    }
}

impl Registry {
    fn ask(self: &Arc<Self>, connection: Arc<Connection>, request: &str, body: Body) -> Option<Asked> {
        let answer = connection.expect(request)?;
        let (registry, request) = (self.clone(), request.to_owned());
        let asked = Asked { registry, connection, request, computed: false, announces: true, answer };
        asked.connection.send(body).then_some(asked)
    }

    /// Asks a worker of `model` at once, however busy it is, and another if that one goes or fails: for what takes
    /// no time to answer.
    pub async fn inquire(
        self: &Arc<Self>,
        model: &str,
        request: &str,
        body: &Body,
        deadline: Instant,
    ) -> Result<Answer, ApiError> {
        let mut attempts = Attempts { model, deadline, failures: 0 };
        loop {
            let connection = self.least_loaded_before(model, deadline).await?;
            let Some(mut asked) = self.ask(connection, request, body.clone()) else {
                return Err(ApiError::too_many_requests());
            };
            if let Some(answer) = attempts.answer(&mut asked).await? {
                return Ok(answer);
            }
        }
    }

    /// Has a worker compute an answer. It waits for its turn like any request, and another worker has it if one goes
    /// or fails. While a worker computes, it does not wait.
    pub async fn compute(
        self: &Arc<Self>,
        task: &Task,
        max_queue: usize,
        patience: Patience,
    ) -> Result<Answer, ApiError> {
        let model = task.model.as_str();
        let mut waits = patience.in_at_most(patience.queue);
        let mut attempts = Attempts { model, deadline: waits, failures: 0 };
        let mut avoid = None;
        loop {
            let (asker, placed) = oneshot::channel();
            let question = Arc::new(Question {
                model: task.model.clone(),
                key: task.key.clone(),
                priority: task.priority,
                avoid,
                task: task.clone(),
                registry: self.clone(),
                asker: Mutex::new(Some(asker)),
            });
            match avoid {
                None => self.admit_question(&question, max_queue).map_err(|_| ApiError::queue_full(model))?,
                Some(_) => self.readmit_question(&question),
            }
            let waiting = Waiting(question);
            let placed = timeout_at(waits, placed).await.map_err(|_| ApiError::no_capacity(model))?;
            drop(waiting);
            let mut asked = placed.map_err(|_| ApiError::no_capacity(model))??;
            avoid = Some(asked.connection.id);
            attempts.deadline = patience.in_at_most(patience.stall);
            let (since, failures) = (Instant::now(), attempts.failures);
            if let Some(answer) = attempts.answer(&mut asked).await? {
                return Ok(answer);
            }
            waits = match attempts.failures > failures {
                true => patience.in_at_most(patience.queue),
                // One without room has made it wait, but for the time that it may have been at it.
                false => patience.at_most(waits + since.elapsed().saturating_sub(OVERLOADED_PAUSE)),
            };
            if waits <= Instant::now() {
                return Err(ApiError::no_capacity(model));
            }
        }
    }

    async fn least_loaded_before(&self, model: &str, deadline: Instant) -> Result<Arc<Connection>, ApiError> {
        loop {
            let arrival = self.arrival();
            if let Some(connection) = self.least_loaded(model) {
                return Ok(connection);
            }
            self.ask_for(model);
            timeout_at(deadline, arrival).await.map_err(|_| ApiError::no_capacity(model))?;
        }
    }

    /// What the workers of `model` know of a request that another gateway had, and of which weights
    /// it is. Only they are asked: no other tenant's worker learns of it.
    pub async fn transcripts(self: &Arc<Self>, model: &str, request: &str) -> Vec<(TranscriptChoice, Variant)> {
        let deadline = Instant::now() + TRANSCRIPTS_TIMEOUT;
        let question = || Body::TranscriptOf(TranscriptOf { request: request.to_owned() });
        let asked: Vec<_> = self
            .offering(model)
            .into_iter()
            .filter_map(|(connection, variant)| Some((self.ask(connection, request, question())?, variant)))
            .collect();
        let mut known = Vec::new();
        for (mut asked, variant) in asked {
            if let Ok(Ok(Answer::Transcript(choices))) = timeout_at(deadline, &mut asked.answer).await {
                known.extend(choices.into_iter().map(|choice| (choice, variant.clone())));
            }
        }
        known
    }
}

/// Workers that have been asked one thing.
struct Attempts<'a> {
    model: &'a str,
    deadline: Instant,
    failures: u32,
}

impl Attempts<'_> {
    /// The answer; none if another worker, or this one after a pause, should be asked.
    async fn answer(&mut self, asked: &mut Asked) -> Result<Option<Answer>, ApiError> {
        let no_capacity = |_| ApiError::no_capacity(self.model);
        match timeout_at(self.deadline, &mut asked.answer).await.map_err(no_capacity)? {
            Ok(Answer::Failed(failure)) => match failure.code() {
                failure::Code::Invalid => return Err(ApiError::invalid(failure)),
                failure::Code::Overloaded => {
                    timeout_at(self.deadline, sleep(OVERLOADED_PAUSE)).await.map_err(no_capacity)?;
                    return Ok(None);
                }
                _ => asked.registry.failed(asked.connection.id),
            },
            Ok(answer) => return Ok(Some(answer)),
            // It went away.
            Err(_) => {}
        }
        self.failures += 1;
        match self.failures < MAX_FAILURES {
            true => Ok(None),
            false => Err(ApiError::worker_failed(&format!("{MAX_FAILURES} attempts failed"))),
        }
    }
}
