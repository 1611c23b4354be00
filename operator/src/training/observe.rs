//! What there is: the training, its pods with what is wrong with them, and its membership.

use super::build;
use super::known::{Claim, Known};
use super::memory::Memory;
use super::time::unix_ms;
use crate::config::{POOL_LABEL, REPLACES_ANNOTATION};
use crate::context::Context;
use crate::coordinator::feed::{belongs_to, has_ended};
use crate::coordinator::membership::{Departure, Millis};
use crate::coordinator::report::Report;
use crate::spot::capacity::Size;
use crate::spot::notices::LEAVE_ANNOTATION;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Node, Pod, PodCondition, Taint};
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
    /// Nodes that no new pod is to go to: they are about to go, or ranks fail on them and there are others.
    pub avoided_nodes: BTreeSet<String>,
    /// Nodes on which ranks fail and to which there is no alternative.
    pub suspect_nodes: BTreeSet<String>,
    /// Names of pools with a node that none of the pods is on, where all are on one node; what room it has is not known.
    pub pools_apart: BTreeSet<String>,
    /// Other trainings that want the same nodes.
    pub rivals: Vec<Claim>,
    /// What a pod asks for.
    pub size: Size,
    pub memory: Memory,
}

impl Observed {
    /// When a pod last got a node of the pool.
    pub fn newest_node_in(&self, pool: &str) -> Option<Millis> {
        self.pods.iter().filter(|pod| pod.pool == pool).filter_map(|pod| pod.scheduled_at_ms).max()
    }
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
    /// What advises to have a replacement for it.
    pub advice: Option<String>,
    /// It was asked to leave, by us.
    pub asked_to_leave: bool,
    /// UID of the pod from which it is to take over.
    pub replaces: Option<String>,
    /// When it got its node.
    pub scheduled_at_ms: Option<Millis>,
    /// Its share of the node.
    pub share: f64,
    pub ended: Option<End>,
    /// What keeps it from starting.
    pub trouble: Option<Trouble>,
    pub image: Option<String>,
    /// A pod made now would have another image or Secret.
    pub outdated: bool,
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
    pub at_ms: Option<Millis>,
}

/// Why a pod does not start.
#[derive(Clone, Debug, PartialEq)]
pub enum Trouble {
    Unschedulable {
        since_ms: Millis,
        message: String,
    },
    /// An admission controller has not let it through to the scheduler.
    Gated,
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
pub fn observe(context: &Context, training: Arc<VicunaTraining>, memory: Memory, known: &Known) -> Observed {
    let namespace = training.namespace().unwrap_or_default();
    let now = context.coordinator.clock().now_ms();
    let pods = context.watches.pods_of(&namespace, &training.name_any());
    let uid = training.uid().unwrap_or_default();
    let ours = pods.iter().filter(|pod| belongs_to(pod, &uid));
    let pools = Pool::of(&training.spec.pools);
    let size = Size::of(training.spec.workers.resources.as_ref());
    let (avoided_nodes, suspect_nodes) = bad_nodes(context, &pools, known.faults.suspects(now));
    let pods_seen: Vec<PodView> = ours.map(|pod| view(context, &training, pod, now)).collect();
    Observed {
        pools_apart: pools_apart(context, &pods_seen, &pools, size, &avoided_nodes),
        pods: pods_seen,
        names: pods.iter().map(|pod| pod.name_any()).collect(),
        report: context.coordinator.report(&training),
        stocked_out: known.stocked_out(&pools, size, now),
        avoided_nodes,
        suspect_nodes,
        rivals: known.rivals(&namespace, &training.name_any(), &pools),
        size,
        memory,
        pools,
        training,
    }
}

/// Nodes that new pods must not, and that they should not go to.
fn bad_nodes(context: &Context, pools: &[Pool], suspects: BTreeSet<String>) -> (BTreeSet<String>, BTreeSet<String>) {
    let leaving = context.notices.avoided();
    if suspects.is_empty() {
        return (leaving.into_iter().take(MAX_AVOIDED).collect(), suspects);
    }
    let nodes = context.watches.nodes.state();
    let nodes: Vec<&Node> = nodes.iter().map(|node| &**node).collect();
    let (avoidable, needed) = suspects.into_iter().partition(|name| has_alternative(name, &nodes, &leaving, pools));
    let avoidable: BTreeSet<String> = avoidable;
    (avoidable.into_iter().chain(leaving).take(MAX_AVOIDED).collect(), needed)
}

/// Looked for only where all pods are on one node.
fn pools_apart(
    context: &Context,
    pods: &[PodView],
    pools: &[Pool],
    size: Size,
    avoided: &BTreeSet<String>,
) -> BTreeSet<String> {
    let used: BTreeSet<&String> = pods.iter().filter_map(|pod| pod.node.as_ref()).collect();
    if pods.len() < 2 || used.len() != 1 {
        return BTreeSet::new();
    }
    let nodes = context.watches.nodes.state();
    let free = |node: &&Arc<Node>| !used.contains(&node.name_any()) && !avoided.contains(&node.name_any());
    let free: Vec<&Node> = nodes.iter().filter(free).map(|node| &**node).collect();
    let has = |pool: &&Pool| free.iter().any(|node| takes(pool, node, size));
    pools.iter().filter(has).map(|pool| pool.name.clone()).collect()
}

/// Whether a node is one of the pool's and an empty one would be large enough.
pub fn takes(pool: &Pool, node: &Node, size: Size) -> bool {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    let keeps_off = |taint: &Taint| taint.effect != "PreferNoSchedule" && !tolerates(pool, taint);
    selects(pool, node) && Size::of_node(node).covers(&size) && !taints.into_iter().flatten().any(keeps_off)
}

fn tolerates(pool: &Pool, taint: &Taint) -> bool {
    pool.tolerations.iter().any(|toleration| {
        let key = toleration.key.as_ref().is_none_or(|key| *key == taint.key);
        let effect = toleration.effect.as_ref().is_none_or(|effect| *effect == taint.effect);
        let exists = toleration.operator.as_deref() == Some("Exists");
        key && effect && (exists || toleration.value.as_deref().unwrap_or("") == taint.value.as_deref().unwrap_or(""))
    })
}

fn selects(pool: &Pool, node: &Node) -> bool {
    pool.node_selector.iter().all(|(key, value)| node.labels().get(key).is_some_and(|found| found == value))
}

/// Whether a pool that has this node has another one, too.
pub fn has_alternative(name: &str, nodes: &[&Node], leaving: &BTreeSet<String>, pools: &[Pool]) -> bool {
    let Some(node) = nodes.iter().find(|node| node.name_any() == name) else { return true };
    pools.iter().filter(|pool| selects(pool, node)).any(|pool| {
        nodes.iter().any(|other| {
            let other_name = other.name_any();
            other_name != name && !leaving.contains(&other_name) && selects(pool, other)
        })
    })
}

fn view(context: &Context, training: &VicunaTraining, pod: &Pod, now: Millis) -> PodView {
    let node_name = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    let node = node_name.as_deref().and_then(|name| context.watches.node(name));
    let departure = context.notices.departure(pod, node.as_deref(), now);
    let size = Size::of(pod.spec.as_ref().and_then(|spec| spec.containers.first()?.resources.as_ref()));
    PodView {
        outdated: is_outdated(pod, build::pod::image(training, &context.config), training),
        advice: node.as_deref().and_then(|node| context.notices.advice(node)),
        share: node.as_deref().map_or(1.0, |node| size.share_of(&Size::of_node(node))),
        ..pod_view(pod, departure, node_name.is_some() && node.is_none())
    }
}

/// What an administrator or user corrects when pods cannot start: the image, and the name of the Secret.
pub fn is_outdated(pod: &Pod, image: &str, training: &VicunaTraining) -> bool {
    let Some(container) = pod.spec.as_ref().and_then(|spec| spec.containers.first()) else { return false };
    let from = container.env_from.as_ref().and_then(|from| from.first());
    let secret = from.and_then(|from| from.secret_ref.as_ref()).map(|secret| secret.name.as_str());
    let wanted = training.spec.checkpoint.credentials.as_ref().map(|secret| secret.name.as_str());
    container.image.as_deref() != Some(image) || secret != wanted
}

/// The view of a pod; `orphaned`: its node does not exist.
pub fn pod_view(pod: &Pod, departure: Option<Departure>, orphaned: bool) -> PodView {
    PodView {
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        image: pod.spec.as_ref().and_then(|spec| spec.containers.first()?.image.clone()),
        pool: pod.labels().get(POOL_LABEL).cloned().unwrap_or_default(),
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
        started: container(pod).is_some_and(|status| {
            state(status).is_some_and(|state| state.running.is_some() || state.terminated.is_some())
        }),
        ready: condition(pod, "Ready").is_some_and(|condition| condition.status == "True"),
        deleting: pod.metadata.deletion_timestamp.is_some(),
        ended: end(pod, orphaned, departure.as_ref()),
        departure,
        advice: None,
        asked_to_leave: pod.annotations().contains_key(LEAVE_ANNOTATION),
        replaces: pod.annotations().get(REPLACES_ANNOTATION).cloned(),
        scheduled_at_ms: condition(pod, "PodScheduled")
            .filter(|condition| condition.status == "True")
            .and_then(|condition| condition.last_transition_time.as_ref().and_then(unix_ms)),
        share: 1.0,
        trouble: trouble(pod),
        outdated: false,
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
        at_ms: terminated.and_then(|terminated| terminated.finished_at.as_ref().and_then(unix_ms)),
    })
}

fn trouble(pod: &Pod) -> Option<Trouble> {
    if let Some(condition) = condition(pod, "PodScheduled").filter(|condition| condition.status == "False") {
        // Gated pods have not been shown to the scheduler: they say nothing about nodes.
        if condition.reason.as_deref() == Some("SchedulingGated") {
            return Some(Trouble::Gated);
        }
        return Some(Trouble::Unschedulable {
            since_ms: condition.last_transition_time.as_ref().and_then(unix_ms).unwrap_or(0),
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
