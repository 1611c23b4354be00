//! From the caches to the memberships: which pods exist, which end, which are about to go.

use super::membership::PodFact;
use super::registry::Key;
use super::report::PodUid;
use crate::config::TRAINING_LABEL;
use crate::context::Context;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;

/// Changes that come together are looked at together.
const GATHER: Duration = Duration::from_millis(100);
/// Everything is looked at this often, whether or not a change was seen.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Feeds all sessions until the process ends. A node's notice is with its ranks' membership within
/// [`GATHER`] of the watch event.
pub async fn run(context: Arc<Context>) {
    let mut changes = context.watches.subscribe();
    loop {
        tokio::select! {
            biased;
            change = changes.recv() => match change {
                Ok(_) | Err(RecvError::Lagged(_)) => {
                    tokio::time::sleep(GATHER).await;
                    while changes.try_recv().is_ok() {}
                }
                Err(RecvError::Closed) => return,
            },
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        observe_nodes(&context);
        let pods = by_training(&context);
        for (key, session) in context.coordinator.all() {
            let pods = pods.get(&key).map_or(&[][..], Vec::as_slice);
            session.set_pods(facts_of(&context, pods, session.uid()));
        }
    }
}

fn observe_nodes(context: &Context) {
    let now = context.coordinator.clock().now_ms();
    for node in context.watches.nodes.state() {
        context.notices.observe(&node, now);
    }
    context.notices.retain(|name| context.watches.node(name).is_some());
}

fn by_training(context: &Context) -> HashMap<Key, Vec<Arc<Pod>>> {
    let mut trainings: HashMap<Key, Vec<Arc<Pod>>> = HashMap::new();
    for pod in context.watches.pods.state() {
        if let (Some(namespace), Some(name)) = (pod.namespace(), pod.labels().get(TRAINING_LABEL)) {
            trainings.entry((namespace, name.clone())).or_default().push(pod);
        }
    }
    trainings
}

/// What the caches show of a training's pods.
pub fn facts(context: &Context, namespace: &str, name: &str, uid: &str) -> BTreeMap<PodUid, PodFact> {
    facts_of(context, &context.watches.pods_of(namespace, name), uid)
}

fn facts_of(context: &Context, pods: &[Arc<Pod>], uid: &str) -> BTreeMap<PodUid, PodFact> {
    let now = context.coordinator.clock().now_ms();
    pods.iter()
        .filter(|pod| belongs_to(pod, uid))
        .filter_map(|pod| {
            let node = node_of(context, pod);
            let fact = PodFact {
                departure: context.notices.departure(pod, node.as_deref(), now),
                // A node that is deleted takes its containers with it, whatever the pod's status says.
                ended: has_ended(pod) || (is_assigned(pod) && node.is_none()),
            };
            Some((pod.metadata.uid.clone()?, fact))
        })
        .collect()
}

fn node_of(context: &Context, pod: &Pod) -> Option<Arc<Node>> {
    context.watches.node(pod.spec.as_ref()?.node_name.as_deref()?)
}

fn is_assigned(pod: &Pod) -> bool {
    pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some())
}

/// Whether the pod was made for the training with this UID, and not for a namesake.
pub fn belongs_to(pod: &Pod, uid: &str) -> bool {
    let owners = pod.metadata.owner_references.iter().flatten();
    owners.into_iter().any(|owner| owner.uid == uid)
}

/// Whether its containers run no more.
pub fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}
