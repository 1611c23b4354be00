//! The life of a rank: hears the coordinator, prepares, runs one generation after another.
//!
//! Whatever happens outside (no store, no data, lost peers, no coordinator) the rank says so, keeps
//! what it has, and goes on when the cause is gone. It ends only when it is sent home, when it is
//! terminated, or when going on makes no sense; then its exit code tells the cause.

use crate::checkpoint::Published;
use crate::collective::tcp::{Membership, Peer};
use crate::collective::{CollectiveError, Network};
use crate::coordinator::Link;
use crate::evaluation::{Evaluation, Stage};
use crate::generation::{self, Assignment, Control, GenerationError, Observer, Outcome, Start};
use crate::http::Status;
use crate::memory::Need;
use crate::memory::limits::limits;
use crate::memory::remedies::Remedy;
use crate::prepare::{self, Place, Session, Trouble};
use crate::step::{Engine, StepReport};
use crate::transfer;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use vicuna_checkpoint::{ManifestRef, StoreError};
use vicuna_protocol::coordinator::coordinator_message::Body as Heard;
use vicuna_protocol::coordinator::form::Purpose;
use vicuna_protocol::coordinator::rank_message::Body;
use vicuna_protocol::coordinator::{self as wire, Cause};
use vicuna_protocol::job::TrainingJob;

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(20);
/// An unplanned stop is to be answered within 5 s.
const LISTING_LIMIT: Duration = Duration::from_secs(2);
const FLUSH_LIMIT: Duration = Duration::from_secs(3);
const JOIN_LIMIT: Duration = Duration::from_secs(20);
/// How long a terminated rank that has left its generation waits to be sent home.
const AFTER_DRAIN: Duration = Duration::from_secs(10);

/// What a rank is made of, besides the job.
pub struct Parts {
    pub link: Link,
    pub inbox: mpsc::Receiver<Heard>,
    pub network: Arc<Network>,
    pub place: Place,
    pub status: Status,
    /// From SIGTERM to SIGKILL.
    pub grace: Duration,
}

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Done,
    Failed(Cause),
}

impl Exit {
    /// 0, or 20 and above by cause.
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed(cause) => 20 + cause as u8,
        }
    }
}

struct Life {
    link: Link,
    network: Arc<Network>,
    place: Place,
    status: Status,
    grace: Duration,
    session: Option<Arc<Session>>,
    preparing: Option<tokio::task::JoinHandle<Session>>,
    current: Option<Current>,
    /// What the last generation came to, for the next one to go on from.
    memory: Option<Engine>,
    /// Manifests that this rank has seen, newest first.
    manifests: Vec<ManifestRef>,
    /// When a terminated rank ends at the latest, and when it is killed.
    ends_at: Option<Instant>,
    killed_at: Option<Instant>,
}

/// The generation that the rank is or was last in.
struct Current {
    generation: u64,
    control: Control,
    thread: Option<JoinHandle<()>>,
    ended: Option<oneshot::Receiver<Ending>>,
    step: Arc<AtomicU64>,
    /// It makes steps; else it is over once it has formed, and the coordinator says so.
    trains: bool,
    /// The coordinator waits to hear that it has ended.
    stopping: bool,
    /// … and somebody is about to go.
    hurried: bool,
}

struct Ending {
    /// `Err`: a panic's words.
    outcome: Result<Result<Outcome, GenerationError>, String>,
    memory: Option<Engine>,
}

/// What to do with the process.
enum Next {
    Live,
    End(Exit),
}

/// Lives until the end; `terminated` resolves at SIGTERM.
pub async fn live(parts: Parts, terminated: impl Future<Output = ()>) -> Exit {
    let Parts { link, mut inbox, network, place, status, grace } = parts;
    let mut life = Life {
        link,
        network,
        place,
        status,
        grace,
        session: None,
        preparing: None,
        current: None,
        memory: None,
        manifests: Vec::new(),
        ends_at: None,
        killed_at: None,
    };
    let mut terminated = std::pin::pin!(terminated);
    let mut is_terminated = false;
    loop {
        let ends_at = life.ends_at.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
        let next = tokio::select! {
            Some(body) = inbox.recv() => life.hear(body).await,
            session = prepared(&mut life.preparing) => life.prepared(session).await,
            ending = ended(&mut life.current) => life.ended(ending).await,
            () = &mut terminated, if !is_terminated => {
                is_terminated = true;
                life.terminate().await
            }
            () = tokio::time::sleep_until(ends_at), if life.ends_at.is_some() => Next::End(Exit::Done),
        };
        if let Next::End(exit) = next {
            life.leave();
            life.link.flush(FLUSH_LIMIT).await;
            join(life.former_thread()).await;
            return exit;
        }
    }
}

/// libtorch does not survive that the process ends under a running backward pass.
async fn join(thread: Option<JoinHandle<()>>) {
    if let Some(thread) = thread {
        let joined = tokio::task::spawn_blocking(move || drop(thread.join()));
        drop(tokio::time::timeout(JOIN_LIMIT, joined).await);
    }
}

/// The session once it is there; for ever pending when nothing is being prepared.
async fn prepared(preparing: &mut Option<tokio::task::JoinHandle<Session>>) -> Result<Session, tokio::task::JoinError> {
    match preparing {
        Some(task) => {
            let session = task.await;
            *preparing = None;
            session
        }
        None => std::future::pending().await,
    }
}

async fn ended(current: &mut Option<Current>) -> Ending {
    let Some(ended) = current.as_mut().and_then(|current| current.ended.as_mut()) else {
        return std::future::pending().await;
    };
    let gone = |_| Ending { outcome: Err("its thread is gone".to_owned()), memory: None };
    let ending = ended.await.unwrap_or_else(gone);
    if let Some(current) = current {
        current.ended = None;
    }
    ending
}

impl Life {
    async fn hear(&mut self, body: Heard) -> Next {
        match body {
            Heard::Welcome(welcome) => return self.welcome(&welcome.job),
            Heard::Form(form) => self.form(form),
            Heard::Go(go) => {
                if let Some(current) = self.in_generation(go.generation) {
                    current.control.go.cancel();
                }
            }
            Heard::Stop(stop) => self.stop(&stop).await,
            Heard::Stale(stale) => {
                tracing::warn!(generation = stale.generation, "this rank's generation is over; starting anew");
                self.leave();
                if let Some(current) = &mut self.current {
                    // Of a record that was lost, the next one may count anew.
                    current.generation = 0;
                }
                self.memory = None;
                self.link.start_over();
            }
            Heard::Noticed(noticed) => {
                let wire::Noticed { pod_name, node, source, time_left_ms } = noticed;
                tracing::warn!(pod = pod_name, node, source, time_left_ms, "a rank is given notice");
                self.status.metrics.notices.inc();
            }
            Heard::Shutdown(shutdown) => {
                tracing::info!(why = shutdown.why().as_str_name(), "sent home");
                return Next::End(Exit::Done);
            }
        }
        Next::Live
    }

    fn in_generation(&mut self, generation: u64) -> Option<&mut Current> {
        self.current.as_mut().filter(|current| current.generation == generation)
    }

    fn welcome(&mut self, job: &str) -> Next {
        if self.session.is_some() || self.preparing.is_some() {
            return Next::Live;
        }
        let job: TrainingJob = match serde_json::from_str(job) {
            Ok(job) => job,
            Err(error) => {
                let message =
                    format!("the coordinator's job cannot be read ({error}): are operator and trainer of one release?");
                return self.fail(Cause::Application, message);
            }
        };
        tracing::info!(namespace = job.namespace, name = job.name, "welcome");
        let (link, place) = (self.link.clone(), self.place.clone());
        self.preparing = Some(tokio::spawn(prepare_until_done(job, place, link)));
        Next::Live
    }

    async fn prepared(&mut self, session: Result<Session, tokio::task::JoinError>) -> Next {
        let session = match session {
            Ok(session) => Arc::new(session),
            Err(error) => return self.fail(Cause::Application, error.to_string()),
        };
        self.session = Some(session.clone());
        self.list().await;
        self.status.ready.store(true, Ordering::Relaxed);
        self.link.say(Body::Prepared(wire::Prepared {
            blocks: session.table.blocks.len() as u32,
            manifests: self.manifests.iter().map(to_wire).collect(),
            micro_batches: session.micro_batches(),
            steps: session.data.steps(),
            state_bytes: session.table.state_bytes(),
        }));
        Next::Live
    }

    /// Looks what the store has; what was known stays if it cannot be asked in time.
    async fn list(&mut self) {
        let Some(session) = &self.session else { return };
        match tokio::time::timeout(LISTING_LIMIT, session.manifests()).await {
            Ok(Ok(manifests)) => self.manifests = manifests,
            Ok(Err(error)) => tracing::warn!(%error, "checkpoints could not be listed"),
            Err(_) => tracing::warn!("checkpoints could not be listed in time"),
        }
    }

    fn form(&mut self, form: wire::Form) {
        let Some(session) = self.session.clone() else {
            tracing::warn!(generation = form.generation, "called up before anything is prepared");
            return;
        };
        if self.current.as_ref().is_some_and(|current| current.generation >= form.generation) {
            return;
        }
        let generation = form.generation;
        let Some(assignment) = assignment(form) else {
            tracing::error!(generation, "the call-up is malformed");
            return;
        };
        self.leave();
        // It is needed once more.
        self.ends_at = self.killed_at;
        let former = self.former_thread();
        self.link.enter(generation, assignment.start.step());
        self.status.metrics.generation.set(generation as i64);
        let purpose = assignment.purpose.as_str_name();
        tracing::info!(generation, rank = assignment.membership.rank, purpose, "called up");
        self.current = Some(self.start(session, assignment, Control::default(), former));
    }

    fn start(
        &mut self,
        session: Arc<Session>,
        assignment: Assignment,
        control: Control,
        former: Option<JoinHandle<()>>,
    ) -> Current {
        let step = Arc::new(AtomicU64::new(assignment.start.step()));
        let generation = assignment.membership.generation;
        let observer: Arc<dyn Observer> = Arc::new(Reporter {
            link: self.link.clone(),
            status: self.status.clone(),
            session: session.clone(),
            generation,
            rank: assignment.membership.rank,
            step: step.clone(),
            control: control.clone(),
        });
        let trains = assignment.purpose == Purpose::Train;
        let (end, ended) = oneshot::channel();
        let (network, steering) = (self.network.clone(), control.clone());
        let mut memory = self.memory.take();
        let thread = std::thread::spawn(move || {
            // Its memory is needed.
            drop(former.map(JoinHandle::join));
            let run = || generation::run(&session, &network, &assignment, &steering, &observer, &mut memory);
            let outcome = catch_unwind(AssertUnwindSafe(run)).map_err(|panic| words(&*panic));
            // Nobody listens when the rank is ending.
            drop(end.send(Ending { outcome, memory }));
        });
        let (thread, ended) = (Some(thread), Some(ended));
        Current { generation, control, thread, ended, step, trains, stopping: false, hurried: false }
    }

    /// Gives the present generation up; its thread ends soon, without being heard.
    fn leave(&mut self) {
        if let Some(current) = &mut self.current {
            current.control.abort.cancel();
            current.ended = None;
        }
    }

    /// The thread of the generation that was given up, to be waited for.
    fn former_thread(&mut self) -> Option<JoinHandle<()>> {
        self.current.as_mut()?.thread.take()
    }

    /// The answer is given once the generation has ended, since only then it is known what is in memory.
    async fn stop(&mut self, stop: &wire::Stop) {
        let wire::Stop { generation, planned, reason, leaves, checkpoint, time_left_ms, .. } = stop;
        tracing::info!(generation, planned, reason, leaves, checkpoint, time_left_ms, "stop");
        let running = self.in_generation(*generation).filter(|current| current.ended.is_some());
        let Some(current) = running else {
            if *time_left_ms == 0 {
                self.list().await;
            }
            return self.say_stopped(*generation, Vec::new());
        };
        current.stopping = true;
        current.hurried = *time_left_ms > 0;
        if !planned {
            current.control.abort.cancel();
            return;
        }
        if *leaves {
            current.control.leave.cancel();
        }
        if *time_left_ms > 0 {
            let gone_at = Instant::now() + Duration::from_millis(*time_left_ms);
            // Of several stops the first one counts.
            current.control.gone_at.get_or_init(|| gone_at.into_std());
        }
        if *checkpoint {
            current.control.save.cancel();
        }
        current.control.stop.cancel();
        if *time_left_ms > 0 {
            tokio::spawn(give_up_in_time(current.control.clone(), stop.clone()));
        }
    }

    fn say_stopped(&mut self, generation: u64, lost: Vec<String>) {
        let ran = self.in_generation(generation).map_or(0, |current| current.step.load(Ordering::Relaxed));
        let holding = self.session.as_ref().zip(self.memory.as_ref()).map(|(session, engine)| {
            let last = engine.last.as_ref().map(|report| progress(session, generation, report, generation::Next::End));
            wire::Holding { last, ..transfer::holding(engine, &session.data) }
        });
        self.link.say(Body::Stopped(wire::Stopped {
            generation,
            step: holding.as_ref().map_or(ran, |holding| holding.step),
            manifests: self.manifests.iter().map(to_wire).collect(),
            holding,
            lost,
        }));
        if self.ends_at.is_some() {
            let soon = Instant::now() + AFTER_DRAIN;
            self.ends_at = self.ends_at.map(|at| at.min(soon));
        }
    }

    async fn ended(&mut self, ending: Ending) -> Next {
        let Some(generation) = self.current.as_ref().map(|current| current.generation) else {
            return Next::Live;
        };
        self.memory = ending.memory;
        match ending.outcome {
            Ok(Ok(Outcome::Stopped { step, manifest })) => {
                tracing::info!(generation, step, "generation ended");
                self.learn(manifest);
                self.say_stopped(generation, Vec::new());
            }
            Ok(Ok(Outcome::Complete { step, manifest, result })) => {
                self.learn(manifest);
                tracing::info!(generation, step, "every step is done");
                if let Some(result) = result {
                    let (uri, digest, loss) = (result.uri, result.digest, result.loss);
                    self.link.say(Body::Finished(wire::Finished { generation, step, uri, digest, loss }));
                }
            }
            Ok(Err(error)) => return self.broke(generation, error).await,
            Err(panic) => {
                let cause = if is_out_of_memory(&panic) { Cause::OutOfMemory } else { Cause::Application };
                return self.fail(cause, panic);
            }
        }
        Next::Live
    }

    fn learn(&mut self, manifest: Option<ManifestRef>) {
        if let Some(manifest) = manifest.filter(|manifest| !self.manifests.contains(manifest)) {
            self.manifests.insert(0, manifest);
            self.manifests.truncate(prepare::MANIFESTS);
        }
    }

    async fn broke(&mut self, generation: u64, error: GenerationError) -> Next {
        match error {
            GenerationError::Collective(CollectiveError::Aborted) => {
                let Some(current) = self.in_generation(generation).filter(|current| current.stopping) else {
                    return Next::Live;
                };
                // The store may be slow, and what is in memory is what counts.
                if !current.hurried {
                    self.list().await;
                }
                self.say_stopped(generation, Vec::new());
            }
            GenerationError::Collective(_) | GenerationError::Checkpoint(_) => {
                tracing::warn!(generation, %error, "the generation broke; waiting for the coordinator");
                let current = self.in_generation(generation);
                let (ordered, hurried) = current.map_or((false, false), |current| {
                    (current.stopping && current.control.abort.is_cancelled(), current.hurried)
                });
                if !hurried {
                    self.list().await;
                }
                let lost = match &error {
                    // Those who were told to end at once close their connections.
                    GenerationError::Collective(error) if !ordered => error.lost_peer().map(str::to_owned),
                    _ => None,
                };
                self.say_stopped(generation, lost.into_iter().collect());
            }
            GenerationError::Load { manifest, message } => {
                tracing::error!(generation, message, "the checkpoint cannot be loaded");
                let manifest = Some(to_wire(&manifest));
                self.link.say(Body::LoadFailed(wire::LoadFailed { generation, manifest, message }));
            }
            GenerationError::Numerics { .. } => return self.fail(Cause::Numerics, error.to_string()),
            GenerationError::Inputs(Trouble { cause, message }) => return self.fail(cause, message),
            GenerationError::Model(_) => return self.fail(Cause::Model, error.to_string()),
            GenerationError::Torch(_) => {
                let message = error.to_string();
                let cause = if is_out_of_memory(&message) { Cause::OutOfMemory } else { Cause::Application };
                return self.fail(cause, message);
            }
        }
        Next::Live
    }

    fn fail(&mut self, cause: Cause, message: String) -> Next {
        tracing::error!(cause = cause.as_str_name(), message, "this rank cannot go on");
        let step = self.current.as_ref().map_or(0, |current| current.step.load(Ordering::Relaxed));
        self.link.say(Body::Failed(wire::Failed { cause: cause.into(), message, step }));
        Next::End(Exit::Failed(cause))
    }

    /// SIGTERM: tells the coordinator and, through the next step's commit, the peers.
    async fn terminate(&mut self) -> Next {
        let time_left_ms = self.grace.as_millis() as u64;
        tracing::warn!(grace_seconds = self.grace.as_secs(), "terminated");
        self.link.say(Body::Notice(wire::Notice { source: "SIGTERM".to_owned(), time_left_ms, ..Default::default() }));
        let running = self.current.as_ref().filter(|current| current.ended.is_some());
        match running {
            Some(current) if current.trains => {
                current.control.leave.cancel();
                current.control.stop.cancel();
            }
            // Others may be amid taking what it holds; it is over soon.
            Some(_) => {}
            // Others may yet need what it holds.
            None if self.memory.is_some() => {}
            None => return Next::End(Exit::Done),
        }
        self.killed_at = Some(Instant::now() + self.grace);
        self.ends_at = self.killed_at;
        Next::Live
    }
}

/// Ends a planned stop that does not come to its end before the first rank is gone, and a step that leaves no time for what
/// comes after it. The generation is told to end at once; what it held stays.
async fn give_up_in_time(control: Control, stop: wire::Stop) {
    let (step, all) = (Duration::from_millis(stop.step_time_ms), Duration::from_millis(stop.time_left_ms));
    tokio::time::sleep(step.min(all)).await;
    if control.parting.is_cancelled() {
        tokio::time::sleep(all.saturating_sub(step)).await;
    }
    control.abort.cancel();
}

/// Tries until everything is in reach, and says what is missing meanwhile.
async fn prepare_until_done(job: TrainingJob, place: Place, link: Link) -> Session {
    let mut pause = FIRST_PAUSE;
    loop {
        let Trouble { cause, message } = match prepare_once(&job, &place, &link).await {
            Ok(session) => return session,
            Err(trouble) => trouble,
        };
        tracing::warn!(cause = cause.as_str_name(), message, "blocked");
        link.say(Body::Blocked(wire::Blocked { cause: cause.into(), message, behind: false }));
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.75..1.25))).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Says what the training needs in memory, and fetches nothing that cannot fit.
async fn prepare_once(job: &TrainingJob, place: &Place, link: &Link) -> Result<Session, Trouble> {
    let limits = limits(place.device);
    if let Some(estimate) = prepare::preflight(job, place.device, limits).await? {
        let need = |need: &Need| wire::estimated::Need {
            ranks: need.ranks,
            host_bytes: need.host,
            device_bytes: need.device,
            fits: need.fits(limits),
        };
        let remedy = |remedy: &Remedy| wire::estimated::Remedy { settings: remedy.to_string(), ranks: remedy.ranks };
        let needs = estimate.needs.iter().map(need).collect();
        let remedies = estimate.remedies.iter().map(remedy).collect();
        link.say(Body::Estimated(wire::Estimated { needs, remedies }));
        prepare::refuse_what_does_not_fit(job, &estimate, limits)?;
    }
    prepare::prepare(job.clone(), place.clone()).await
}

/// `None`: it contradicts itself.
fn assignment(form: wire::Form) -> Option<Assignment> {
    let rank = form.rank as usize;
    let purpose = form.purpose();
    let nodes: Vec<String> = form.members.iter().map(|member| member.node.clone()).collect();
    let leaves = form.members.iter().map(|member| member.leaves).collect();
    let members = form.members.into_iter();
    let members: Vec<Peer> = members.map(|member| Peer { name: member.pod_name, address: member.address }).collect();
    let key = form.key.try_into().ok()?;
    let start = match (form.memory, form.base) {
        (Some(base), None) if base.holdings.len() == members.len() => Start::Memory { step: form.base_step, base },
        (None, Some(base)) => Start::Manifest(from_wire(base)),
        (None, None) => Start::Model,
        _ => return None,
    };
    (rank < members.len()).then_some(Assignment {
        membership: Membership { generation: form.generation, rank, members, key },
        nodes,
        start,
        purpose,
        leaves,
        canary: form.canary,
        between_interruptions: Duration::from_millis(form.between_interruptions_ms),
    })
}

fn to_wire(manifest: &ManifestRef) -> wire::ManifestRef {
    let ManifestRef { step, generation, key, digest, numerics_class } = manifest.clone();
    wire::ManifestRef { step, generation, key, digest, numerics_class }
}

fn from_wire(manifest: wire::ManifestRef) -> ManifestRef {
    let wire::ManifestRef { step, generation, key, digest, numerics_class } = manifest;
    ManifestRef { step, generation, key, digest, numerics_class }
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("an unexpected failure").to_owned()
}

/// libtorch reports an allocation that failed in words only.
fn is_out_of_memory(message: &str) -> bool {
    ["out of memory", "not enough memory", "can't allocate memory"].iter().any(|words| message.contains(words))
}

fn progress(session: &Session, generation: u64, report: &StepReport, next: generation::Next) -> wire::Progress {
    use wire::progress::Next;
    wire::Progress {
        generation,
        step: report.step,
        steps: session.data.steps(),
        epoch: session.data.epochs_done(report.step),
        loss: report.loss,
        learning_rate: report.learning_rate,
        gradient_norm: report.norm,
        tokens: report.tokens,
        step_seconds: report.duration.as_secs_f64(),
        communication_seconds: report.communication.as_secs_f64(),
        last_of_generation: next == generation::Next::End,
        updated: report.updated,
        next: match next {
            generation::Next::Step => Next::Step,
            generation::Next::Pause => Next::Pause,
            generation::Next::End => Next::Unspecified,
        }
        .into(),
    }
}

/// Passes what happens in a generation on.
struct Reporter {
    link: Link,
    status: Status,
    session: Arc<Session>,
    generation: u64,
    rank: usize,
    step: Arc<AtomicU64>,
    control: Control,
}

impl Reporter {
    /// Nothing is said of a generation that was left.
    fn say(&self, body: Body) {
        if !self.control.abort.is_cancelled() {
            self.link.say(body);
        }
    }
}

impl Observer for Reporter {
    fn ready(&self, state_digest: &str) {
        let state_digest = state_digest.to_owned();
        self.say(Body::Ready(wire::Ready { generation: self.generation, state_digest }));
    }

    fn stepped(&self, report: &StepReport, next: generation::Next) {
        self.step.store(report.step, Ordering::Relaxed);
        self.status.metrics.stepped(report);
        let seconds = report.duration.as_secs_f64();
        tracing::info!(step = report.step, loss = report.loss, seconds, tokens = report.tokens, "step");
        self.say(Body::Progress(progress(&self.session, self.generation, report, next)));
    }

    fn parting(&self, last: Option<&StepReport>) {
        if let Some(report) = last {
            self.say(Body::Progress(progress(&self.session, self.generation, report, generation::Next::End)));
        }
    }

    fn evaluating(&self, stage: Stage) {
        let Stage { step, done, total } = stage;
        self.say(Body::Evaluated(wire::Evaluated { generation: self.generation, step, done, total, loss: None }));
    }

    fn evaluated(&self, evaluation: &Evaluation) {
        let Evaluation { step, loss, duration } = *evaluation;
        self.status.metrics.evaluated(evaluation);
        tracing::info!(step, loss, seconds = duration.as_secs_f64(), "held-out loss");
        let (generation, loss) = (self.generation, Some(loss));
        self.say(Body::Evaluated(wire::Evaluated { generation, step, done: 0, total: 0, loss }));
    }

    fn checkpointed(&self, published: &Published) {
        self.status.metrics.checkpointed(published);
        if self.rank != 0 {
            return;
        }
        let (step, upload_seconds) = (published.manifest.step, published.upload.as_secs_f64());
        tracing::info!(
            step,
            stall_seconds = published.stall.as_secs_f64(),
            upload_seconds,
            uri = published.uri,
            "checkpoint written"
        );
        self.say(Body::Checkpointed(wire::Checkpointed {
            generation: self.generation,
            manifest: Some(to_wire(&published.manifest)),
            uri: published.uri.clone(),
            bytes_written: published.bytes_written,
            stall_seconds: published.stall.as_secs_f64(),
            upload_seconds,
            interval_seconds: published.interval.as_secs_f64(),
        }));
    }

    fn blocked(&self, error: &StoreError) {
        let message = error.to_string();
        self.say(Body::Blocked(wire::Blocked { cause: Cause::Store.into(), message, behind: false }));
    }

    fn held_up(&self, error: &StoreError) {
        let message = error.to_string();
        tracing::warn!(message, "the checkpoint behind the training waits for the store");
        self.say(Body::Blocked(wire::Blocked { cause: Cause::Store.into(), message, behind: true }));
    }
}
