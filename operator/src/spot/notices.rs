//! Who says that a node or pod goes, and by when: the one table of notice sources.
//!
//! Each name was checked in its project's source or documentation:
//! aws-node-termination-handler `pkg/node`, karpenter `pkg/apis/v1/taints.go`, cluster-autoscaler
//! `utils/taints`, GKE "graceful node shutdown", AKS "node auto-drain", Kubernetes well-known taints.
//! A taint's value is an identifier or empty, except the cluster autoscaler's: there it is the time
//! of tainting. So the deadline is that time, or our first sight, and the pool's `notice`.

use crate::coordinator::membership::{Departure, Millis};
use k8s_openapi::api::core::v1::{Node, Pod, Taint};
use kube::ResourceExt;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, SystemTime};

/// Node and source pairs remembered, at most.
const MAX_REMEMBERED: usize = 16_384;
/// On our pods: seconds between a notice and the node's end.
pub const NOTICE_ANNOTATION: &str = "vicuna.dev/notice-seconds";
const DEFAULT_NOTICE: Duration = Duration::from_secs(30);

/// How much a notice presses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// Only advice: nothing is to be done but to start a replacement.
    Advice,
    /// The node goes some day: a replacement first.
    Calm,
    /// The node goes after the pool's notice.
    Hurry,
    /// The node is gone, or as good as gone.
    Now,
}

/// A warning on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeNotice {
    pub source: String,
    pub urgency: Urgency,
    /// When the warning was given, if it says so; unix time in ms.
    pub given_at_ms: Option<Millis>,
}

const TAINTS: &[(&str, Urgency)] = &[
    ("aws-node-termination-handler/spot-itn", Urgency::Hurry),
    ("aws-node-termination-handler/scheduled-maintenance", Urgency::Hurry),
    ("aws-node-termination-handler/asg-lifecycle-termination", Urgency::Hurry),
    ("aws-node-termination-handler/rebalance-recommendation", Urgency::Advice),
    ("karpenter.sh/disrupted", Urgency::Hurry),
    (CLUSTER_AUTOSCALER, Urgency::Hurry),
    ("cloud.google.com/impending-node-termination", Urgency::Hurry),
    ("node.cloudprovider.kubernetes.io/shutdown", Urgency::Now),
    ("node.kubernetes.io/out-of-service", Urgency::Now),
];
const CLUSTER_AUTOSCALER: &str = "ToBeDeletedByClusterAutoscaler";
/// Status True: the Azure VM is to be preempted, redeployed, rebooted or terminated.
const AZURE_EVENT: &str = "VMEventScheduled";
pub const CORDON: &str = "cordon";
pub const NOT_READY: &str = "node is not ready";

/// All warnings on a node, most urgent first.
pub fn node_notices(node: &Node) -> Vec<NodeNotice> {
    let spec = node.spec.as_ref();
    let taints = spec.and_then(|spec| spec.taints.as_ref());
    let mut notices: Vec<NodeNotice> = taints.into_iter().flatten().filter_map(taint_notice).collect();
    notices.extend(condition_notices(node));
    if spec.is_some_and(|spec| spec.unschedulable == Some(true)) {
        notices.push(NodeNotice::new(CORDON, Urgency::Calm));
    }
    notices.sort_by_key(|notice| std::cmp::Reverse(notice.urgency));
    notices
}

impl NodeNotice {
    fn new(source: &str, urgency: Urgency) -> Self {
        Self { source: source.to_owned(), urgency, given_at_ms: None }
    }
}

fn taint_notice(taint: &Taint) -> Option<NodeNotice> {
    let (source, urgency) = TAINTS.iter().find(|(key, _)| *key == taint.key)?;
    let value_is_time = taint.key == CLUSTER_AUTOSCALER;
    let from_value = taint
        .value
        .as_ref()
        .filter(|_| value_is_time)
        .and_then(|value| value.parse::<u64>().ok())
        .map(|seconds| seconds.saturating_mul(1000));
    let from_taint = taint.time_added.as_ref().and_then(|time| u64::try_from(time.0.as_millisecond()).ok());
    Some(NodeNotice { given_at_ms: from_value.or(from_taint), ..NodeNotice::new(source, *urgency) })
}

fn condition_notices(node: &Node) -> Vec<NodeNotice> {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions
        .into_iter()
        .flatten()
        .filter_map(|condition| match (condition.type_.as_str(), condition.status.as_str()) {
            (AZURE_EVENT, "True") => Some(NodeNotice::new(AZURE_EVENT, azure_urgency(condition.reason.as_deref()))),
            // The kubelet also says so while it shuts down.
            ("Ready", status) if status != "True" => Some(NodeNotice::new(NOT_READY, Urgency::Now)),
            _ => None,
        })
        .collect()
}

/// A frozen VM goes on after some seconds with its memory intact.
fn azure_urgency(reason: Option<&str>) -> Urgency {
    match reason {
        Some(reason) if reason.starts_with("Freeze") => Urgency::Advice,
        _ => Urgency::Hurry,
    }
}

/// When each warning was first seen. Shared by controllers and coordinator.
#[derive(Debug, Default)]
pub struct NoticeBook {
    first_seen: Mutex<HashMap<(String, String), Seen>>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    /// When the warning was given, or else when we saw it first.
    given_ms: Millis,
    urgency: Urgency,
}

impl NoticeBook {
    /// Takes note of a node's warnings, and forgets those that were taken back.
    pub fn observe(&self, node: &Node, now: Millis) {
        let name = node.name_any();
        let notices = node_notices(node);
        let mut seen = self.first_seen.lock();
        if !notices.is_empty() || seen.keys().any(|(known, _)| *known == name) {
            seen.retain(|(known, source), _| *known != name || notices.iter().any(|notice| notice.source == *source));
        }
        for notice in notices {
            if seen.len() < MAX_REMEMBERED {
                let given_ms = notice.given_at_ms.unwrap_or(now);
                let fresh = Seen { given_ms, urgency: notice.urgency };
                seen.entry((name.clone(), notice.source)).or_insert(fresh);
            }
        }
    }

    /// Nodes that are about to go, and when: absent where there is no hurry.
    pub fn leaving(&self) -> BTreeMap<String, Option<SystemTime>> {
        let mut leaving: BTreeMap<String, Option<SystemTime>> = BTreeMap::new();
        for ((node, _), seen) in self.first_seen.lock().iter() {
            let notice = match seen.urgency {
                Urgency::Advice => continue,
                Urgency::Calm => None,
                Urgency::Hurry => Some(DEFAULT_NOTICE),
                Urgency::Now => Some(Duration::ZERO),
            };
            let given = SystemTime::UNIX_EPOCH + Duration::from_millis(seen.given_ms);
            let deadline = notice.map(|notice| given + notice);
            let earliest = leaving.entry(node.clone()).or_default();
            *earliest = match (*earliest, deadline) {
                (Some(one), Some(other)) => Some(one.min(other)),
                (one, other) => one.or(other),
            };
        }
        leaving
    }

    /// Forgets nodes that exist no more.
    pub fn retain(&self, exists: impl Fn(&str) -> bool) {
        self.first_seen.lock().retain(|(node, _), _| exists(node));
    }

    /// Why and by when a pod goes. `node` is `None` when its node does not exist (any more).
    pub fn departure(&self, pod: &Pod, node: Option<&Node>, now: Millis) -> Option<Departure> {
        let from_node = match (assigned_node(pod), node) {
            (None, _) => None,
            (Some(_), Some(node)) => self.node_departure(pod, node, now),
            (Some(name), None) => Some(Departure {
                source: format!("node {name} is gone"),
                // In the past: nothing is to be waited for.
                deadline_ms: 1,
                hurry: true,
                reclaim: true,
            }),
        };
        let hurried = from_node.as_ref().is_some_and(|departure| departure.hurry);
        if hurried { from_node } else { pod_departure(pod).or(from_node) }
    }

    fn node_departure(&self, pod: &Pod, node: &Node, now: Millis) -> Option<Departure> {
        let notice = node_notices(node).into_iter().next()?;
        let seen = self.first_seen.lock();
        let first = seen.get(&(node.name_any(), notice.source.clone())).map(|seen| seen.given_ms);
        let given = notice.given_at_ms.or(first).unwrap_or(now);
        let notice_ms = u64::try_from(notice_of(pod).as_millis()).unwrap_or(u64::MAX);
        let (hurry, deadline_ms) = match notice.urgency {
            Urgency::Advice => return None,
            Urgency::Calm => (false, 0),
            Urgency::Hurry => (true, given.saturating_add(notice_ms)),
            Urgency::Now => (true, given),
        };
        Some(Departure { reclaim: hurry, source: notice.source, deadline_ms, hurry })
    }
}

/// Whether a node should get no new pod, and its pods replacements.
pub fn is_avoided(node: &Node) -> bool {
    !node_notices(node).is_empty()
}

fn assigned_node(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}

fn notice_of(pod: &Pod) -> Duration {
    pod.annotations()
        .get(NOTICE_ANNOTATION)
        .and_then(|seconds| seconds.parse().ok())
        .map_or(DEFAULT_NOTICE, Duration::from_secs)
}

/// What the pod itself shows: an eviction, or a deletion.
fn pod_departure(pod: &Pod) -> Option<Departure> {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    let disruption = conditions
        .into_iter()
        .flatten()
        .find(|condition| condition.type_ == "DisruptionTarget" && condition.status == "True");
    let deleted_at =
        pod.metadata.deletion_timestamp.as_ref().map(|time| u64::try_from(time.0.as_millisecond()).unwrap_or(0));
    let source = match disruption {
        Some(condition) => format!("DisruptionTarget: {}", condition.reason.as_deref().unwrap_or("unknown")),
        None => {
            deleted_at?;
            "the pod is deleted".to_owned()
        }
    };
    Some(Departure {
        source,
        // The API server's deletion timestamp is when the grace period ends.
        deadline_ms: deleted_at.unwrap_or(0),
        hurry: true,
        reclaim: disruption.is_some(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(spec: serde_json::Value, conditions: serde_json::Value) -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": "n1"}, "spec": spec, "status": {"conditions": conditions}
        }))
        .unwrap()
    }

    fn tainted(key: &str, value: &str) -> Node {
        node(json!({"taints": [{"key": key, "value": value, "effect": "NoSchedule"}]}), json!([]))
    }

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "annotations": {NOTICE_ANNOTATION: "120"}},
            "spec": {"nodeName": "n1", "containers": []}
        }))
        .unwrap()
    }

    #[test]
    fn every_source_of_the_table_is_recognised() {
        for (key, urgency) in TAINTS {
            assert_eq!(node_notices(&tainted(key, ""))[0].urgency, *urgency, "{key}");
        }
        assert!(node_notices(&tainted("nvidia.com/gpu", "present")).is_empty());
    }

    #[test]
    fn the_deadline_is_the_pools_notice_after_the_first_sight() {
        let book = NoticeBook::default();
        let node = tainted("aws-node-termination-handler/spot-itn", "spot-itn-0badcafe");
        book.observe(&node, 1_000);
        book.observe(&node, 9_000);
        let departure = book.departure(&pod(), Some(&node), 9_000).unwrap();
        assert_eq!((departure.deadline_ms, departure.hurry, departure.reclaim), (121_000, true, true));
    }

    #[test]
    fn a_notice_taken_back_is_forgotten_and_counts_anew() {
        let book = NoticeBook::default();
        let noticed = tainted("karpenter.sh/disrupted", "");
        book.observe(&noticed, 1_000);
        book.observe(&node(json!({}), json!([])), 2_000);
        book.observe(&noticed, 50_000);
        assert_eq!(book.departure(&pod(), Some(&noticed), 50_000).unwrap().deadline_ms, 170_000);
    }

    #[test]
    fn the_cluster_autoscaler_says_when_it_tainted() {
        let book = NoticeBook::default();
        let node = tainted(CLUSTER_AUTOSCALER, "1700000000");
        book.observe(&node, 1_700_000_005_000);
        let departure = book.departure(&pod(), Some(&node), 1_700_000_006_000).unwrap();
        assert_eq!(departure.deadline_ms, 1_700_000_120_000);
    }

    #[test]
    fn a_cordon_is_no_hurry_and_advice_no_departure() {
        let book = NoticeBook::default();
        let cordoned = node(json!({"unschedulable": true}), json!([]));
        assert!(!book.departure(&pod(), Some(&cordoned), 0).unwrap().hurry);
        let advised = tainted("aws-node-termination-handler/rebalance-recommendation", "");
        assert_eq!(book.departure(&pod(), Some(&advised), 0), None);
        assert!(is_avoided(&advised));
    }

    #[test]
    fn a_drained_node_is_in_a_hurry_although_it_is_cordoned_too() {
        let both = node(
            json!({"unschedulable": true, "taints": [{"key": "karpenter.sh/disrupted", "effect": "NoSchedule"}]}),
            json!([]),
        );
        assert_eq!(node_notices(&both)[0].urgency, Urgency::Hurry);
        let cordoned = node(json!({"unschedulable": true}), json!([]));
        let mut evicted = pod();
        evicted.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:30Z")).unwrap();
        let departure = NoticeBook::default().departure(&evicted, Some(&cordoned), 0).unwrap();
        assert!(departure.hurry && !departure.reclaim);
    }

    #[test]
    fn leaving_nodes_are_listed_with_their_earliest_end() {
        let book = NoticeBook::default();
        book.observe(&tainted("karpenter.sh/disrupted", ""), 1_000);
        let at = |ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
        assert_eq!(book.leaving(), [("n1".to_owned(), Some(at(31_000)))].into());
        book.observe(&node(json!({"unschedulable": true}), json!([])), 2_000);
        assert_eq!(book.leaving(), [("n1".to_owned(), None)].into());
        book.retain(|_| false);
        assert!(book.leaving().is_empty());
    }

    #[test]
    fn azure_preempts_and_dead_nodes_are_noticed() {
        let book = NoticeBook::default();
        let preempted = node(json!({}), json!([{"type": AZURE_EVENT, "status": "True", "reason": "PreemptScheduled"}]));
        assert!(book.departure(&pod(), Some(&preempted), 0).unwrap().hurry);
        let frozen = node(json!({}), json!([{"type": AZURE_EVENT, "status": "True", "reason": "FreezeScheduled"}]));
        assert_eq!(book.departure(&pod(), Some(&frozen), 0), None);
        let dead = node(json!({}), json!([{"type": "Ready", "status": "Unknown"}]));
        assert!(book.departure(&pod(), Some(&dead), 7).unwrap().reclaim);
        assert!(book.departure(&pod(), None, 7).unwrap().reclaim);
    }
}
