//! What there is: the training, its pods with what is wrong with them, and its membership.

use super::memory::Memory;
use crate::config::{POOL_LABEL, TRAINING_LABEL};
use crate::context::Context;
use crate::coordinator::feed::{belongs_to, has_ended};
use crate::coordinator::membership::{Departure, Millis};
use crate::coordinator::report::Report;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod, PodCondition};
use kube::ResourceExt;
use std::collections::BTreeSet;
use std::sync::Arc;
use vicuna_crds::{Pool, VicunaTraining};

/// Nodes that new pods are kept away from, at most.
const MAX_AVOIDED: usize = 64;

/// Everything that a plan may depend on, besides the time.
#[derive(Clone, Debug)]
pub struct Observed {
    pub training: Arc<VicunaTraining>,
    /// Never empty.
    pub pools: Vec<Pool>,
    pub pods: Vec<PodView>,
    /// Names of all pods with the training's label, also a namesake's.
    pub names: BTreeSet<String>,
    /// `None`: the coordinator has not read the record yet.
    pub report: Option<Report>,
    /// Names of pools that lately had no node for a pod.
    pub stocked_out: BTreeSet<String>,
    /// Nodes that are about to go.
    pub avoided_nodes: BTreeSet<String>,
    pub memory: Memory,
}

/// One pod, reduced to what decides.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodView {
    pub name: String,
    pub uid: String,
    pub pool: String,
    pub node: Option<String>,
    /// Its container runs, or ran.
    pub started: bool,
    /// It is ready for the PodDisruptionBudget.
    pub ready: bool,
    pub deleting: bool,
    pub departure: Option<Departure>,
    pub ended: Option<End>,
    /// What keeps it from starting.
    pub trouble: Option<Trouble>,
}

/// How a pod ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct End {
    pub succeeded: bool,
    pub exit_code: Option<i32>,
    /// The container's or the pod's reason: `OOMKilled`, `Evicted`, `NodeShutdown`, ….
    pub reason: String,
    pub message: String,
    /// Its node is gone or not ready.
    pub with_its_node: bool,
}

/// Why a pod does not start.
#[derive(Clone, Debug, PartialEq)]
pub enum Trouble {
    Unschedulable {
        since_ms: Millis,
        message: String,
    },
    ImagePull {
        image: String,
        message: String,
    },
    /// The Secret is missing, most often.
    Configuration {
        message: String,
    },
}

/// Reads all of it from caches.
pub fn observe(
    context: &Context,
    training: Arc<VicunaTraining>,
    memory: Memory,
    stocked_out: BTreeSet<String>,
) -> Observed {
    let namespace = training.namespace().unwrap_or_default();
    let now = context.coordinator.clock().now_ms();
    let pods = context.watches.pods_of(&namespace, TRAINING_LABEL, &training.name_any());
    let uid = training.uid().unwrap_or_default();
    let ours = pods.iter().filter(|pod| belongs_to(pod, &uid));
    Observed {
        pools: Pool::of(&training.spec.pools),
        pods: ours.map(|pod| view(context, pod, now)).collect(),
        names: pods.iter().map(|pod| pod.name_any()).collect(),
        report: context.coordinator.report(&training),
        stocked_out,
        avoided_nodes: context.notices.leaving().into_keys().take(MAX_AVOIDED).collect(),
        memory,
        training,
    }
}

fn view(context: &Context, pod: &Pod, now: Millis) -> PodView {
    let node_name = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    let node = node_name.as_deref().and_then(|name| context.watches.node(name));
    let departure = context.notices.departure(pod, node.as_deref(), now);
    pod_view(pod, departure, node_name.is_some() && node.is_none())
}

/// The view of a pod; `orphaned`: its node does not exist.
pub fn pod_view(pod: &Pod, departure: Option<Departure>, orphaned: bool) -> PodView {
    PodView {
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        pool: pod.labels().get(POOL_LABEL).cloned().unwrap_or_default(),
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
        started: container(pod).is_some_and(|status| {
            state(status).is_some_and(|state| state.running.is_some() || state.terminated.is_some())
        }),
        ready: condition(pod, "Ready").is_some_and(|condition| condition.status == "True"),
        deleting: pod.metadata.deletion_timestamp.is_some(),
        ended: end(pod, orphaned, departure.as_ref()),
        departure,
        trouble: trouble(pod),
    }
}

fn container(pod: &Pod) -> Option<&ContainerStatus> {
    pod.status.as_ref()?.container_statuses.as_ref()?.first()
}

fn state(status: &ContainerStatus) -> Option<&ContainerState> {
    status.state.as_ref()
}

fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a PodCondition> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == kind)
}

fn end(pod: &Pod, orphaned: bool, departure: Option<&Departure>) -> Option<End> {
    let ended = has_ended(pod);
    if !ended && !orphaned {
        return None;
    }
    let status = pod.status.as_ref();
    let terminated = container(pod).and_then(state).and_then(|state| state.terminated.as_ref());
    let of_container = terminated.and_then(|terminated| terminated.reason.clone());
    let of_pod = status.and_then(|status| status.reason.clone());
    Some(End {
        succeeded: ended && status.is_some_and(|status| status.phase.as_deref() == Some("Succeeded")),
        exit_code: terminated.map(|terminated| terminated.exit_code),
        reason: of_pod.or(of_container).unwrap_or_default(),
        message: terminated
            .and_then(|terminated| terminated.message.clone())
            .or_else(|| status.and_then(|status| status.message.clone()))
            .unwrap_or_default(),
        with_its_node: orphaned || departure.is_some_and(|departure| departure.reclaim),
    })
}

fn trouble(pod: &Pod) -> Option<Trouble> {
    if let Some(condition) = condition(pod, "PodScheduled").filter(|condition| condition.status == "False") {
        let since = condition.last_transition_time.as_ref().map(|time| time.0.as_millisecond());
        return Some(Trouble::Unschedulable {
            since_ms: since.and_then(|since| u64::try_from(since).ok()).unwrap_or(0),
            message: condition.message.clone().unwrap_or_default(),
        });
    }
    let status = container(pod)?;
    let waiting = state(status)?.waiting.as_ref()?;
    let message = waiting.message.clone().unwrap_or_default();
    match waiting.reason.as_deref() {
        Some("ImagePullBackOff" | "ErrImagePull" | "InvalidImageName" | "ErrImageNeverPull") => {
            Some(Trouble::ImagePull { image: status.image.clone(), message })
        }
        Some("CreateContainerConfigError" | "CreateContainerError" | "RunContainerError") => {
            Some(Trouble::Configuration { message })
        }
        _ => None,
    }
}
