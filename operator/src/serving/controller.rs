//! When to look at a serving, and the four steps of each look.

use super::apply::{ApplyError, apply};
use super::memory::Remembered;
use super::names::serving_of;
use super::observe::{Observed, observe};
use super::plan::{Plan, plan};
use super::status::status;
use crate::config::{MANAGER, SERVING_LABEL};
use crate::context::Context;
use crate::leader::NotLeader;
use crate::watches::Change;
use futures::stream::{self, Stream, StreamExt};
use k8s_openapi::jiff::Timestamp;
use kube::api::Api;
use kube::runtime::controller::{Action, Config};
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt, applier, watcher};
use kube::{Resource, ResourceExt};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Instant, SystemTime};
use tokio::sync::broadcast;
use vicuna_crds::serving::condition::READY;
use vicuna_crds::{Condition, VicunaServing, VicunaServingStatus};

/// Servings that are reconciled at the same time.
const CONCURRENCY: u16 = 8;
/// Reasons that are part of a serving's usual life, and no Event.
const USUAL: [&str; 4] = ["WorkersStarting", "ScaledToZero", "TrainingNotComplete", "WorkersReady"];

#[derive(Debug, thiserror::Error)]
enum ReconcileError {
    #[error("the serving's pods could not be listed: {0}")]
    Observe(#[source] kube::Error),
    #[error(transparent)]
    Apply(#[from] ApplyError),
    #[error("the status could not be written: {0}")]
    Status(#[source] kube::Error),
    #[error(transparent)]
    NotLeader(#[from] NotLeader),
}

/// What the steps share.
struct Work {
    context: Arc<Context>,
    remembered: Mutex<HashMap<ObjectRef<VicunaServing>, Remembered>>,
}

/// Reconciles all servings until the lease is lost. Call it anew when it is ours again.
pub async fn run(context: Arc<Context>) {
    let (servings, writer) = reflector::store();
    let work = Arc::new(Work { context: context.clone(), remembered: Mutex::default() });
    let changes = related(context.watches.subscribe(), context.clone(), servings.clone());
    let woken = woken(context.loads.woken(), servings.clone());
    let own = own(work.clone(), servings.clone(), writer);
    let queue = stream::select(own.boxed(), stream::select(changes.boxed(), woken.boxed())).map(Ok::<_, Infallible>);
    let lost = context.leadership.clone();
    let config = Config::default().concurrency(CONCURRENCY);
    applier(|serving, work| Box::pin(reconcile(serving, work)), retry, work, servings, queue, config)
        .take_until(async move { lost.lost().await })
        .for_each(|outcome| async move {
            if let Err(error) = outcome {
                tracing::debug!(%error, "a serving was not reconciled");
            }
        })
        .await;
}

/// Servings that are new or changed. What is gone is forgotten.
fn own(
    work: Arc<Work>,
    servings: Store<VicunaServing>,
    writer: reflector::store::Writer<VicunaServing>,
) -> impl Stream<Item = ObjectRef<VicunaServing>> {
    let api: Api<VicunaServing> = Api::all(work.context.client.clone());
    watcher(api, watcher::Config::default()).default_backoff().reflect(writer).filter_map(move |event| {
        let found = match event {
            Ok(watcher::Event::Apply(serving) | watcher::Event::InitApply(serving)) => {
                Some(ObjectRef::from_obj(&serving))
            }
            Ok(watcher::Event::Delete(serving)) => {
                work.forget(&ObjectRef::from_obj(&serving));
                None
            }
            Ok(watcher::Event::InitDone) => {
                work.forget_all_but(&servings);
                None
            }
            Ok(watcher::Event::Init) => None,
            Err(error) => {
                tracing::warn!(%error, kind = "VicunaServing", "a watch broke and is retried");
                None
            }
        };
        std::future::ready(found)
    })
}

/// Servings that requests begin to wait for: one at zero is woken at once.
fn woken(
    names: broadcast::Receiver<String>,
    servings: Store<VicunaServing>,
) -> impl Stream<Item = ObjectRef<VicunaServing>> {
    stream::unfold(names, |mut names| async move {
        loop {
            match names.recv().await {
                Ok(name) => return Some((name, names)),
                // Those that were missed are seen at their next look.
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    })
    .filter_map(move |name| {
        let known = serving_of(&name).filter(|serving| servings.get(serving).is_some());
        std::future::ready(known)
    })
}

/// Servings whose pods, nodes or training changed.
fn related(
    changes: broadcast::Receiver<Change>,
    context: Arc<Context>,
    servings: Store<VicunaServing>,
) -> impl Stream<Item = ObjectRef<VicunaServing>> {
    stream::unfold(changes, |mut changes| async move {
        match changes.recv().await {
            Ok(change) => Some((Some(change), changes)),
            Err(broadcast::error::RecvError::Lagged(_)) => Some((None, changes)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    })
    .flat_map(move |change| {
        stream::iter(match change {
            Some(change) => concerned(&change, &context, &servings),
            // Too many to know: all.
            None => servings.state().iter().map(|serving| ObjectRef::from_obj(&**serving)).collect(),
        })
    })
}

fn concerned(change: &Change, context: &Context, servings: &Store<VicunaServing>) -> Vec<ObjectRef<VicunaServing>> {
    let serving = |namespace: &str, name: &str| ObjectRef::new(name).within(namespace);
    let known = |reference: &ObjectRef<VicunaServing>| servings.get(reference).is_some();
    match change {
        Change::ServingPod(namespace, name) => vec![serving(namespace, name)].into_iter().filter(known).collect(),
        Change::Node(node) => {
            let pods = context
                .watches
                .pods
                .state_filter(|pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()) == Some(node));
            let of = |pod: &Arc<k8s_openapi::api::core::v1::Pod>| {
                let name = pod.labels().get(SERVING_LABEL)?;
                Some(serving(pod.metadata.namespace.as_deref()?, name))
            };
            pods.iter().filter_map(of).filter(known).collect()
        }
        Change::Training(namespace, name) => servings
            .state_filter(|serving| {
                let model = &serving.spec.model;
                let mut sources =
                    std::iter::once(&model.from).chain(model.adapters.iter().map(|adapter| &adapter.from));
                serving.metadata.namespace.as_ref() == Some(namespace)
                    && sources.any(|from| from.training_ref.as_ref().is_some_and(|training| training.name == *name))
            })
            .iter()
            .map(|serving| ObjectRef::from_obj(&**serving))
            .collect(),
        Change::TrainingPod(..) => Vec::new(),
    }
}

impl Work {
    fn forget(&self, serving: &ObjectRef<VicunaServing>) {
        self.remembered.lock().remove(serving);
        let namespace = serving.namespace.as_deref().unwrap_or_default();
        self.context.metrics.forget_serving(namespace, &serving.name);
    }

    /// What was deleted while the watch was broken.
    fn forget_all_but(&self, servings: &Store<VicunaServing>) {
        let known: Vec<_> = self.remembered.lock().keys().cloned().collect();
        for serving in known.iter().filter(|serving| servings.get(serving).is_none()) {
            self.forget(serving);
        }
    }

    fn recall(&self, serving: &VicunaServing) -> Remembered {
        let last = self.remembered.lock().get(&ObjectRef::from_obj(serving)).cloned();
        Remembered::of(serving, last)
    }

    fn remember(&self, serving: &VicunaServing, remembered: Remembered) {
        self.remembered.lock().insert(ObjectRef::from_obj(serving), remembered);
    }
}

async fn reconcile(serving: Arc<VicunaServing>, work: Arc<Work>) -> Result<Action, ReconcileError> {
    let started = Instant::now();
    let outcome = look(serving, &work).await;
    work.context.metrics.reconciled("serving", started.elapsed(), outcome.is_err());
    outcome
}

async fn look(serving: Arc<VicunaServing>, work: &Work) -> Result<Action, ReconcileError> {
    let context = &work.context;
    if serving.metadata.deletion_timestamp.is_some() {
        // What it owns goes with it.
        return Ok(Action::await_change());
    }
    context.leadership.check()?;
    let mut remembered = work.recall(&serving);
    let serving = with_last_status(serving, &remembered);
    let observed =
        observe(context, serving.clone(), remembered.memory.clone()).await.map_err(ReconcileError::Observe)?;
    let plan = plan(&observed, SystemTime::now());
    let applied = apply(context, &observed, &plan).await;
    let status = status(&observed, &plan, &applied, &context.config, Timestamp::now());
    tell(context, &observed, &plan, &status);
    remembered.memory = plan.memory;
    remembered.status = Some(status.clone());
    let written = write_status(context, &serving, status, &mut remembered).await;
    if written.is_ok() && applied.error().is_none() {
        remembered.succeeded();
    }
    work.remember(&serving, remembered);
    written?;
    match applied.into_error() {
        Some(error) => Err(error.into()),
        None => Ok(Action::requeue(plan.again_after)),
    }
}

fn with_last_status(mut serving: Arc<VicunaServing>, remembered: &Remembered) -> Arc<VicunaServing> {
    if let Some(status) = &remembered.status {
        Arc::make_mut(&mut serving).status = Some(status.clone());
    }
    serving
}

async fn write_status(
    context: &Context,
    serving: &VicunaServing,
    status: VicunaServingStatus,
    remembered: &mut Remembered,
) -> Result<(), ReconcileError> {
    let now = Instant::now();
    if !remembered.is_due(&status, now) {
        return Ok(());
    }
    context.leadership.check()?;
    let namespace = serving.namespace().unwrap_or_default();
    let api: Api<VicunaServing> = Api::namespaced(context.client.clone(), &namespace);
    if crate::status::apply(&api, serving, MANAGER, &status).await.map_err(ReconcileError::Status)? {
        remembered.wrote(status, now);
    }
    Ok(())
}

/// Metrics, and Events about what changed.
fn tell(context: &Context, observed: &Observed, plan: &Plan, status: &VicunaServingStatus) {
    let serving = &observed.serving;
    let about = serving.object_ref(&());
    let replicas = status.replicas.clone().unwrap_or_default();
    let (namespace, name) = (serving.namespace().unwrap_or_default(), serving.name_any());
    for (state, count) in [("desired", replicas.desired), ("ready", replicas.ready)] {
        let gauge = context.metrics.serving_replicas.with_label_values(&[&namespace, &name, state]);
        gauge.set(count.into());
    }
    let price = |pool: &str| serving.spec.pools.iter().find(|it| it.name == pool).and_then(|pool| pool.hourly_price);
    let hourly: f64 = observed.workers.iter().filter_map(|worker| price(&worker.pool)).sum();
    context.metrics.serving_hourly_price.with_label_values(&[&namespace, &name]).set(hourly);
    let scaling = &plan.scaling;
    if scaling.before != scaling.desired {
        tracing::info!(
            namespace,
            serving = name,
            from = scaling.before,
            to = scaling.desired,
            reason = scaling.reason,
            "scaled"
        );
        let note = format!("From {} to {} workers: {}.", scaling.before, scaling.desired, scaling.reason);
        context.events.normal(&about, "Scaled", "Scale", note);
    }
    let before = serving.status.as_ref().and_then(|status| ready(&status.conditions));
    let Some(now) = ready(&status.conditions) else { return };
    if now.status == "True" && before.is_none_or(|before| before.status != "True") {
        context.events.normal(&about, "Ready", "Serve", now.message.clone());
    }
    // What is said twice in a row is no mere progress.
    let said_before = before.is_some_and(|before| before.reason == now.reason && before.message == now.message);
    if said_before && !USUAL.contains(&now.reason.as_str()) {
        context.events.warning(&about, &now.reason, "Serve", now.message.clone());
    }
}

fn ready(conditions: &[Condition]) -> Option<&Condition> {
    conditions.iter().find(|condition| condition.type_ == READY)
}

fn retry(serving: Arc<VicunaServing>, error: &ReconcileError, work: Arc<Work>) -> Action {
    let mut remembered = work.recall(&serving);
    let pause = remembered.failed();
    work.remember(&serving, remembered);
    let namespace = serving.namespace().unwrap_or_default();
    tracing::warn!(%error, namespace, serving = serving.name_any(), retry_seconds = pause.as_secs(), "reconciling failed");
    Action::requeue(pause)
}
