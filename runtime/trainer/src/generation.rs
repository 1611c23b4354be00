//! One generation on one rank: connect, load, get ready, run steps, leave.
//!
//! Blocks its thread; the rank's life ([`crate::rank`]) goes on beside it and steers it through
//! [`Control`].

use crate::checkpoint::{self, CheckpointError, Progress, Published, Publisher, Snapshot};
use crate::collective::tcp::Membership;
use crate::collective::{Collective, CollectiveError, Mesh, Network};
use crate::evaluation::{self, Evaluation, Pass, Stage};
use crate::inputs;
use crate::interval;
use crate::layout::{Holders, Layout};
use crate::log::scribe::{Part, Scribe};
use crate::log::{self, Log};
use crate::memory::agreement;
use crate::prepare::{Session, Trouble};
use crate::result::Directory;
use crate::state::{BlockState, Weights, fill_block};
use crate::step::commit::{Commit, Wishes};
use crate::step::weights::Held;
use crate::step::{Committed, Engine, Peers, StepError, StepReport, unread_limit_bytes};
use crate::transfer;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use vicuna_checkpoint::{Cursor, Manifest, ManifestRef, StoreError};
use vicuna_model::ModelError;
use vicuna_protocol::coordinator::form::Purpose;
use vicuna_protocol::coordinator::{Cause, MemoryBase};

/// Peers may be fetching their model while this rank waits; the coordinator gives up before this.
const CONNECT_PATIENCE: Duration = Duration::from_secs(900);
/// Steps in a row without a finite gradient, after which going on makes no sense.
const BROKEN_LIMIT: u32 = 10;

/// How the rank steers a generation. Each is called, or said, once and stays.
#[derive(Clone, Debug, Default)]
pub struct Control {
    /// Every member is ready: train.
    pub go: CancellationToken,
    /// End together with the others after a step.
    pub stop: CancellationToken,
    /// … and this rank will not be in the next generation.
    pub leave: CancellationToken,
    /// … and the end is to be kept in the store, because memory will not be enough.
    pub save: CancellationToken,
    /// … by then, when the first rank is gone; empty where there is no hurry.
    pub gone_at: Arc<OnceLock<Instant>>,
    /// End at once.
    pub abort: CancellationToken,
    /// Called by the generation itself: its last step is made, and what it leaves to be done is under way.
    pub parting: CancellationToken,
}

/// Hears what happens in a generation, from several threads.
pub trait Observer: Send + Sync {
    /// The state is loaded; equal digests are equal states.
    fn ready(&self, state_digest: &str);
    fn stepped(&self, report: &StepReport, next: Next);
    /// The generation ends without a further step; `last` is what the last one came to, if it was made here.
    fn parting(&self, _last: Option<&StepReport>) {}
    /// A part of an evaluation is done, so that nobody takes the silence for a stall.
    fn evaluating(&self, stage: Stage);
    fn evaluated(&self, evaluation: &Evaluation);
    /// A checkpoint is complete; called on every rank.
    fn checkpointed(&self, published: &Published);
    /// The generation waits for the store.
    fn blocked(&self, error: &StoreError);
    /// A checkpoint waits for the store, and the training does not.
    fn held_up(&self, _error: &StoreError) {}
}

/// What a generation does after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    Step,
    /// An evaluation, the copy of a checkpoint, or a step beside its upload: it takes as long as it takes.
    Pause,
    /// The step was the generation's last.
    End,
}

/// What a member is told.
#[derive(Clone, Debug)]
pub struct Assignment {
    pub membership: Membership,
    /// Where the members are, by rank: twins sit apart.
    pub nodes: Vec<String>,
    pub start: Start,
    pub purpose: Purpose,
    /// Who will not be in the next generation, by rank.
    pub leaves: Vec<bool>,
    /// Prove that this rank computes what the others do.
    pub canary: bool,
    /// Mean time so far.
    pub between_interruptions: Duration,
}

/// Where a generation starts.
#[derive(Clone, Debug)]
pub enum Start {
    /// From the base model.
    Model,
    Manifest(ManifestRef),
    /// From what members hold in memory.
    Memory {
        step: u64,
        base: MemoryBase,
    },
}

impl Start {
    pub fn step(&self) -> u64 {
        match self {
            Self::Model => 0,
            Self::Manifest(manifest) => manifest.step,
            Self::Memory { step, .. } => *step,
        }
    }

    /// The rank that writes the log: one that has the lines since the last part.
    pub(crate) fn scribe(&self) -> usize {
        match self {
            Self::Memory { step, base } => {
                // Who is not at the step may have to start empty.
                let with_lines = |at: u64| base.holdings.iter().position(|it| it.lines && it.step == at);
                with_lines(*step).or_else(|| with_lines(step.checked_sub(1)?)).unwrap_or(0)
            }
            Self::Model | Self::Manifest(_) => 0,
        }
    }

    /// The ranks that lack lines of the log which the scribe has.
    fn without_lines(&self) -> Vec<usize> {
        let Self::Memory { step, base } = self else { return Vec::new() };
        let ranks = base.holdings.iter().enumerate().filter(|(_, it)| !it.lines || it.step != *step);
        ranks.map(|(rank, _)| rank).filter(|rank| *rank != self.scribe()).collect()
    }

    /// The step in the store that the generation starts from, if that is where it does.
    fn step_in_store(&self) -> Option<u64> {
        (!matches!(self, Self::Memory { .. })).then(|| self.step())
    }

    fn manifest(&self) -> Option<&ManifestRef> {
        match self {
            Self::Manifest(manifest) => Some(manifest),
            Self::Model | Self::Memory { .. } => None,
        }
    }
}

#[derive(Debug)]
pub enum Outcome {
    /// All members stopped after this step. The manifest is this rank's knowledge of its checkpoint, if
    /// one was written.
    Stopped { step: u64, manifest: Option<ManifestRef> },
    /// Every step is done. On rank 0, the result is in the store.
    Complete { step: u64, manifest: Option<ManifestRef>, result: Option<Finished> },
}

#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    pub uri: String,
    /// `vicuna_model::weights_digest`.
    pub digest: String,
    /// Of the last step.
    pub loss: f64,
}

#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    #[error("{message}")]
    Load { manifest: ManifestRef, message: String },
    #[error("the checkpoint was not written: {0}")]
    Checkpoint(CheckpointError),
    #[error(transparent)]
    Inputs(Trouble),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("torch failed: {0}")]
    Torch(#[from] tch::TchError),
    #[error(
        "loss or gradient were not finite in {BROKEN_LIMIT} steps in a row, the last being step {step}; lower the learning rate or check the data"
    )]
    Numerics { step: u64 },
}

impl From<StepError> for GenerationError {
    fn from(error: StepError) -> Self {
        match error {
            StepError::Collective(error) => Self::Collective(error),
            StepError::Torch(error) => Self::Torch(error),
            StepError::Model(error) => Self::Model(error),
            // The node's disk, which another may not have.
            StepError::Data(_) => Self::Inputs(Trouble { cause: Cause::Infrastructure, message: error.to_string() }),
        }
    }
}

impl From<CheckpointError> for GenerationError {
    fn from(error: CheckpointError) -> Self {
        match error {
            CheckpointError::Collective(error) => Self::Collective(error),
            CheckpointError::GivenUp => Self::Collective(CollectiveError::Aborted),
            other => Self::Checkpoint(other),
        }
    }
}

/// Runs to the end of the generation. `memory` is what the rank holds: a generation that starts from
/// memory goes on from it, and however a generation ends, the state that it came to is left there.
pub fn run(
    session: &Session,
    network: &Network,
    assignment: &Assignment,
    control: &Control,
    observer: &Arc<dyn Observer>,
    memory: &mut Option<Engine>,
) -> Result<Outcome, GenerationError> {
    // OpenMP keeps this per thread.
    tch::set_num_threads(session.threads);
    let mut generation = Generation::form(session, network, assignment, control, observer, memory)?;
    let trained = generation.train();
    if trained.is_ok() {
        generation.mesh.leave();
    }
    generation.abandon_upload();
    abandon(generation.inherited.take());
    trained
}

struct Generation<'a> {
    session: &'a Session,
    control: &'a Control,
    observer: &'a Arc<dyn Observer>,
    mesh: Arc<Mesh>,
    publisher: Publisher,
    engine: &'a mut Engine,
    start: &'a Start,
    purpose: Purpose,
    between_interruptions: Duration,
    upload: Option<Uploading>,
    /// The last checkpoint of this generation that is complete.
    saved: Option<ManifestRef>,
    /// On the rank that writes the log.
    scribe: Option<Arc<Scribe>>,
    /// Lines of former generations on their way.
    inherited: Option<Upload<()>>,
    broken: u32,
    loss: f64,
}

/// Something on its way to the store; its thread says what became of it.
struct Upload<T> {
    thread: JoinHandle<T>,
    cancel: CancellationToken,
}

/// A checkpoint on its way behind the training.
struct Uploading {
    step: u64,
    progress: Arc<Progress>,
    upload: Upload<Result<ManifestRef, CheckpointError>>,
}

impl<'a> Generation<'a> {
    fn form(
        session: &'a Session,
        network: &Network,
        assignment: &'a Assignment,
        control: &'a Control,
        observer: &'a Arc<dyn Observer>,
        memory: &'a mut Option<Engine>,
    ) -> Result<Self, GenerationError> {
        let Assignment { membership, start, purpose, .. } = assignment;
        let world = membership.members.len();
        let limit = unread_limit_bytes(&session.table, session.micro_batches(), world);
        let limit = limit + transfer::most_bytes(&session.table);
        let mesh = Arc::new(Mesh::connect(network, membership, limit, CONNECT_PATIENCE, &control.abort)?);
        let peers = Peers { collective: &*mesh, abort: &control.abort };
        let manifest = open_base(session, start, &control.abort, observer)?;
        inputs::agree(session, start, manifest.as_ref(), peers)?;
        let trains = *purpose == Purpose::Train;
        let agreement = trains.then(|| agreement::agree(session, start.step(), peers)).transpose()?;
        let sharded = agreement.is_some_and(|agreement| agreement.sharded);
        let base = Base { session, assignment, manifest, sharded, observer };
        let engine = base.stand_at_start(peers, memory)?;
        crate::heap::give_back_freed();
        if let Some(agreement) = agreement {
            let names = membership.members.iter().map(|member| member.name.clone()).collect();
            engine.log.enter(membership.generation, names);
            engine.room = agreement.room;
        }
        let digest = state_digest(session, engine, assignment, peers)?;
        let (generation, rank) = (membership.generation, membership.rank);
        tracing::info!(generation, rank, world, step = engine.step, sharded, digest, "ready");
        observer.ready(&digest);
        // Where every step is made already, the result is told with what the last one came to.
        let loss = engine.last.as_ref().map_or(f64::NAN, |last| last.loss);
        Ok(Self {
            scribe: (rank == start.scribe()).then(|| Arc::new(session.scribe(start.step_in_store()))),
            inherited: None,
            publisher: session.publisher(mesh.clone(), engine.layout.clone(), membership.generation),
            session,
            control,
            observer,
            mesh,
            engine,
            start,
            purpose: *purpose,
            between_interruptions: assignment.between_interruptions,
            upload: None,
            saved: None,
            broken: 0,
            loss,
        })
    }

    fn train(&mut self) -> Result<Outcome, GenerationError> {
        let steps = self.session.data.steps();
        if self.purpose != Purpose::Train {
            self.control.parting.cancel();
        }
        let stopped = self.wait_for_go()?;
        if stopped || self.purpose != Purpose::Train {
            // All write it down where they are to, whether they heard Go or Stop.
            let manifest = if self.purpose == Purpose::Save { self.save()? } else { None };
            return Ok(Outcome::Stopped { step: self.engine.step, manifest });
        }
        // Everyone is here: nobody will ask for what others keep now.
        self.engine.forget_strays(self.mesh.rank());
        self.begin_records()?;
        loop {
            if self.session.evaluates_after(self.engine.step)
                && let Some(commit) = self.evaluate()?
            {
                self.observer.parting(self.engine.last.as_ref());
                return self.stop(&commit.wishes, &commit.leaving);
            }
            if self.engine.step >= steps {
                return self.complete();
            }
            let report = self.step()?;
            let last = report.wishes.stop || report.step == steps;
            let saves = !last && report.wishes.checkpoint && !report.wishes.uploading;
            let next = match last {
                true => Next::End,
                // Beside an upload a step may take longer than it usually does.
                false if saves || report.wishes.uploading => Next::Pause,
                false if self.session.evaluates_after(report.step) => Next::Pause,
                false => Next::Step,
            };
            self.observer.stepped(&report, next);
            if report.wishes.stop && report.step < steps {
                return self.stop(&report.wishes, &report.leaving);
            }
            if saves {
                self.start_upload();
            }
        }
    }

    /// What everyone said when somebody wished for the end; else the evaluation is complete.
    fn evaluate(&mut self) -> Result<Option<Commit>, GenerationError> {
        let Control { stop, leave, save, abort, .. } = self.control;
        let wishes = || Wishes {
            stop: stop.is_cancelled(),
            leave: leave.is_cancelled(),
            save: save.is_cancelled(),
            ..Wishes::default()
        };
        let peers = Peers { collective: &*self.mesh, abort };
        let (session, told) = (self.session, |stage: Stage| self.observer.evaluating(stage));
        match evaluation::run(self.engine, &session.held_out, session.micro_batches(), peers, &wishes, &told)? {
            Pass::Stopped(commit) => Ok(Some(commit)),
            Pass::Complete(evaluation) => {
                self.engine.log.evaluated(&evaluation);
                self.observer.evaluated(&evaluation);
                Ok(None)
            }
        }
    }

    /// What the store is to have of the run's past: the data report, and the lines of a former scribe.
    fn begin_records(&mut self) -> Result<(), GenerationError> {
        let (session, abort) = (self.session, &self.control.abort);
        if self.mesh.rank() == 0 && matches!(self.start, Start::Model) {
            let trouble = |error: &StoreError| self.observer.blocked(error);
            checkpoint::retry(&session.runtime, abort, &trouble, || session.write_data_report())?;
        }
        if self.engine.log.lines().is_empty() {
            return Ok(());
        }
        let Some(part) = self.part() else { return Ok(()) };
        let (runtime, cancel) = (session.runtime.clone(), abort.child_token());
        let given_up = cancel.clone();
        let thread = std::thread::spawn(move || drop(part.write(&runtime, &given_up, &|_| ())));
        self.inherited = Some(Upload { thread, cancel });
        Ok(())
    }

    /// The part of the log that is due now, on the rank that writes it.
    fn part(&mut self) -> Option<Part> {
        let scribe = self.scribe.clone();
        self.engine.log.part_is_due(scribe.as_ref().map(|scribe| scribe.reach().unwrap_or_default()));
        Some(Part { scribe: scribe?, lines: self.engine.log.lines().to_vec() })
    }

    fn write_log(&mut self) -> Result<(), GenerationError> {
        let Some(part) = self.part() else { return Ok(()) };
        let trouble = |error: &StoreError| self.observer.blocked(error);
        Ok(part.write(&self.session.runtime, &self.control.abort, &trouble)?)
    }

    /// Whether a planned stop came first.
    fn wait_for_go(&self) -> Result<bool, GenerationError> {
        let Control { go, stop, abort, .. } = self.control;
        self.session.runtime.block_on(async {
            tokio::select! {
                () = go.cancelled() => {}
                () = stop.cancelled() => {}
                () = abort.cancelled() => {}
            }
        });
        if abort.is_cancelled() {
            return Err(CollectiveError::Aborted.into());
        }
        Ok(!go.is_cancelled())
    }

    fn step(&mut self) -> Result<StepReport, GenerationError> {
        let (control, wishes) = (self.control, self.wishes());
        // All do what one of them wishes.
        let under_way = self.upload.as_ref().filter(|_| self.mesh.rank() == 0).map(|it| it.progress.clone());
        // What is wished for while the step is under way ends the generation after it, not after the next one. That the
        // rank leaves is known before that it stops.
        let wishes = || Wishes {
            stop: control.stop.is_cancelled(),
            leave: control.leave.is_cancelled(),
            save: control.save.is_cancelled(),
            finish: under_way.as_ref().is_some_and(|it| is_worth_finishing(it, control)),
            ..wishes
        };
        let peers = Peers { collective: &*self.mesh, abort: &self.control.abort };
        let session = self.session;
        let report = self.engine.advance(&session.job.recipe, &session.data, peers, &wishes)?;
        self.broken = if report.broken { self.broken + 1 } else { 0 };
        self.loss = report.loss;
        self.engine.log.stepped(&report, session.data.epochs_done(report.step));
        if !report.updated {
            tracing::warn!(step = report.step, broken = report.broken, "the step changes nothing");
        }
        if self.broken >= BROKEN_LIMIT {
            return Err(GenerationError::Numerics { step: report.step });
        }
        Ok(report)
    }

    fn wishes(&mut self) -> Wishes {
        let uploading = self.is_uploading();
        let due = self.mesh.rank() == 0 && self.engine.saved_at.elapsed() >= self.interval();
        Wishes { checkpoint: due, uploading, ..Wishes::default() }
    }

    /// From one checkpoint to the next.
    fn interval(&self) -> Duration {
        let asked = self.session.job.checkpoint.interval_seconds.map(Duration::from_secs);
        asked.unwrap_or_else(|| interval::best(self.engine.stall, self.between_interruptions))
    }

    fn is_uploading(&mut self) -> bool {
        if let Some(uploading) = self.upload.take_if(|uploading| uploading.upload.thread.is_finished())
            && let Err(error) = self.uploaded(uploading)
            && !matches!(error, CheckpointError::GivenUp)
        {
            tracing::warn!(%error, "the periodic checkpoint was not written");
        }
        self.upload.is_some()
    }

    /// Waits for the end of a checkpoint that is on its way.
    fn uploaded(&mut self, uploading: Uploading) -> Result<ManifestRef, CheckpointError> {
        let manifest = uploading.upload.thread.join().unwrap_or(Err(CheckpointError::GivenUp))?;
        self.engine.saved_at = Instant::now();
        self.saved = Some(manifest.clone());
        Ok(manifest)
    }

    fn snapshot(&mut self) -> Snapshot {
        let cursor = self.session.data.cursor(self.engine.step);
        let cursor = Cursor { epoch: cursor.epoch, offset: cursor.offset };
        let mut snapshot = Snapshot::take(self.engine, self.mesh.rank(), cursor);
        self.engine.stall = Some(snapshot.stall);
        snapshot.interval = self.interval();
        snapshot
    }

    /// Starts a checkpoint that does not hold up the training.
    fn start_upload(&mut self) {
        let snapshot = self.snapshot();
        let progress = snapshot.progress.clone();
        let (publisher, observer, part) = (self.publisher.clone(), self.observer.clone(), self.part());
        let runtime = self.session.runtime.clone();
        let cancel = self.control.abort.child_token();
        let (given_up, parting) = (cancel.clone(), self.control.parting.clone());
        let thread = std::thread::spawn(move || {
            // Once the last step is made it is the generation that waits.
            let trouble = |error: &StoreError| match parting.is_cancelled() {
                true => observer.blocked(error),
                false => observer.held_up(error),
            };
            part.map_or(Ok(()), |part| part.write(&runtime, &given_up, &trouble))?;
            let published = publisher.publish(snapshot, &given_up, &trouble)?;
            observer.checkpointed(&published);
            Ok(published.manifest)
        });
        self.upload = Some(Uploading { step: self.engine.step, progress, upload: Upload { thread, cancel } });
    }

    /// A newer checkpoint makes the one on its way superfluous.
    fn abandon_upload(&mut self) {
        abandon(self.upload.take().map(|uploading| uploading.upload));
    }

    /// An older checkpoint is worth more than a newer one that is not done in time. Peers may be done with it, and so may we.
    fn finish_upload(&mut self) -> Result<Option<ManifestRef>, GenerationError> {
        match self.upload.take() {
            Some(uploading) => Ok(Some(self.uploaded(uploading)?)),
            None => Ok(self.saved.clone()),
        }
    }

    /// Writes a checkpoint of the present state, unless the base is just that.
    fn save(&mut self) -> Result<Option<ManifestRef>, GenerationError> {
        // Peers may be done with the very checkpoint that is still on its way here.
        if let Some(uploading) = self.upload.take_if(|uploading| uploading.step == self.engine.step) {
            return Ok(Some(self.uploaded(uploading)?));
        }
        if let Some(saved) = self.saved.clone().filter(|saved| saved.step == self.engine.step) {
            return Ok(Some(saved));
        }
        self.abandon_upload();
        let in_store = matches!(self.start, Start::Model | Start::Manifest(_));
        if self.engine.step == self.start.step() && in_store {
            return Ok(self.start.manifest().cloned());
        }
        self.write_log()?;
        let (observer, snapshot) = (self.observer, self.snapshot());
        let published = self.publisher.publish(snapshot, &self.control.abort, &|error| observer.blocked(error))?;
        observer.checkpointed(&published);
        self.engine.saved_at = Instant::now();
        self.saved = Some(published.manifest.clone());
        Ok(Some(published.manifest))
    }

    /// The planned end: what is in memory goes to those who stay, and where they are too few also to the store.
    fn stop(&mut self, wishes: &Wishes, leaving: &[bool]) -> Result<Outcome, GenerationError> {
        self.control.parting.cancel();
        let peers = Peers { collective: &*self.mesh, abort: &self.control.abort };
        // First, since the store may be slow or away.
        transfer::evacuate(self.engine, leaving, peers)?;
        let nobody_stays = leaving.iter().all(|leaves| *leaves);
        let manifest = match wishes.save || nobody_stays {
            true if wishes.finish => self.finish_upload()?,
            true => self.save()?,
            false => None,
        };
        Ok(Outcome::Stopped { step: self.engine.step, manifest })
    }

    fn complete(&mut self) -> Result<Outcome, GenerationError> {
        self.control.parting.cancel();
        self.write_log()?;
        let manifest = self.save()?;
        crate::heap::give_back_freed();
        let result = self.write_result()?;
        Ok(Outcome::Complete { step: self.engine.step, manifest, result })
    }

    /// By rank 0, with what the others have of the weights.
    fn write_result(&self) -> Result<Option<Finished>, GenerationError> {
        let (observer, abort) = (self.observer, &self.control.abort);
        let peers = Peers { collective: &*self.mesh, abort };
        if self.mesh.rank() != 0 {
            self.engine.each_weight(peers, |_, _| Ok(()))?;
            return Ok(None);
        }
        let mut result = Directory::create(self.session)?;
        self.engine.each_weight(peers, |parameter, tensor| result.add(parameter, tensor))?;
        let written = result.upload(abort, &|error| observer.blocked(error))?;
        Ok(Some(Finished { uri: written.uri, digest: written.digest, loss: self.loss }))
    }
}

/// Asked while the last step is under way.
fn is_worth_finishing(upload: &Progress, control: &Control) -> bool {
    control.save.is_cancelled()
        && control.gone_at.get().is_some_and(|end| upload.is_worth_finishing(Instant::now(), *end))
}

fn abandon<T>(upload: Option<Upload<T>>) {
    if let Some(upload) = upload {
        upload.cancel.cancel();
        // It has nothing to tell that its log has not told.
        drop(upload.thread.join());
    }
}

/// Where a generation starts, and what is known of it.
struct Base<'s> {
    session: &'s Session,
    assignment: &'s Assignment,
    /// Of a base in the store.
    manifest: Option<Manifest>,
    /// Each rank is to have the weights of its blocks alone.
    sharded: bool,
    observer: &'s Arc<dyn Observer>,
}

impl Base<'_> {
    /// Brings the state that the assignment names to every rank that is to have it.
    fn stand_at_start<'a>(
        &self,
        peers: Peers<'_>,
        memory: &'a mut Option<Engine>,
    ) -> Result<&'a mut Engine, GenerationError> {
        let Self { session, assignment, .. } = self;
        let rank = assignment.membership.rank;
        let Assignment { nodes, leaves, purpose, .. } = assignment;
        let world = nodes.len();
        let start = &assignment.start;
        let (engine, holders, lacking) = match (start, &self.manifest) {
            (Start::Memory { step, base }, _) => {
                let mut holders = transfer::holders(&base.holdings, *step, session.table.blocks.len());
                if *purpose != Purpose::Train {
                    let layout = Layout::among(&holders, nodes, leaves);
                    let engine = from_memory(session, *step, base, layout, memory);
                    hand_over(engine, &mut holders, assignment, peers)?;
                    return Ok(engine);
                }
                let layout = Layout::new(&holders, nodes);
                let lacking = base.holdings.iter().map(|holding| !holding.weights || holding.step != *step).collect();
                let engine = from_memory(session, *step, base, layout, memory);
                engine.hold(self.sharded);
                (engine, holders, lacking)
            }
            (Start::Manifest(base), Some(manifest)) => {
                // What it holds is not wanted any more, and its room is.
                let mut log = memory.take().map_or_else(Log::default, |former| former.log);
                log.rewind(base.step);
                let layout = Layout::fresh(&session.table, nodes);
                let holders = (0..session.table.blocks.len()).map(|block| vec![layout.owner(block)]).collect();
                let engine = memory.insert(self.load(base, manifest, layout, peers.abort)?);
                engine.hold(self.sharded);
                (engine.log, engine.has_lines) = (log, true);
                (engine, holders, vec![true; world])
            }
            (Start::Model | Start::Manifest(_), _) => {
                let layout = Layout::fresh(&session.table, nodes);
                let engine = memory.insert(from_model(session, layout, rank, self.sharded)?);
                (engine, Holders::new(), vec![false; world])
            }
        };
        transfer::spread(engine, &holders, peers)?;
        engine.gather(peers, &lacking)?;
        log::inherit::hand_over(engine, start.scribe(), &start.without_lines(), peers)?;
        Ok(engine)
    }

    /// Each rank reads what it owns, and twins get it from there; waits for the store, if need be.
    fn load(
        &self,
        base: &ManifestRef,
        manifest: &Manifest,
        layout: Layout,
        abort: &CancellationToken,
    ) -> Result<Engine, GenerationError> {
        let Self { session, assignment, observer, .. } = self;
        let owned: Vec<usize> = layout.owned(assignment.membership.rank).collect();
        let blocks = checkpoint::retry_manifest(&session.runtime, abort, &|error| observer.blocked(error), || {
            checkpoint::load(&session.store, base, manifest, &session.table, &owned)
        });
        let blocks = blocks.map_err(|error| unloadable(base, error))?;
        let mut engine = engine(session, Held::Own, layout);
        engine.blocks = blocks;
        engine.step = manifest.step;
        engine.updates = manifest.updates;
        Ok(engine)
    }
}

/// Opened before anything else: it tells what the training's data and frozen base are.
fn open_base(
    session: &Session,
    start: &Start,
    abort: &CancellationToken,
    observer: &Arc<dyn Observer>,
) -> Result<Option<Manifest>, GenerationError> {
    let Some(base) = start.manifest() else { return Ok(None) };
    let opened = checkpoint::retry_manifest(&session.runtime, abort, &|error| observer.blocked(error), || {
        checkpoint::open(&session.store, base, &session.table, &session.recipe_digest)
    });
    opened.map(Some).map_err(|error| unloadable(base, error))
}

fn unloadable(base: &ManifestRef, error: CheckpointError) -> GenerationError {
    match error {
        CheckpointError::Manifest(error) => {
            GenerationError::Load { manifest: base.clone(), message: error.to_string() }
        }
        other => other.into(),
    }
}

/// What only those have who leave goes to those who stay: state first, since time may be short, then lines of the log. Where
/// it is to be written down all do their part, and nothing is moved to twins first.
fn hand_over(
    engine: &mut Engine,
    holders: &mut Holders,
    assignment: &Assignment,
    peers: Peers<'_>,
) -> Result<(), GenerationError> {
    let Assignment { nodes, leaves, purpose, start, .. } = assignment;
    transfer::hand_over(engine, holders, leaves, peers)?;
    let without_lines: Vec<usize> = start.without_lines().into_iter().filter(|rank| !leaves[*rank]).collect();
    log::inherit::hand_over(engine, start.scribe(), &without_lines, peers)?;
    if *purpose == Purpose::Save {
        engine.enter(Layout::new(holders, nodes).without_twins());
        transfer::spread(engine, holders, peers)?;
    }
    Ok(())
}

/// Parameters are read one after another: no whole model is in memory beside what is kept of it.
fn from_model(session: &Session, layout: Layout, rank: usize, sharded: bool) -> Result<Engine, GenerationError> {
    let table = &session.table;
    let blank = |block: usize| (block, vec![0.0; table.blocks[block].elements]);
    let mut masters: BTreeMap<usize, Vec<f32>> = layout.kept(rank).map(blank).collect();
    let mut tensors = Vec::new();
    for (index, parameter) in table.parameters.iter().enumerate() {
        let is_kept = || masters.keys().any(|block| table.blocks[*block].has(index));
        if sharded && !is_kept() {
            continue;
        }
        let value = session.first_value(parameter)?;
        for (block, values) in &mut masters {
            fill_block(&table.blocks[*block], index, &value, values)?;
        }
        if !sharded {
            tensors.push(value.f_to_kind(session.kind())?.f_to_device(session.device)?);
        }
    }
    let held = match sharded {
        true => Held::Own,
        false => Held::All { weights: Weights { tensors }, step: Some(0) },
    };
    let mut engine = engine(session, held, layout);
    engine.blocks = masters.into_iter().map(|(block, values)| (block, BlockState::new(values))).collect();
    engine.has_lines = true;
    Ok(engine)
}

/// Goes on from what this rank holds; a step that others have committed is applied first. A newcomer
/// starts empty.
fn from_memory<'a>(
    session: &Session,
    step: u64,
    base: &MemoryBase,
    layout: Layout,
    memory: &'a mut Option<Engine>,
) -> &'a mut Engine {
    let committed = Committed { norm: base.norm, updated: base.updated };
    let kept = memory.take().map(|mut engine| {
        if engine.step + 1 == step {
            engine.follow(&session.job.recipe, &session.data, committed);
        }
        engine
    });
    // A rank that holds something else has nothing to offer, and said so.
    let kept = kept.filter(|engine| (engine.step, engine.updates) == (step, base.updates));
    let mut engine = kept.unwrap_or_else(|| {
        let mut empty = engine(session, Held::Own, layout.clone());
        (empty.step, empty.updates, empty.committed) = (step, base.updates, committed);
        empty
    });
    engine.enter(layout);
    memory.insert(engine)
}

fn engine(session: &Session, held: Held, layout: Layout) -> Engine {
    let (config, table) = (session.config.clone(), session.table.clone());
    let longest = session.data.longest().max(session.held_out.longest());
    let adapted = session.adapted.as_ref().map(|base| base.lock().share());
    Engine::new(config, table, held, layout, longest, (session.kind(), session.device), adapted)
}

/// Equal on ranks that stand at the same state and compute alike.
fn state_digest(
    session: &Session,
    engine: &Engine,
    assignment: &Assignment,
    peers: Peers<'_>,
) -> Result<String, GenerationError> {
    let mut hasher = blake3::Hasher::new();
    if assignment.purpose == Purpose::Train {
        // Else nobody computes with the weights, and newcomers have none.
        hasher.update(engine.digest(peers)?.as_bytes());
    }
    hasher.update(&engine.step.to_le_bytes());
    hasher.update(&engine.updates.to_le_bytes());
    if let Some(manifest) = assignment.start.manifest() {
        // It covers the moments, which are sharded.
        hasher.update(manifest.digest.as_bytes());
    }
    if assignment.canary {
        hasher.update(engine.canary(&session.data, peers)?.as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}
