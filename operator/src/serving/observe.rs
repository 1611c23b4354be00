//! What there is: the serving, its model's address, its pods, their nodes and what is asked of it.

pub mod readiness;

use super::build::pod::{self as worker_pod, REVISION_LABEL};
use super::memory::Memory;
use super::names::{adapter_name, public_names};
use crate::config::{POOL_LABEL, SERVING_LABEL};
use crate::context::Context;
use crate::loads::Demand;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use vicuna_crds::serving::ServedFrom;
use vicuna_crds::training::{Method, TrainingState};
use vicuna_crds::{VicunaServing, VicunaTraining};

/// Everything that a plan may depend on, besides the time.
#[derive(Clone, Debug)]
pub struct Observed {
    pub serving: Arc<VicunaServing>,
    pub model: Model,
    pub workers: Vec<Worker>,
    /// Nodes that are to get no new worker.
    pub avoided_nodes: Vec<String>,
    /// `None`: no gateway has reported yet.
    pub demand: Option<Demand>,
    /// What earlier plans left for this one.
    pub memory: Memory,
    /// Digest of what a worker pod would be now.
    pub revision: Option<String>,
}

/// Where the weights are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Model {
    Known(Source),
    /// Not there yet: reason in one word, and a sentence.
    Missing {
        reason: &'static str,
        message: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub uri: String,
    /// Digest of a training's result.
    pub digest: Option<String>,
    /// Name of the Secret that reads all of it.
    pub credentials: Option<String>,
    pub adapters: Vec<AdapterSource>,
}

/// An adapter that is offered beside the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterSource {
    /// Its public name.
    pub name: String,
    pub uri: String,
    /// Digest of a training's result.
    pub digest: Option<String>,
}

/// One worker pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Worker {
    pub name: String,
    pub uid: String,
    pub address: Option<String>,
    pub pool: String,
    pub revision: String,
    pub node: Option<String>,
    pub created: SystemTime,
    pub life: Life,
    /// A warning that it or its node goes.
    pub notice: Option<Notice>,
    /// What keeps it from being ready.
    pub trouble: Option<Trouble>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// On its way: no node, or not ready yet.
    Coming,
    Ready,
    /// Being deleted.
    Leaving,
    /// Ended by itself, by eviction or with its node: it never comes back.
    Ended,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    pub source: String,
    /// When it is gone; `None`: nobody knows, there is no hurry.
    pub deadline: Option<SystemTime>,
}

/// Why a worker is not ready: a reason in one word, and a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    pub reason: &'static str,
    pub message: String,
    /// No node of the pool takes it, since then.
    pub unschedulable_since: Option<SystemTime>,
}

/// Reads all of it. Pods are listed and not taken from the cache, so that a pod that was just made is
/// there and is not made twice.
pub async fn observe(context: &Context, serving: Arc<VicunaServing>, memory: Memory) -> Result<Observed, kube::Error> {
    let namespace = serving.namespace().unwrap_or_default();
    let name = serving.name_any();
    let mut workers = workers(context, &namespace, &name).await?;
    readiness::ask(&mut workers).await;
    let model = model(&serving, |training| context.watches.training(&namespace, training));
    let revision = match &model {
        Model::Known(source) => Some(worker_pod::revision(&serving, source, &context.config)),
        Model::Missing { .. } => None,
    };
    let names = public_names(&serving);
    names.iter().for_each(|name| context.loads.serve(name, Instant::now()));
    Ok(Observed {
        avoided_nodes: avoided_nodes(context),
        demand: context.loads.demand(&names),
        serving,
        model,
        workers,
        memory,
        revision,
    })
}

async fn workers(context: &Context, namespace: &str, name: &str) -> Result<Vec<Worker>, kube::Error> {
    let pods: Api<Pod> = Api::namespaced(context.client.clone(), namespace);
    let ours = ListParams::default().labels(&format!("{SERVING_LABEL}={name}"));
    let now = SystemTime::now();
    let found = pods.list(&ours).await?.items.into_iter();
    Ok(found.map(|pod| Worker { notice: notice(context, &pod, now), ..worker(&pod) }).collect())
}

fn notice(context: &Context, pod: &Pod, now: SystemTime) -> Option<Notice> {
    let name = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
    let node = name.and_then(|name| context.watches.node(name));
    let departure = context.notices.departure(pod, node.as_deref(), unix_ms(now))?;
    Some(Notice {
        source: departure.source,
        deadline: (departure.deadline_ms > 0)
            .then(|| SystemTime::UNIX_EPOCH + Duration::from_millis(departure.deadline_ms)),
    })
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn avoided_nodes(context: &Context) -> Vec<String> {
    let avoided = context.watches.nodes.state_filter(|node| context.notices.is_avoided(node));
    avoided.iter().map(|node| node.name_any()).collect()
}

/// The addresses of the model and its adapters, or what they wait for.
fn model(serving: &VicunaServing, training: impl Fn(&str) -> Option<Arc<VicunaTraining>>) -> Model {
    sources(serving, training).map_or_else(|missing| missing, Model::Known)
}

/// The error is the first that is missing.
fn sources(serving: &VicunaServing, training: impl Fn(&str) -> Option<Arc<VicunaTraining>>) -> Result<Source, Model> {
    let spec = &serving.spec.model;
    let base = found(&spec.from, "spec.model", &training)?;
    let mut credentials = spec.credentials.as_ref().map(|secret| secret.name.clone()).or(base.credentials);
    let mut adapters = Vec::new();
    for adapter in &spec.adapters {
        let field = format!("spec.model.adapters[{}]", adapter.name);
        let source = found(&adapter.from, &field, &training)?;
        if source.method == Some(Method::Full) {
            return Err(not_an_adapter(&adapter.from, &field));
        }
        credentials = credentials.or(source.credentials);
        adapters.push(AdapterSource {
            name: adapter_name(serving, &adapter.name),
            uri: source.uri,
            digest: source.digest,
        });
    }
    Ok(Source { uri: base.uri, digest: base.digest, credentials, adapters })
}

/// What one address or training says.
struct Found {
    uri: String,
    digest: Option<String>,
    credentials: Option<String>,
    /// How it was trained, if a training is named.
    method: Option<Method>,
}

fn found(
    from: &ServedFrom,
    field: &str,
    training: impl Fn(&str) -> Option<Arc<VicunaTraining>>,
) -> Result<Found, Model> {
    if let Some(uri) = &from.uri {
        return Ok(Found { uri: uri.clone(), digest: None, credentials: None, method: None });
    }
    let Some(name) = from.training_ref.as_ref().map(|training| &training.name) else {
        let message = format!("Set {field}.from.uri or {field}.from.trainingRef.");
        return Err(Model::Missing { reason: "NoSource", message });
    };
    let Some(training) = training(name) else {
        let message = format!(
            "There is no VicunaTraining {name} in this namespace: create it or correct {field}.from.trainingRef."
        );
        return Err(Model::Missing { reason: "TrainingNotFound", message });
    };
    result_of(&training)
}

fn not_an_adapter(from: &ServedFrom, field: &str) -> Model {
    let name = from.training_ref.as_ref().map_or("", |training| &training.name);
    let message = format!(
        "The training {name} makes a whole model and no adapter: name one with recipe.method LoRA or QLoRA in {field}.from.trainingRef, or serve {name} by a VicunaServing of its own."
    );
    Model::Missing { reason: "NotAnAdapter", message }
}

fn result_of(training: &VicunaTraining) -> Result<Found, Model> {
    let name = training.name_any();
    let status = training.status.as_ref();
    if let Some(result) = status.and_then(|status| status.result.as_ref()) {
        return Ok(Found {
            uri: result.uri.clone(),
            digest: Some(result.digest.clone()),
            credentials: training.spec.checkpoint.credentials.as_ref().map(|secret| secret.name.clone()),
            method: Some(training.spec.recipe.method),
        });
    }
    Err(match status.and_then(|status| status.state) {
        Some(TrainingState::Failed) => Model::Missing {
            reason: "TrainingFailed",
            message: format!(
                "The training {name} failed and has no result: see its status.lastFailure, and create a new one."
            ),
        },
        state => Model::Missing {
            reason: "TrainingNotComplete",
            message: format!(
                "Waiting for the training {name} to complete; it is {}.",
                state.map_or("not started".to_owned(), |state| format!("{state:?}"))
            ),
        },
    })
}

fn worker(pod: &Pod) -> Worker {
    let label = |key: &str| pod.labels().get(key).cloned().unwrap_or_default();
    let life = life(pod);
    Worker {
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        address: pod.status.as_ref().and_then(|status| status.pod_ip.clone()),
        pool: label(POOL_LABEL),
        revision: label(REVISION_LABEL),
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
        created: pod.creation_timestamp().map_or(SystemTime::UNIX_EPOCH, |time| time.0.into()),
        life,
        notice: None,
        trouble: match life {
            Life::Coming => trouble(pod),
            Life::Ready | Life::Leaving | Life::Ended => None,
        },
    }
}

fn life(pod: &Pod) -> Life {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    if matches!(phase, Some("Failed" | "Succeeded")) {
        return Life::Ended;
    }
    if pod.metadata.deletion_timestamp.is_some() {
        return Life::Leaving;
    }
    match condition(pod, "Ready") {
        Some(("True", ..)) => Life::Ready,
        _ => Life::Coming,
    }
}

/// Status, message and time of a pod's condition.
fn condition<'a>(pod: &'a Pod, type_: &str) -> Option<(&'a str, &'a str, Option<Timestamp>)> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let found = conditions.iter().find(|condition| condition.type_ == type_)?;
    let message = found.message.as_deref().unwrap_or_default();
    let since = found.last_transition_time.as_ref().map(|time| time.0);
    Some((&found.status, message, since))
}

fn trouble(pod: &Pod) -> Option<Trouble> {
    if let Some(("False", message, since)) = condition(pod, "PodScheduled") {
        return Some(Trouble {
            reason: "Unschedulable",
            message: format!(
                "No node of the pool takes the pod {}: {message} Free or add nodes, or change spec.pools or spec.worker.resources.",
                pod.name_any()
            ),
            unschedulable_since: Some(since.map_or(SystemTime::UNIX_EPOCH, Into::into)),
        });
    }
    let containers = pod.status.as_ref()?.container_statuses.as_ref()?;
    containers.iter().find_map(container_trouble)
}

fn container_trouble(container: &ContainerStatus) -> Option<Trouble> {
    let (reason, message) = waiting(container).or_else(|| ended(container))?;
    Some(Trouble { reason, message, unschedulable_since: None })
}

fn waiting(container: &ContainerStatus) -> Option<(&'static str, String)> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let said = waiting.message.as_deref().unwrap_or("no details are given");
    match waiting.reason.as_deref()? {
        "ErrImagePull" | "ImagePullBackOff" | "ErrImageNeverPull" | "InvalidImageName" => Some((
            "ImagePullFailed",
            format!(
                "The image {} cannot be pulled: {said}. Correct the operator's runtime image or the registry's credentials.",
                container.image
            ),
        )),
        "CreateContainerConfigError" if said.contains("secret") => Some((
            "SecretMissing",
            format!("The worker cannot start: {said}. Create the Secret that spec.model.credentials names."),
        )),
        "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => {
            Some(("ContainerNotStarted", format!("The worker cannot start: {said}.")))
        }
        _ => None,
    }
}

fn ended(container: &ContainerStatus) -> Option<(&'static str, String)> {
    let last = |state: &Option<k8s_openapi::api::core::v1::ContainerState>| state.as_ref()?.terminated.clone();
    let ended = last(&container.state).or_else(|| last(&container.last_state))?;
    if ended.reason.as_deref() == Some("OOMKilled") {
        return Some((
            "OutOfMemory",
            "The worker ran out of memory: raise spec.worker.resources.limits.memory, or lower spec.worker.slots."
                .to_owned(),
        ));
    }
    let said = ended.message.as_deref().map(str::trim).filter(|said| !said.is_empty());
    let code = ended.exit_code;
    Some((
        "WorkerFailed",
        match said {
            Some(said) => format!("The worker ended with exit code {code}: {said}"),
            None => format!("The worker ended with exit code {code}; see its log."),
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(status: serde_json::Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": "p", "labels": { POOL_LABEL: "spot", REVISION_LABEL: "r" } },
            "status": status,
        }))
        .unwrap()
    }

    fn served(from: serde_json::Value) -> VicunaServing {
        serde_json::from_value(json!({
            "apiVersion": "vicuna.dev/v1alpha1", "kind": "VicunaServing", "metadata": { "name": "s", "namespace": "n" },
            "spec": { "model": { "from": from }, "replicas": 1 }
        }))
        .unwrap()
    }

    fn trained(status: serde_json::Value) -> Arc<VicunaTraining> {
        Arc::new(
            serde_json::from_value(json!({
                "apiVersion": "vicuna.dev/v1alpha1", "kind": "VicunaTraining", "metadata": { "name": "t" },
                "spec": {
                    "model": { "from": "s3://b/m" }, "dataset": [{ "from": "s3://b/d" }], "recipe": { "steps": 1 },
                    "workers": { "max": 1 },
                    "checkpoint": { "to": "s3://b/c", "credentials": { "name": "keys" } }
                },
                "status": status
            }))
            .unwrap(),
        )
    }

    #[test]
    fn a_serving_waits_for_its_training_and_then_uses_its_credentials() {
        let serving = served(json!({ "trainingRef": { "name": "t" } }));
        let Model::Missing { reason, message } = model(&serving, |_| Some(trained(json!({ "state": "Running" }))))
        else {
            panic!("there is no result yet");
        };
        assert_eq!(reason, "TrainingNotComplete");
        assert!(message.contains("training t") && message.contains("Running"), "{message}");

        let done = trained(json!({ "result": { "uri": "s3://b/c/result", "digest": "d" } }));
        let Model::Known(source) = model(&serving, |_| Some(done.clone())) else {
            panic!("there is a result");
        };
        assert_eq!(source.uri, "s3://b/c/result");
        assert_eq!(source.credentials.as_deref(), Some("keys"));
    }

    #[test]
    fn adapters_come_from_addresses_and_trainings_of_their_method() {
        let mut serving = served(json!({ "uri": "s3://b/base" }));
        let adapters = json!([
            { "name": "plain", "from": { "uri": "s3://b/adapter" } },
            { "name": "tuned", "from": { "trainingRef": { "name": "t" } } }
        ]);
        serving.spec.model.adapters = serde_json::from_value(adapters).unwrap();
        let with = |method: &str| {
            let mut training = (*trained(json!({ "result": { "uri": "s3://b/c/result", "digest": "d" } }))).clone();
            training.spec.recipe.method = serde_json::from_value(json!(method)).unwrap();
            Arc::new(training)
        };
        let Model::Known(source) = model(&serving, |_| Some(with("QLoRA"))) else { panic!("there is a result") };
        let found: Vec<_> = source.adapters.iter().map(|it| (it.name.as_str(), it.uri.as_str())).collect();
        assert_eq!(found, [("n/s:plain", "s3://b/adapter"), ("n/s:tuned", "s3://b/c/result")]);
        assert_eq!((source.adapters[1].digest.as_deref(), source.credentials.as_deref()), (Some("d"), Some("keys")));
        let Model::Missing { reason, message } = model(&serving, |_| Some(with("Full"))) else {
            panic!("a whole model is no adapter");
        };
        assert_eq!(reason, "NotAnAdapter");
        assert!(message.contains("adapters[tuned]"), "{message}");
    }

    #[test]
    fn a_training_that_is_not_there_is_named() {
        let serving = served(json!({ "trainingRef": { "name": "nobody" } }));
        let Model::Missing { reason, message } = model(&serving, |_| None) else {
            panic!("there is no training");
        };
        assert_eq!(reason, "TrainingNotFound");
        assert!(message.contains("nobody"));
    }

    #[test]
    fn what_keeps_a_pod_from_being_ready_is_told_with_what_to_do() {
        let waiting = |reason: &str, message: &str| {
            worker(&pod(json!({ "phase": "Pending", "containerStatuses": [{
                "name": "worker", "image": "runtime:1", "imageID": "", "ready": false, "restartCount": 0,
                "state": { "waiting": { "reason": reason, "message": message } } }] })))
            .trouble
            .unwrap()
        };
        let pull = waiting("ImagePullBackOff", "not found");
        assert_eq!(pull.reason, "ImagePullFailed");
        assert!(pull.message.contains("runtime:1"));
        let secret = waiting("CreateContainerConfigError", "secret \"keys\" not found");
        assert_eq!(secret.reason, "SecretMissing");
        let unschedulable = worker(&pod(json!({ "phase": "Pending", "conditions": [{
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available.",
            "lastTransitionTime": "2026-01-01T00:00:00Z" }] })))
        .trouble
        .unwrap();
        assert_eq!(unschedulable.reason, "Unschedulable");
        assert!(unschedulable.unschedulable_since.is_some());
    }

    #[test]
    fn a_worker_that_ended_tells_its_own_reason() {
        let trouble = worker(&pod(json!({ "phase": "Running", "containerStatuses": [{
            "name": "worker", "image": "i", "imageID": "", "ready": false, "restartCount": 3,
            "state": { "waiting": { "reason": "CrashLoopBackOff", "message": "back-off" } },
            "lastState": { "terminated": { "exitCode": 1, "message": "there is no bucket vicuna: create it\n" } } }] })))
        .trouble
        .unwrap();
        assert_eq!(trouble.reason, "WorkerFailed");
        assert!(trouble.message.ends_with("there is no bucket vicuna: create it"));
    }

    #[test]
    fn a_pod_that_is_being_deleted_counts_as_leaving_even_if_ready() {
        let mut leaving = pod(json!({ "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] }));
        assert_eq!(worker(&leaving).life, Life::Ready);
        leaving.metadata.deletion_timestamp =
            Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::UNIX_EPOCH));
        assert_eq!(worker(&leaving).life, Life::Leaving);
    }
}
