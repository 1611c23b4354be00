//! When to look at which training, and what one look is: observe, plan, apply, status.

use super::apply::{self, AppliedBefore, ApplyError};
use super::known::Known;
use super::memory::Memory;
use super::observe::{self, Observed};
use super::plan::{self, Plan};
use super::status::{self, Write};
use super::time::{millis, unix_ms};
use crate::config::{GIVE_UP_IMAGE_ANNOTATION, MANAGER};
use crate::context::Context;
use crate::coordinator::job::{self, JobError};
use crate::coordinator::membership::{Millis, Target};
use crate::coordinator::registry::{Key, Opening, Told};
use crate::coordinator::report::{CheckpointReport, Counters, EvaluationReport, Happening, RecoveryPhases};
use crate::coordinator::store::Owner;
use crate::leader::NotLeader;
use crate::watches::Change;
use futures::{FutureExt, Stream, StreamExt};
use kube::api::Api;
use kube::runtime::controller::{self, Action, ReconcileRequest};
use kube::runtime::reflector::ObjectRef;
use kube::{Resource, ResourceExt};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;
use tokio_stream::wrappers::{BroadcastStream, ReceiverStream};
use vicuna_crds::Period;
use vicuna_crds::training::{VicunaTraining, VicunaTrainingStatus};
use vicuna_protocol::coordinator::form::Purpose;
use vicuna_protocol::gigabytes;

const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(300);
const CONCURRENCY: u16 = 16;

#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error(transparent)]
    Apply(#[from] ApplyError),
    #[error("the status cannot be written: {0}")]
    Status(#[source] Box<kube::Error>),
    #[error(transparent)]
    Spec(#[from] JobError),
    #[error(transparent)]
    NotLeader(#[from] NotLeader),
    #[error("too many trainings are coordinated at a time: finish or suspend some")]
    TooMany,
}

/// What the controller keeps between looks.
struct Controller {
    context: Arc<Context>,
    applied: AppliedBefore,
    memories: Mutex<HashMap<Key, (String, Memory)>>,
    /// Failed looks in a row.
    failures: Mutex<HashMap<Key, u32>>,
    known: Known,
}

/// Reconciles all trainings until the process ends. `told` is what memberships tell.
pub async fn run(context: Arc<Context>, told: mpsc::Receiver<Told>) {
    let controller = Arc::new(Controller {
        applied: AppliedBefore::default(),
        memories: Mutex::default(),
        failures: Mutex::default(),
        known: Known::default(),
        context: context.clone(),
    });
    let store = context.watches.trainings.clone();
    let queue = futures::stream::select(
        futures::stream::select(everything(&context), changes(&context)),
        tellings(controller.clone(), told),
    );
    let config = controller::Config::default().concurrency(CONCURRENCY);
    let look = |training, controller| reconcile(training, controller).boxed();
    controller::applier(look, on_error, controller.clone(), store, queue.boxed(), config)
        .for_each(|result| {
            if let Err(controller::Error::ObjectNotFound(gone)) = result {
                controller.forget(gone.namespace.as_deref().unwrap_or_default(), &gone.name);
            }
            std::future::ready(())
        })
        .await;
}

type Request = Result<ReconcileRequest<VicunaTraining>, Infallible>;

fn request(namespace: &str, name: &str) -> Request {
    Ok(ObjectRef::new(name).within(namespace).into())
}

/// All trainings, once: the change signals may be older than our subscription.
fn everything(context: &Arc<Context>) -> impl Stream<Item = Request> + use<> {
    let trainings = context.watches.trainings.state();
    futures::stream::iter(trainings.into_iter().map(|training| Ok(ObjectRef::from_obj(&*training).into())))
}

/// Trainings that a change in the caches concerns.
fn changes(context: &Arc<Context>) -> impl Stream<Item = Request> + use<> {
    let context = context.clone();
    let changes: broadcast::Receiver<Change> = context.watches.subscribe();
    BroadcastStream::new(changes).flat_map(move |change| futures::stream::iter(concerned(&context, change)))
}

fn concerned(context: &Context, change: Result<Change, BroadcastStreamRecvError>) -> Vec<Request> {
    match change {
        Ok(Change::Training(namespace, name) | Change::TrainingPod(namespace, name)) => {
            vec![request(&namespace, &name)]
        }
        Ok(Change::ServingPod(..)) => Vec::new(),
        Ok(Change::Node(node)) => on_node(context, &node),
        Err(BroadcastStreamRecvError::Lagged(_)) => {
            let trainings = context.watches.trainings.state();
            trainings.iter().map(|training| Ok(ObjectRef::from_obj(&**training).into())).collect()
        }
    }
}

/// Trainings with a pod on the node.
fn on_node(context: &Context, node: &str) -> Vec<Request> {
    let trainings = context.watches.trainings_on(node);
    trainings.iter().map(|(namespace, name)| request(namespace, name)).collect()
}

/// Trainings whose membership has news; the news become Events.
fn tellings(controller: Arc<Controller>, told: mpsc::Receiver<Told>) -> impl Stream<Item = Request> {
    ReceiverStream::new(told).map(move |((namespace, name), happenings)| {
        controller.tell(&namespace, &name, &happenings);
        request(&namespace, &name)
    })
}

async fn reconcile(training: Arc<VicunaTraining>, controller: Arc<Controller>) -> Result<Action, ReconcileError> {
    let began = Instant::now();
    let key = key_of(&training);
    let result = controller.look(&key, training).await;
    controller.context.metrics.reconciled("training", began.elapsed(), result.is_err());
    if result.is_ok() {
        controller.failures.lock().remove(&key);
    }
    result
}

fn on_error(training: Arc<VicunaTraining>, error: &ReconcileError, controller: Arc<Controller>) -> Action {
    let key = key_of(&training);
    let times = {
        let mut failures = controller.failures.lock();
        let times = failures.entry(key.clone()).or_default();
        *times = times.saturating_add(1);
        *times
    };
    let wait = FIRST_RETRY.saturating_mul(1 << (times - 1).min(16)).min(LAST_RETRY);
    tracing::warn!(%error, namespace = key.0, training = key.1, wait_seconds = wait.as_secs(), "a training is looked at again");
    Action::requeue(wait)
}

fn key_of(training: &VicunaTraining) -> Key {
    (training.namespace().unwrap_or_default(), training.name_any())
}

impl Controller {
    /// One look. The status is written whatever happens before.
    async fn look(&self, key: &Key, training: Arc<VicunaTraining>) -> Result<Action, ReconcileError> {
        if training.metadata.deletion_timestamp.is_some() {
            self.forget(&key.0, &key.1);
            return Ok(Action::await_change());
        }
        if training.spec.is_managed_elsewhere() {
            return Ok(Action::await_change());
        }
        let opened = self.open_session(&training);
        let memory = self.memory(key, &training);
        let observed = observe::observe(&self.context, training.clone(), memory, &self.known);
        let now = self.context.coordinator.clock().now_ms();
        let plan = if opened.is_ok() { plan::plan(&observed, now) } else { Plan::unable(&observed) };
        tracing::debug!(
            namespace = key.0,
            training = key.1,
            reason = plan.reason,
            actions = plan.actions.len(),
            "planned"
        );
        let applied = apply::apply(&self.context, &self.applied, &observed, &plan).await;
        self.share(key, &observed, &plan, now);
        let status = status::status(&observed, &plan, &applied, now);
        self.announce(&observed, &status, &applied);
        self.announce_places(&observed, &plan);
        self.context.metrics.training(&key.0, &key.1, training.status.as_ref(), &status);
        let wait = self.write_status(key, &observed, &plan, status, now).await?;
        opened?;
        if let Some(error) = applied.error {
            return Err(error.into());
        }
        self.close_if_over(key, &observed);
        Ok(Action::requeue(wait.min(plan.look_again)))
    }

    fn open_session(&self, training: &Arc<VicunaTraining>) -> Result<(), ReconcileError> {
        let over = training.status.as_ref().is_some_and(status::is_terminal);
        if over {
            return Ok(());
        }
        let job = serde_json::to_string(&job::job(training)?).map_err(ApplyError::Build)?;
        let opening = Opening {
            owner: owner(training)?,
            job,
            target: target(training),
            reproducibility: job::reproducibility(&training.spec.recipe),
            counters: counters(training.status.as_ref()),
            began_at: training.status.as_ref().and_then(|status| unix_ms(status.start_time.as_ref()?)),
            checkpoint: training.status.as_ref().and_then(checkpoint),
        };
        self.context.leadership.check()?;
        let session = self.context.coordinator.ensure(opening).ok_or(ReconcileError::TooMany)?;
        let (namespace, name) = key_of(training);
        session.set_pods(crate::coordinator::feed::facts(&self.context, &namespace, &name, session.uid()));
        Ok(())
    }

    /// A session ends when nothing is left that could speak to it.
    fn close_if_over(&self, key: &Key, observed: &Observed) {
        let over = observed.training.status.as_ref().is_some_and(status::is_terminal);
        if over && observed.pods.is_empty() {
            self.context.coordinator.close(&key.0, &key.1);
        }
    }

    fn memory(&self, key: &Key, training: &VicunaTraining) -> Memory {
        let uid = training.uid().unwrap_or_default();
        let memories = self.memories.lock();
        match memories.get(key) {
            Some((known, memory)) if *known == uid => memory.clone(),
            _ => Memory::recall(training),
        }
    }

    fn remember(&self, key: &Key, training: &VicunaTraining, memory: Memory) {
        let uid = training.uid().unwrap_or_default();
        self.memories.lock().insert(key.clone(), (uid, memory));
    }

    fn forget(&self, namespace: &str, name: &str) {
        let key = (namespace.to_owned(), name.to_owned());
        self.memories.lock().remove(&key);
        self.failures.lock().remove(&key);
        self.known.claim(&key, None);
        self.context.coordinator.close(namespace, name);
        self.context.metrics.forget_training(namespace, name);
    }

    /// Lets all trainings know what this one has found out.
    fn share(&self, key: &Key, observed: &Observed, plan: &Plan, now: Millis) {
        let patience_ms = millis(observed.training.spec.placement.stock_out_after.get());
        for pool in &observed.pools {
            if plan.stocked_out.contains(&pool.name) {
                self.known.stock_outs.note(pool, observed.size, patience_ms, now);
            } else if let Some(at) = observed.newest_node_in(&pool.name) {
                self.known.stock_outs.has_room(pool, observed.size, at);
            }
        }
        for node in &plan.faulty_nodes {
            self.known.faults.note(node, now);
        }
        self.known.claim(key, plan.claim.clone());
    }

    async fn write_status(
        &self,
        key: &Key,
        observed: &Observed,
        plan: &Plan,
        status: VicunaTrainingStatus,
        now: Millis,
    ) -> Result<Duration, ReconcileError> {
        let mut memory = plan.memory.clone();
        memory.ended = Some(&status).filter(|status| status::is_terminal(status)).cloned();
        let stored = observed.training.status.clone().map(|status| (status, 0));
        let before = memory.written.as_ref().or(stored.as_ref());
        let (write, wait) = match status::when_to_write(&status, before, now) {
            Write::Now => (true, Duration::MAX),
            Write::After(wait) => (false, wait),
            Write::No => (false, Duration::MAX),
        };
        if !write {
            self.remember(key, &observed.training, memory);
            return Ok(wait);
        }
        // Counted failures stay counted when the write fails.
        self.remember(key, &observed.training, memory.clone());
        self.context.leadership.check()?;
        patch_status(&self.context, &observed.training, &status).await?;
        memory.written = Some((status, now));
        self.remember(key, &observed.training, memory);
        Ok(wait)
    }

    /// Events for what changed in the conditions.
    fn announce(&self, observed: &Observed, status: &VicunaTrainingStatus, applied: &apply::Applied) {
        let about = observed.training.object_ref(&());
        if observed.training.status.as_ref().is_some_and(status::is_terminal) {
            return;
        }
        let events = &self.context.events;
        let pinned = observed.training.status.as_ref().and_then(|status| status.image.as_ref());
        if let Some(image) = pinned.filter(|image| status.image.as_ref() != Some(image)) {
            let other = &self.context.config.runtime_image;
            let note = format!(
                "The image {image} is given up, as {GIVE_UP_IMAGE_ANNOTATION} asks: pods are made with {other} from now on. Their ranks join if they compute the same bits."
            );
            events.warning(&about, "ImageGivenUp", "Reconcile", note);
        }
        if let Some(why) = super::build::pod::nothing_to_give_up(&observed.training) {
            events.warning(&about, status::NO_SUCH_IMAGE, "Reconcile", why);
        }
        if let Some(obstacle) = status::obstacle(observed, applied) {
            events.warning(&about, obstacle.reason, "Reconcile", obstacle.message);
        }
        for condition in status.conditions.iter().filter(|condition| condition.status == "True") {
            match condition.type_.as_str() {
                "Complete" => events.normal(&about, "Complete", "Train", condition.message.clone()),
                "Failed" => events.warning(&about, &condition.reason, "Train", condition.message.clone()),
                "Suspended" => events.normal(&about, "Suspended", "Suspend", condition.message.clone()),
                _ => {}
            }
        }
        let failure = status.last_failure.as_ref();
        let old = observed.training.status.as_ref().and_then(|status| status.last_failure.as_ref());
        if let Some(failure) = failure.filter(|failure| Some(*failure) != old) {
            events.warning(&about, &format!("{}Failure", failure.cause), "Train", failure.message.clone());
        }
    }

    /// Events for pods that go elsewhere, or are given back.
    fn announce_places(&self, observed: &Observed, plan: &Plan) {
        let about = observed.training.object_ref(&());
        for action in &plan.actions {
            if let plan::Action::AskToLeave { name, why, .. } = action {
                let note = format!("Pod {name} trains until another one takes over: {why}.");
                self.context.events.normal(&about, "Moving", "Place", note);
            }
        }
        if plan.memory.given_back.is_some() && observed.memory.given_back.is_none() {
            let note = format!(
                "Fewer than workers.min pods found nodes within placement.formingTimeout, and other trainings wait for them too: it {}.",
                plan.reason
            );
            self.context.events.warning(&about, "NodesGivenBack", "Place", note);
        }
    }

    fn tell(&self, namespace: &str, name: &str, happenings: &[Happening]) {
        let Some(training) = self.context.watches.training(namespace, name) else { return };
        let about = training.object_ref(&());
        for happening in happenings {
            if let Some((warning, reason, note)) = words(happening) {
                tracing::info!(namespace, training = name, reason, note, "membership");
                if warning {
                    self.context.events.warning(&about, reason, "Coordinate", note);
                } else {
                    self.context.events.normal(&about, reason, "Coordinate", note);
                }
            }
        }
    }
}

impl Plan {
    /// Nothing can be done; the status says why.
    fn unable(observed: &Observed) -> Self {
        Self {
            reason: "the training cannot be coordinated".to_owned(),
            memory: observed.memory.clone(),
            look_again: LAST_RETRY,
            ..Self::default()
        }
    }
}

async fn patch_status(
    context: &Context,
    training: &VicunaTraining,
    status: &VicunaTrainingStatus,
) -> Result<(), ReconcileError> {
    let namespace = training.namespace().unwrap_or_default();
    let api: Api<VicunaTraining> = Api::namespaced(context.client.clone(), &namespace);
    let written = crate::status::apply(&api, training, MANAGER, status).await;
    written.map(drop).map_err(|error| ReconcileError::Status(Box::new(error)))
}

fn owner(training: &VicunaTraining) -> Result<Owner, JobError> {
    let not_stored = || JobError::NotStored(training.name_any());
    Ok(Owner {
        namespace: training.namespace().ok_or_else(not_stored)?,
        name: training.name_any(),
        uid: training.uid().ok_or_else(not_stored)?,
        reference: super::build::owner(training).ok_or_else(not_stored)?,
    })
}

pub(super) fn target(training: &VicunaTraining) -> Target {
    Target {
        min: training.spec.workers.min as usize,
        max: training.spec.workers.max as usize,
        suspend: training.spec.suspend,
        any_class: super::build::pod::given_up_image(training).is_some(),
    }
}

fn counters(status: Option<&VicunaTrainingStatus>) -> Counters {
    let before = status.and_then(|status| status.disruptions.as_ref());
    before.map_or_else(Counters::default, |before| Counters {
        notices: before.notices,
        reclaims: before.reclaims,
        lost_steps: before.lost_steps,
        last_recovery_ms: before.last_recovery.map(|period| millis(period.get())),
    })
}

/// As [`super::status`] wrote it.
fn checkpoint(status: &VicunaTrainingStatus) -> Option<CheckpointReport> {
    let last = status.checkpoint.as_ref()?;
    let ms = |period: Option<Period>| period.map_or(0, |period| millis(period.get()));
    Some(CheckpointReport {
        step: last.step,
        uri: last.uri.clone(),
        digest: last.digest.clone(),
        at_ms: last.time.as_ref().and_then(unix_ms).unwrap_or(0),
        stall_ms: ms(last.stall),
        upload_ms: ms(last.upload),
        interval_ms: ms(last.interval),
        bytes_a_second: 0,
    })
}

/// What is at stake, and what would avoid it.
fn late_checkpoint(needs_ms: Option<u64>, has_ms: u64, bytes: u64, durable_step: Option<u64>) -> String {
    let seconds = |ms: u64| format!("{:.1} s", ms as f64 / 1000.0);
    let size = if bytes > 0 { format!(" of {}", gigabytes(bytes)) } else { String::new() };
    let needs = match needs_ms {
        Some(ms) => format!("A checkpoint{size} takes about {}", seconds(ms)),
        None => format!("How long a checkpoint{size} takes is not known yet"),
    };
    let else_ = match durable_step {
        Some(step) => format!("what the store has is step {step}"),
        None => "all steps are made again, since the store has no checkpoint yet".to_owned(),
    };
    format!(
        "{needs}, and the first node goes in {}: if it is not in time, {else_}. A longer pool notice or more ranks above workers.min avoid that.",
        seconds(has_ms)
    )
}

/// An Event's severity, reason and note; steps and checkpoints have none.
fn words(happening: &Happening) -> Option<(bool, &'static str, String)> {
    Some(match happening {
        Happening::Stepped(_) | Happening::Checkpointed(_) => return None,
        Happening::Milestone { step, steps, loss } => {
            let loss = loss.map_or_else(String::new, |loss| format!(", with a loss of {loss:.4} in the last"));
            (false, "Milestone", format!("{step} of {steps} steps are made{loss}."))
        }
        Happening::Evaluated(EvaluationReport { step, loss }) => {
            (false, "Evaluated", format!("After step {step} the loss on the held-out conversations is {loss:.4}."))
        }
        Happening::Formed { generation, members, base_step, purpose } => {
            let does = match purpose {
                Purpose::Train => "starts after",
                Purpose::Save => "comes together to write down what it holds of",
                Purpose::HandOver => "comes together to hand over what only leavers hold of",
            };
            (false, "Formed", format!("Generation {generation} of {members} ranks {does} step {base_step}."))
        }
        Happening::Stopping { generation, planned, reason } => {
            let how = if *planned { "after the step under way" } else { "at once" };
            (!planned, "Stopping", format!("Generation {generation} stops {how}: {reason}."))
        }
        Happening::Noticed { pod, node, source } => {
            (true, "Noticed", format!("Pod {pod} on node {node} is about to go: {source}."))
        }
        Happening::Reclaimed { pod, node } => (true, "Reclaimed", format!("Pod {pod} went with node {node}.")),
        Happening::Lost { pod, node } => (false, "RankGone", format!("Pod {pod} on node {node} is gone.")),
        Happening::Hung { pod, node } => (
            true,
            "RankHung",
            format!("The rank in pod {pod} on node {node} does not answer: it is replaced if it stays so."),
        ),
        Happening::CheckpointWillBeLate { needs_ms, has_ms, bytes, durable_step } => {
            (true, "CheckpointWillBeLate", late_checkpoint(*needs_ms, *has_ms, *bytes, *durable_step))
        }
        Happening::CheckpointHeldUp { message, durable_step } => {
            let has = durable_step.map_or("no checkpoint yet".to_owned(), |step| format!("step {step}"));
            let note =
                format!("The training goes on, but its checkpoint waits for the store, which has {has}: {message}");
            (true, "CheckpointHeldUp", note)
        }
        Happening::StepsLost { steps, base_step } => {
            (true, "StepsLost", format!("{steps} steps are made again, from the checkpoint of step {base_step}."))
        }
        Happening::Recovered { generation, after_ms, phases } => {
            let s = |ms: u64| ms as f64 / 1000.0;
            let RecoveryPhases { detect, agree, restore, step } = *phases;
            let message = format!(
                "Generation {generation} makes steps, {:.1} s after the last one: {:.1} s to notice, {:.1} s to agree, {:.1} s to move state, {:.1} s for the step.",
                s(*after_ms),
                s(detect),
                s(agree),
                s(restore),
                s(step)
            );
            (false, "Recovered", message)
        }
        Happening::NumericsMismatch { pod, node } => (
            true,
            "NumericsMismatch",
            format!(
                "Pod {pod} on node {node} computes other bits than the other ranks and is kept out: give the pool nodes of one kind."
            ),
        ),
        Happening::ManifestUnusable { key, message } => {
            (true, "CheckpointUnusable", format!("The checkpoint {key} is left out for an older one: {message}"))
        }
        Happening::StateMismatch { generation } => (
            true,
            "StateMismatch",
            format!(
                "Ranks of generation {generation} loaded different weights: is the model or a checkpoint being overwritten?"
            ),
        ),
    })
}
