//! Continuous batching (Yu et al. 2022, "Orca"): requests join and leave the running batch between
//! steps. One thread owns the engine and every sequence; the rest of the process sends it
//! [`Command`]s. A step prefills a piece of one new request, then decodes one token of every other,
//! so that a long prompt delays running streams by one piece only.

use crate::completion::Completion;
use crate::metrics::Metrics;
use std::collections::VecDeque;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use vicuna_model::ModelError;
use vicuna_model::inference::{Engine, Sequence};
use vicuna_protocol::inference::worker_message::Body;
use vicuna_protocol::inference::{Failure, WorkerMessage, failure::Code};

/// Prompt tokens that a step prefills.
const PREFILL_TOKENS: usize = 256;
/// Requests that may wait for each slot; more are refused, for another worker.
const WAITING_PER_SLOT: usize = 4;
/// Commands on their way to the thread.
const COMMANDS: usize = 256;

/// Which gateway connection a request came by.
pub type Connection = u64;

#[derive(Debug)]
pub enum Command {
    Submit(Box<Job>),
    Cancel {
        connection: Connection,
        request: String,
        choice: u32,
    },
    /// The gateway is gone; it asks elsewhere for what was running.
    Disconnected(Connection),
    /// Take nothing new, give back what waits, finish what runs.
    Drain,
}

/// A request, ready to run.
#[derive(Debug)]
pub struct Job {
    pub connection: Connection,
    pub prompt: Vec<u32>,
    pub completion: Completion,
    pub replies: Replies,
}

/// Messages to one gateway. Never waits: a gateway that does not read loses its connection, and the
/// batch goes on.
#[derive(Clone, Debug)]
pub struct Replies {
    messages: mpsc::Sender<WorkerMessage>,
    broken: CancellationToken,
}

impl Replies {
    pub fn new(messages: mpsc::Sender<WorkerMessage>, broken: CancellationToken) -> Self {
        Self { messages, broken }
    }

    pub fn send(&self, body: Body) {
        if self.messages.try_send(WorkerMessage { body: Some(body) }).is_err() {
            self.broken.cancel();
        }
    }
}

/// Requests in the batch and before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Occupancy {
    pub running: usize,
    pub waiting: usize,
}

/// The scheduler's other end, for any thread.
#[derive(Clone, Debug)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    occupancy: watch::Receiver<Occupancy>,
}

impl Handle {
    /// Waits while the queue is full. Commands to an ended scheduler vanish; the process is ending.
    pub async fn send(&self, command: Command) {
        if self.commands.send(command).await.is_err() {
            tracing::debug!("the scheduler has ended");
        }
    }

    pub fn occupancy(&self) -> watch::Receiver<Occupancy> {
        self.occupancy.clone()
    }
}

#[derive(Debug)]
pub struct Scheduler {
    engine: Engine,
    slots: usize,
    metrics: Metrics,
    waiting: VecDeque<Box<Job>>,
    running: Vec<Running>,
    draining: bool,
    occupancy: watch::Sender<Occupancy>,
    commands: mpsc::Receiver<Command>,
}

/// A sequence in the batch.
#[derive(Debug)]
struct Running {
    job: Box<Job>,
    sequence: Sequence,
    /// What is still to be prefilled; empty while decoding.
    context: VecDeque<u32>,
    /// Chosen but not yet in the cache.
    next: Option<u32>,
}

impl Scheduler {
    pub fn new(engine: Engine, slots: usize, metrics: Metrics) -> (Self, Handle) {
        let (sender, commands) = mpsc::channel(COMMANDS);
        let (occupancy, watched) = watch::channel(Occupancy::default());
        let scheduler = Self {
            engine,
            slots,
            metrics,
            waiting: VecDeque::new(),
            running: Vec::new(),
            draining: false,
            occupancy,
            commands,
        };
        (scheduler, Handle { commands: sender, occupancy: watched })
    }

    /// Works until every handle is gone. Blocks the thread.
    pub fn run(mut self) {
        loop {
            let idle = self.running.is_empty() && self.waiting.is_empty();
            let command = if idle { self.commands.blocking_recv() } else { self.commands.try_recv().ok() };
            match command {
                Some(command) => self.apply(command),
                None if idle => return,
                None => self.step(),
            }
        }
    }

    pub fn apply(&mut self, command: Command) {
        match command {
            Command::Submit(job) => self.submit(job),
            Command::Cancel { connection, request, choice } => self.remove(|job| {
                job.connection == connection && job.completion.request() == request && job.completion.choice() == choice
            }),
            Command::Disconnected(connection) => self.remove(|job| job.connection == connection),
            Command::Drain => self.drain(),
        }
        self.publish_occupancy();
    }

    /// Admits what there is room for, prefills a piece, decodes a token each.
    pub fn step(&mut self) {
        self.admit();
        self.prefill_one();
        self.decode_all();
        self.running.retain(|running| running.next.is_some() || !running.context.is_empty());
        self.remove(|job| job.replies.broken.is_cancelled());
        self.publish_occupancy();
    }

    fn submit(&mut self, mut job: Box<Job>) {
        if let Some(done) = job.completion.done() {
            return job.replies.send(done);
        }
        if self.draining {
            return job.fail(Code::Overloaded, "this worker is draining".to_owned());
        }
        let room = self.slots.saturating_sub(self.running.len()) + WAITING_PER_SLOT * self.slots;
        if self.waiting.len() >= room {
            return job.fail(Code::Overloaded, format!("{} requests are waiting already", self.waiting.len()));
        }
        self.waiting.push_back(job);
    }

    fn drain(&mut self) {
        self.draining = true;
        for job in self.waiting.drain(..) {
            job.fail(Code::Overloaded, "this worker is draining".to_owned());
        }
    }

    fn remove(&mut self, gone: impl Fn(&Job) -> bool) {
        self.waiting.retain(|job| !gone(job));
        self.running.retain(|running| !gone(&running.job));
    }

    fn admit(&mut self) {
        while self.running.len() < self.slots
            && let Some(job) = self.waiting.pop_front()
        {
            let context = job.prompt.iter().chain(job.completion.tokens()).copied().collect();
            self.running.push(Running { job, sequence: self.engine.sequence(), context, next: None });
        }
    }

    /// First come, first served.
    fn prefill_one(&mut self) {
        let Some(running) = self.running.iter_mut().find(|running| !running.context.is_empty()) else {
            return;
        };
        let length = running.context.len().min(PREFILL_TOKENS);
        let piece: Vec<u32> = running.context.drain(..length).collect();
        match self.engine.prefill(&mut running.sequence, &piece) {
            Ok(logits) if running.context.is_empty() => running.advance(&logits, &self.metrics),
            Ok(_) => {}
            Err(error) => running.fail(&error),
        }
    }

    fn decode_all(&mut self) {
        let mut batch: Vec<&mut Running> = self.running.iter_mut().filter(|running| running.next.is_some()).collect();
        if batch.is_empty() {
            return;
        }
        let timer = self.metrics.decode_seconds.start_timer();
        let tokens: Vec<u32> = batch.iter_mut().filter_map(|running| running.next.take()).collect();
        let mut sequences: Vec<&mut Sequence> = batch.iter_mut().map(|running| &mut running.sequence).collect();
        match self.engine.decode(&mut sequences, &tokens) {
            Ok(logits) => {
                for (row, running) in batch.into_iter().enumerate() {
                    running.advance(&logits.get(row as i64), &self.metrics);
                }
            }
            Err(error) => batch.into_iter().for_each(|running| running.fail(&error)),
        }
        timer.observe_duration();
    }

    fn publish_occupancy(&self) {
        let now = Occupancy { running: self.running.len(), waiting: self.waiting.len() };
        self.metrics.running.set(now.running as i64);
        self.metrics.waiting.set(now.waiting as i64);
        self.occupancy.send_if_modified(|before| std::mem::replace(before, now) != now);
    }
}

impl Running {
    /// Chooses the token that follows from `logits [V]`, tells the gateway, and goes on unless that
    /// was the end.
    fn advance(&mut self, logits: &tch::Tensor, metrics: &Metrics) {
        let values: Result<Vec<f32>, _> = logits.to_device(tch::Device::Cpu).try_into();
        let chosen = values.ok().and_then(|mut values| self.job.completion.choose(&mut values));
        let Some(token) = chosen else {
            return self.job.fail(Code::Internal, "the model produced no numbers; are its weights whole?".to_owned());
        };
        metrics.tokens.inc();
        if let Some(delta) = self.job.completion.accept(token) {
            self.job.replies.send(delta);
        }
        match self.job.completion.done() {
            Some(done) => self.job.replies.send(done),
            None => self.next = Some(token),
        }
    }

    fn fail(&mut self, error: &ModelError) {
        self.context.clear();
        self.job.fail(Code::Internal, error.to_string());
    }
}

impl Job {
    fn fail(&self, code: Code, message: String) {
        self.replies.send(failure(self.completion.request(), self.completion.choice(), code, message));
    }
}

/// The message that ends a request which cannot be served.
pub fn failure(request: &str, choice: u32, code: Code, message: String) -> Body {
    Body::Failure(Failure { request: request.to_owned(), choice, code: code.into(), message })
}

#[cfg(test)]
mod tests;
