//! One generation on one rank: connect, load, get ready, run steps, leave.
//!
//! Blocks its thread; the rank's life ([`crate::rank`]) goes on beside it and steers it through
//! [`Control`].

use crate::checkpoint::{self, CheckpointError, Published, Publisher, Snapshot};
use crate::collective::tcp::Membership;
use crate::collective::{Collective, CollectiveError, Mesh, Network};
use crate::prepare::Session;
use crate::result;
use crate::state::{OwnedBlock, Weights};
use crate::step::commit::Wishes;
use crate::step::{Engine, Peers, StepError, StepReport, unread_limit_bytes};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use vicuna_checkpoint::{Cursor, ManifestRef, StoreError};
use vicuna_model::ModelError;

/// Peers may be fetching their model while this rank waits; the coordinator gives up before this.
const CONNECT_PATIENCE: Duration = Duration::from_secs(900);
/// Steps in a row without a finite gradient, after which going on makes no sense.
const BROKEN_LIMIT: u32 = 10;

/// How the rank steers a generation. Each is called once and stays.
#[derive(Clone, Debug, Default)]
pub struct Control {
    /// Every member is ready: train.
    pub go: CancellationToken,
    /// End together with the others after a step, through a checkpoint.
    pub stop: CancellationToken,
    /// End at once.
    pub abort: CancellationToken,
}

/// Hears what happens in a generation, from several threads.
pub trait Observer: Send + Sync {
    /// The state is loaded; equal digests are equal states.
    fn ready(&self, state_digest: &str);
    fn stepped(&self, report: &StepReport, last_of_generation: bool);
    /// A checkpoint is complete; called on every rank.
    fn checkpointed(&self, published: &Published);
    /// The generation waits for the store.
    fn blocked(&self, error: &StoreError);
}

/// What a member is told.
#[derive(Clone, Debug)]
pub struct Assignment {
    pub membership: Membership,
    /// Absent: start from the base model.
    pub base: Option<ManifestRef>,
}

#[derive(Debug)]
pub enum Outcome {
    /// All members stopped after this step. The manifest is this rank's knowledge of its checkpoint.
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

/// Runs to the end of the generation.
pub fn run(
    session: &Session,
    network: &Network,
    assignment: &Assignment,
    control: &Control,
    observer: &Arc<dyn Observer>,
) -> Result<Outcome, GenerationError> {
    // OpenMP keeps this per thread.
    tch::set_num_threads(session.threads);
    let mut generation = Generation::form(session, network, assignment, control, observer)?;
    let trained = generation.train();
    if trained.is_ok() {
        generation.mesh.leave();
    }
    generation.abandon_upload();
    trained
}

struct Generation<'a> {
    session: &'a Session,
    control: &'a Control,
    observer: &'a Arc<dyn Observer>,
    mesh: Arc<Mesh>,
    publisher: Publisher,
    engine: Engine,
    /// Where this generation started, already in the store unless it is the base model.
    base: Option<ManifestRef>,
    base_step: u64,
    upload: Option<Upload>,
    last_checkpoint: Instant,
    broken: u32,
    loss: f64,
}

/// A periodic checkpoint on its way.
struct Upload {
    thread: JoinHandle<()>,
    cancel: CancellationToken,
}

impl<'a> Generation<'a> {
    fn form(
        session: &'a Session,
        network: &Network,
        assignment: &Assignment,
        control: &'a Control,
        observer: &'a Arc<dyn Observer>,
    ) -> Result<Self, GenerationError> {
        let membership = &assignment.membership;
        let world = membership.members.len();
        let limit = unread_limit_bytes(&session.table, session.micro_batches(), world);
        let mesh = Mesh::connect(network, membership, limit, CONNECT_PATIENCE, &control.abort)?;
        let mesh = Arc::new(mesh);
        let mut engine = load(session, assignment, control, observer)?;
        let peers = Peers { collective: &*mesh, abort: &control.abort };
        let base_step = engine.step;
        engine.gather(base_step, peers)?;
        let digest = state_digest(&engine, assignment.base.as_ref())?;
        tracing::info!(
            generation = membership.generation,
            rank = membership.rank,
            world,
            step = base_step,
            digest,
            "ready"
        );
        observer.ready(&digest);
        Ok(Self {
            publisher: session.publisher(mesh.clone(), membership.generation),
            session,
            control,
            observer,
            mesh,
            engine,
            base: assignment.base.clone(),
            base_step,
            upload: None,
            last_checkpoint: Instant::now(),
            broken: 0,
            loss: f64::NAN,
        })
    }

    fn train(&mut self) -> Result<Outcome, GenerationError> {
        let steps = self.session.data.steps();
        let mut stopping = self.wait_for_go()?;
        while self.engine.step < steps && !stopping {
            let report = self.step()?;
            stopping = report.wishes.stop;
            let last = stopping || report.step == steps;
            self.observer.stepped(&report, last);
            if !last && report.wishes.checkpoint && !report.wishes.uploading {
                self.start_upload();
            }
        }
        if self.engine.step < steps { self.stop() } else { self.complete() }
    }

    /// Whether a planned stop came first.
    fn wait_for_go(&self) -> Result<bool, GenerationError> {
        let Control { go, stop, abort } = self.control;
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
        let wishes = self.wishes();
        let peers = Peers { collective: &*self.mesh, abort: &self.control.abort };
        let session = self.session;
        let report = self.engine.advance(&session.job.recipe, &session.data, peers, wishes)?;
        self.broken = if report.broken { self.broken + 1 } else { 0 };
        self.loss = report.loss;
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
        let interval = Duration::from_secs(self.session.job.checkpoint.interval_seconds);
        let due = self.mesh.rank() == 0 && self.last_checkpoint.elapsed() >= interval;
        Wishes { stop: self.control.stop.is_cancelled(), checkpoint: due, uploading }
    }

    fn is_uploading(&mut self) -> bool {
        if self.upload.as_ref().is_some_and(|upload| upload.thread.is_finished()) {
            self.upload = None;
        }
        self.upload.is_some()
    }

    fn snapshot(&self) -> Snapshot {
        let cursor = self.session.data.cursor(self.engine.step);
        Snapshot::take(&self.engine, Cursor { epoch: cursor.epoch, offset: cursor.offset })
    }

    /// Starts a checkpoint that does not hold up the training.
    fn start_upload(&mut self) {
        self.last_checkpoint = Instant::now();
        let snapshot = self.snapshot();
        let (publisher, observer) = (self.publisher.clone(), self.observer.clone());
        let cancel = self.control.abort.child_token();
        let given_up = cancel.clone();
        let thread = std::thread::spawn(move || match publisher.publish(snapshot, &given_up, &|_| ()) {
            Ok(published) => observer.checkpointed(&published),
            Err(CheckpointError::GivenUp) => {}
            Err(error) => tracing::warn!(%error, "the periodic checkpoint was not written"),
        });
        self.upload = Some(Upload { thread, cancel });
    }

    /// A newer checkpoint makes the one on its way superfluous.
    fn abandon_upload(&mut self) {
        if let Some(upload) = self.upload.take() {
            upload.cancel.cancel();
            // It has nothing to tell that its log has not told.
            drop(upload.thread.join());
        }
    }

    /// Writes a checkpoint of the present state, unless the base is just that.
    fn save(&mut self) -> Result<Option<ManifestRef>, GenerationError> {
        self.abandon_upload();
        if self.engine.step == self.base_step && (self.base.is_some() || self.base_step == 0) {
            return Ok(self.base.clone());
        }
        let observer = self.observer;
        let published =
            self.publisher.publish(self.snapshot(), &self.control.abort, &|error| observer.blocked(error))?;
        observer.checkpointed(&published);
        Ok(Some(published.manifest))
    }

    fn stop(&mut self) -> Result<Outcome, GenerationError> {
        let manifest = self.save()?;
        Ok(Outcome::Stopped { step: self.engine.step, manifest })
    }

    fn complete(&mut self) -> Result<Outcome, GenerationError> {
        let manifest = self.save()?;
        let result = if self.mesh.rank() == 0 { Some(self.write_result()?) } else { None };
        Ok(Outcome::Complete { step: self.engine.step, manifest, result })
    }

    fn write_result(&self) -> Result<Finished, GenerationError> {
        let observer = self.observer;
        let written = result::write(self.session, &self.engine, &self.control.abort, &|error| observer.blocked(error))?;
        Ok(Finished { uri: written.uri, digest: written.digest, loss: self.loss })
    }
}

/// The state that the assignment names; waits for the store, if need be.
fn load(
    session: &Session,
    assignment: &Assignment,
    control: &Control,
    observer: &Arc<dyn Observer>,
) -> Result<Engine, GenerationError> {
    let (rank, world) = (assignment.membership.rank, assignment.membership.members.len());
    let Some(base) = &assignment.base else {
        let weights = session.base_weights()?;
        let owned = own_base(session, &weights, rank, world)?;
        return Ok(engine(session, weights, owned));
    };
    let loaded = checkpoint::retry_manifest(&session.runtime, &control.abort, &|error| observer.blocked(error), || {
        checkpoint::load(&session.store, base, &session.table, &session.recipe_digest, (rank, world))
    });
    let loaded = loaded.map_err(|error| match error {
        CheckpointError::Manifest(error) => {
            GenerationError::Load { manifest: base.clone(), message: error.to_string() }
        }
        other => other.into(),
    })?;
    let weights = Weights::zeros(&session.table, session.device);
    let mut engine = engine(session, weights, loaded.owned);
    engine.step = loaded.manifest.step;
    engine.updates = loaded.manifest.updates;
    Ok(engine)
}

fn own_base(
    session: &Session,
    weights: &Weights,
    rank: usize,
    world: usize,
) -> Result<BTreeMap<usize, OwnedBlock>, GenerationError> {
    let own = |index: usize| Ok((index, OwnedBlock::new(weights.read(&session.table.blocks[index])?)));
    session.table.owned(rank, world).map(own).collect()
}

fn engine(session: &Session, weights: Weights, owned: BTreeMap<usize, OwnedBlock>) -> Engine {
    let (config, table) = (session.config.clone(), session.table.clone());
    Engine::new(config, table, weights, owned, session.data.longest(), session.device)
}

/// Equal on ranks that loaded the same: the manifest's digest covers the moments, which are sharded.
fn state_digest(engine: &Engine, base: Option<&ManifestRef>) -> Result<String, tch::TchError> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(engine.digest()?.as_bytes());
    hasher.update(base.map_or("", |base| &base.digest).as_bytes());
    Ok(hasher.finalize().to_hex().to_string())
}
