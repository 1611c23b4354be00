//! Continuous batching (Yu et al. 2022, "Orca") over a paged cache: requests join and leave between
//! steps. One thread owns the engine, the blocks and every sequence; the rest of the process sends it
//! [`Command`]s. A step computes one token of every sequence that is being answered and, with the
//! tokens that are left of its budget, pieces of prompts (Agrawal et al. 2024, "Sarathi"), so that a
//! long prompt delays running streams by one piece only.
//!
//! Where the cache is full, the youngest sequence of the lowest priority gives its blocks back and is
//! computed again later.

mod sequence;
mod times;

use crate::blocks::BlockPool;
use crate::completion::Completion;
use crate::embedding::Embedder;
use crate::metrics::{Metrics, Vllm};
use crate::transcripts::Transcripts;
use sequence::Running;
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use times::Times;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use vicuna_model::inference::{Engine, Outputs, Piece};
use vicuna_protocol::inference::worker_message::Body;
use vicuna_protocol::inference::{
    CONTEXT_LENGTH_EXCEEDED, Failure, Generate, Progress, TranscriptChoice, WorkerMessage, failure::Code,
};

/// Tokens that a step computes, unless more sequences than that are being answered.
const STEP_TOKENS: usize = 256;
/// Requests that may wait for each slot; more are refused, for another worker.
const WAITING_PER_SLOT: usize = 4;
/// Commands on their way to the thread.
const COMMANDS: usize = 256;
/// Between two words about requests that send no tokens.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// Which gateway connection a request came by.
pub type Connection = u64;

#[derive(Debug)]
pub enum Command {
    Submit(Box<Job>),
    Cancel {
        connection: Connection,
        request: String,
        choice: u32,
        /// The client may come back for the rest.
        keep: bool,
    },
    /// The gateway is gone; it, or another one, asks elsewhere for what was running.
    Disconnected(Connection),
    /// What is known of a request.
    TranscriptOf {
        request: String,
        answer: oneshot::Sender<Vec<TranscriptChoice>>,
    },
    /// Take nothing new, give back what waits, finish what runs.
    Drain,
    /// Give back what runs, too.
    HandBack,
}

pub use times::Took;

/// A request, ready to run.
#[derive(Debug)]
pub struct Job {
    pub connection: Connection,
    /// Higher ones go first.
    pub priority: i32,
    /// Which of the engine's adapters computes it; `None`: the bare model.
    pub adapter: Option<usize>,
    pub task: Task,
    pub replies: Replies,
    times: Times,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "it lies in a boxed job")]
pub enum Task {
    Complete {
        prompt: Vec<u32>,
        completion: Completion,
        /// As it came in, for its transcript.
        generate: Box<Generate>,
    },
    Embed(Embedder),
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

/// Requests in the batch and before it, and room in the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Occupancy {
    pub running: usize,
    pub waiting: usize,
    pub free_tokens: usize,
    pub total_tokens: usize,
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

    /// Whether both are of one scheduler.
    pub fn is(&self, other: &Self) -> bool {
        self.commands.same_channel(&other.commands)
    }
}

#[derive(Debug)]
pub struct Scheduler {
    engine: Engine,
    outputs: Outputs,
    pool: BlockPool,
    slots: usize,
    metrics: Metrics,
    vllm: Vllm,
    /// Higher priorities first, then first come, first served.
    waiting: VecDeque<Box<Job>>,
    /// In the order in which they were admitted.
    running: Vec<Running>,
    transcripts: Transcripts,
    draining: bool,
    /// When progress was last told.
    told: Instant,
    occupancy: watch::Sender<Occupancy>,
    commands: mpsc::Receiver<Command>,
}

impl Scheduler {
    /// `model`: what its requests count as.
    pub fn new(model: &str, engine: Engine, slots: usize, metrics: Metrics) -> (Self, Handle) {
        let (sender, commands) = mpsc::channel(COMMANDS);
        let pool = BlockPool::new(engine.blocks());
        let empty =
            Occupancy { free_tokens: pool.free_tokens(), total_tokens: pool.total_tokens(), ..Occupancy::default() };
        let (occupancy, watched) = watch::channel(empty);
        let scheduler = Self {
            engine,
            outputs: Outputs::default(),
            pool,
            slots,
            vllm: metrics.of(model),
            metrics,
            waiting: VecDeque::new(),
            running: Vec::new(),
            transcripts: Transcripts::default(),
            draining: false,
            told: Instant::now(),
            occupancy,
            commands,
        };
        (scheduler, Handle { commands: sender, occupancy: watched })
    }

    /// Until the last [`Handle`] is gone.
    pub fn run(mut self) {
        while self.wait_for_work() {
            while let Ok(command) = self.commands.try_recv() {
                self.apply(command);
            }
            self.step();
        }
    }

    /// Sleeps while there is nothing to do; `false` at the end.
    fn wait_for_work(&mut self) -> bool {
        while self.running.is_empty() && self.waiting.is_empty() {
            match self.commands.blocking_recv() {
                Some(command) => self.apply(command),
                None => return false,
            }
        }
        true
    }

    pub fn apply(&mut self, command: Command) {
        match command {
            Command::Submit(job) => self.submit(job),
            Command::Cancel { connection, request, choice, keep } => {
                let is_it = |job: &Job| job.connection == connection && job.is(&request, choice);
                self.remove(is_it, keep);
            }
            Command::Disconnected(connection) => self.remove(|job| job.connection == connection, true),
            Command::TranscriptOf { request, answer } => self.tell_transcript(&request, answer),
            Command::Drain => self.drain(),
            Command::HandBack => self.hand_back(),
        }
        self.publish_occupancy();
    }

    /// Admits what there is room for and computes a piece of everything.
    pub fn step(&mut self) {
        self.admit();
        let batch = self.plan();
        if !batch.is_empty() {
            self.compute(&batch);
        }
        self.retire();
        self.remove(|job| job.replies.broken.is_cancelled(), true);
        self.tell_progress(Instant::now());
        self.publish_occupancy();
    }

    fn submit(&mut self, mut job: Box<Job>) {
        if let Some(done) = job.done() {
            return job.replies.send(done);
        }
        if self.draining {
            return job.fail(Code::Overloaded, "this worker is draining".to_owned());
        }
        let room = self.slots.saturating_sub(self.running.len()) + WAITING_PER_SLOT * self.slots;
        if self.waiting.len() >= room {
            return job.fail(Code::Overloaded, format!("{} requests are waiting already", self.waiting.len()));
        }
        let behind = self.waiting.iter().position(|other| other.priority < job.priority);
        self.waiting.insert(behind.unwrap_or(self.waiting.len()), job);
    }

    fn drain(&mut self) {
        self.draining = true;
        for job in self.waiting.drain(..) {
            job.fail(Code::Overloaded, "this worker is draining".to_owned());
        }
    }

    /// Their gateways have all tokens and continue them elsewhere.
    fn hand_back(&mut self) {
        self.drain();
        for mut running in self.running.drain(..) {
            running.release(&mut self.pool);
            running.fail(Code::Overloaded, "this worker leaves".to_owned());
        }
    }

    /// Takes requests out; with `keep` their transcripts stay for a while.
    fn remove(&mut self, gone: impl Fn(&Job) -> bool, keep: bool) {
        if !self.running.iter().map(|running| &running.job).chain(&self.waiting).any(|job| gone(job)) {
            return;
        }
        let (waiting, staying): (VecDeque<_>, _) = self.waiting.drain(..).partition(|job| gone(job));
        self.waiting = staying;
        let running: Vec<Running> = self.running.extract_if(.., |running| gone(&running.job)).collect();
        let running = running.into_iter().map(|mut running| {
            running.release(&mut self.pool);
            running.job
        });
        let now = Instant::now();
        for job in waiting.into_iter().chain(running) {
            if let Task::Complete { completion, generate, .. } = job.task {
                self.vllm.aborted();
                if keep {
                    self.transcripts.keep(completion.transcript(*generate), now);
                }
            }
        }
    }

    fn tell_transcript(&mut self, request: &str, answer: oneshot::Sender<Vec<TranscriptChoice>>) {
        if answer.send(self.transcripts.of(request, Instant::now())).is_err() {
            tracing::debug!(request, "nobody waits for the transcript any more");
        }
    }

    /// A gateway that hears nothing of a request takes it away; a long prompt takes its time.
    fn tell_progress(&mut self, now: Instant) {
        if now.duration_since(self.told) >= PROGRESS_EVERY {
            self.told = now;
            self.running.iter().for_each(Running::tell_progress);
            self.waiting.iter().for_each(|job| job.tell_progress(0, 0));
        }
    }

    /// As many as have a slot, and room for what they hold so far.
    fn admit(&mut self) {
        let promised: usize = self.running.iter().map(Running::missing_blocks).sum();
        let mut room = self.pool.available().saturating_sub(promised);
        while self.running.len() < self.slots
            && let Some(job) = self.waiting.pop_front()
        {
            let mut running = Running::new(job);
            let needed = running.missing_blocks();
            if needed > room && !self.running.is_empty() {
                return self.waiting.push_front(running.job);
            }
            room = room.saturating_sub(needed);
            running.job.times.admitted(Instant::now());
            self.running.push(running);
        }
    }

    /// Which sequences compute how many tokens: those that are being answered one each, then prompts
    /// in the order of their admission. All have the blocks that they need for it.
    fn plan(&mut self) -> Vec<Share> {
        let mut shares = Vec::with_capacity(self.running.len());
        let mut budget = STEP_TOKENS;
        for answered in [true, false] {
            let mut index = 0;
            while index < self.running.len() {
                let tokens = match self.running[index].is_answered() {
                    is if is != answered => 0,
                    true => 1,
                    false => self.prompt_tokens(index, budget, &shares),
                };
                if tokens > 0 {
                    let Some(at) = self.make_room(index, tokens, &mut shares) else {
                        // Itself was the youngest, and waits again.
                        continue;
                    };
                    index = at;
                    budget = budget.saturating_sub(tokens);
                    shares.push(Share { sequence: at, tokens });
                }
                index += 1;
            }
        }
        shares
    }

    /// How much of its prompt a sequence computes with this budget; none if it gains more by letting
    /// one of `shares` go first.
    fn prompt_tokens(&mut self, index: usize, budget: usize, shares: &[Share]) -> usize {
        let gained = self.running[index].reuse(&mut self.pool);
        self.metrics.cached_tokens.inc_by(gained as u64);
        let running = &self.running[index];
        let waits = |share: &Share| running.gains_by_waiting(&self.running[share.sequence], share.tokens);
        if shares.iter().any(waits) { 0 } else { running.pending().min(budget) }
    }

    /// Takes blocks for the next `tokens` of a sequence, from the youngest ones if there are none left.
    /// Returns where the sequence is afterwards, or `None` if it had to give up its own.
    fn make_room(&mut self, mut index: usize, tokens: usize, shares: &mut Vec<Share>) -> Option<usize> {
        while !self.running[index].take_blocks(tokens, &mut self.pool) {
            let victim = self.youngest()?;
            self.preempt(victim, shares);
            match victim.cmp(&index) {
                std::cmp::Ordering::Less => index -= 1,
                std::cmp::Ordering::Equal => return None,
                std::cmp::Ordering::Greater => {}
            }
        }
        Some(index)
    }

    /// Of the lowest priority, the one admitted last.
    fn youngest(&self) -> Option<usize> {
        let priority = |index: &usize| self.running[*index].job.priority;
        (0..self.running.len()).rev().min_by_key(priority)
    }

    /// Back to the queue; what it has said stays said.
    fn preempt(&mut self, victim: usize, shares: &mut Vec<Share>) {
        let mut running = self.running.remove(victim);
        running.release(&mut self.pool);
        running.tell_all();
        self.metrics.preemptions.inc();
        self.vllm.preemptions.inc();
        shares.retain(|share| share.sequence != victim);
        shares.iter_mut().filter(|share| share.sequence > victim).for_each(|share| share.sequence -= 1);
        let mut job = running.job;
        job.restart();
        let before = self.waiting.iter().position(|other| other.priority <= job.priority);
        self.waiting.insert(before.unwrap_or(self.waiting.len()), job);
    }

    fn compute(&mut self, shares: &[Share]) {
        let started = Instant::now();
        let pieces: Vec<Piece<'_>> =
            shares.iter().map(|share| self.running[share.sequence].piece(share.tokens)).collect();
        let outcome = self.engine.step(&pieces, &mut self.outputs);
        let answered = pieces.iter().any(|piece| piece.past > 0 && piece.tokens.len() == 1);
        drop(pieces);
        let counts = Counts { all: &self.metrics, model: &self.vllm };
        for (piece, share) in shares.iter().enumerate() {
            let running = &mut self.running[share.sequence];
            match &outcome {
                Ok(()) => running.advance(share.tokens, piece, &mut self.outputs, &mut self.pool, &counts),
                Err(error) => running.fail(Code::Internal, error.to_string()),
            }
        }
        // All of the step at once, so that it travels together.
        shares.iter().for_each(|share| self.running[share.sequence].tell());
        self.vllm.step_tokens.observe(shares.iter().map(|share| share.tokens).sum::<usize>() as f64);
        if answered {
            self.metrics.decode_seconds.observe(started.elapsed().as_secs_f64());
        }
    }

    /// Lets go of what has ended. A gateway that was lost before it read the end may be asked for it.
    fn retire(&mut self) {
        let now = Instant::now();
        let ended: Vec<Running> = self.running.extract_if(.., |running| running.ended).collect();
        for mut running in ended {
            running.release(&mut self.pool);
            let took = running.job.times.took(now);
            if let Task::Complete { completion, generate, .. } = running.job.task {
                let transcript = completion.transcript(*generate);
                if !transcript.finish_reason.is_empty() {
                    self.vllm.answered(&transcript.finish_reason, &took, transcript.prompt_tokens);
                }
                self.transcripts.keep(transcript, now);
            }
        }
    }

    fn publish_occupancy(&self) {
        let now = Occupancy {
            running: self.running.len(),
            waiting: self.waiting.len(),
            free_tokens: self.pool.free_tokens(),
            total_tokens: self.pool.total_tokens(),
        };
        self.metrics.running.set(now.running as i64);
        self.metrics.waiting.set(now.waiting as i64);
        self.metrics.free_tokens.set(now.free_tokens as i64);
        self.vllm.requests_running.set(now.running as i64);
        self.vllm.requests_waiting.set(now.waiting as i64);
        self.vllm.cache_usage.set(1.0 - now.free_tokens as f64 / now.total_tokens.max(1) as f64);
        self.occupancy.send_if_modified(|before| std::mem::replace(before, now) != now);
    }
}

/// Where what a step has done is counted.
#[derive(Clone, Copy, Debug)]
struct Counts<'a> {
    all: &'a Metrics,
    model: &'a Vllm,
}

/// What a sequence computes in a step.
#[derive(Clone, Copy, Debug)]
struct Share {
    /// Its place among those that run.
    sequence: usize,
    tokens: usize,
}

impl Job {
    pub fn new(connection: Connection, priority: i32, adapter: Option<usize>, task: Task, replies: Replies) -> Self {
        Self { connection, priority, adapter, task, replies, times: Times::arrived(Instant::now()) }
    }

    fn is(&self, request: &str, choice: u32) -> bool {
        self.request() == request && self.choice() == choice
    }

    fn request(&self) -> &str {
        match &self.task {
            Task::Complete { completion, .. } => completion.request(),
            Task::Embed(embedder) => embedder.request(),
        }
    }

    fn choice(&self) -> u32 {
        match &self.task {
            Task::Complete { completion, .. } => completion.choice(),
            Task::Embed(_) => 0,
        }
    }

    /// Its last message, if it has ended.
    fn done(&mut self) -> Option<Body> {
        match &mut self.task {
            Task::Complete { completion, .. } => completion.done(),
            Task::Embed(embedder) => embedder.done(),
        }
    }

    /// Its tokens will be computed again.
    fn restart(&mut self) {
        match &mut self.task {
            Task::Complete { completion, .. } => completion.restart(),
            Task::Embed(embedder) => embedder.restart(),
        }
    }

    /// Tokens of what it begins with that are computed, of all; none while it waits.
    fn tell_progress(&self, computed: usize, all: usize) {
        // Who asks for embeddings waits for the answer only.
        if matches!(self.task, Task::Complete { .. }) {
            self.replies.send(Body::Progress(Progress {
                request: self.request().to_owned(),
                choice: self.choice(),
                computed: computed as u32,
                all: all as u32,
            }));
        }
    }

    fn fail(&self, code: Code, message: String) {
        self.replies.send(failure(self.request(), self.choice(), code, message));
    }
}

/// The message that ends a request which cannot be served.
pub fn failure(request: &str, choice: u32, code: Code, message: String) -> Body {
    Body::Failure(Failure { request: request.to_owned(), choice, code: code.into(), message, reason: String::new() })
}

/// A request that is not taken: mostly the client's mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: Code,
    pub message: String,
    /// Its prompt leaves no room for an answer.
    pub too_long: bool,
}

impl From<String> for Refusal {
    fn from(message: String) -> Self {
        Self { code: Code::Invalid, message, too_long: false }
    }
}

impl Refusal {
    pub fn body(self, request: &str, choice: u32) -> Body {
        let reason = if self.too_long { CONTEXT_LENGTH_EXCEEDED } else { "" };
        Body::Failure(Failure {
            request: request.to_owned(),
            choice,
            code: self.code.into(),
            message: self.message,
            reason: reason.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests;
