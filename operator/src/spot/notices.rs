//! Who says that a node or pod goes, and by when: the one table of notice sources. Administrators add
//! their own to it (`--notice-sources`).
//!
//! Each name was checked in its project's source or documentation:
//! aws-node-termination-handler `pkg/node`, karpenter `pkg/apis/v1/taints.go`, cluster-autoscaler
//! `utils/taints`, GKE "graceful node shutdown", AKS "node auto-drain", Kubernetes well-known taints.
//! A taint's value is an identifier or empty, except the cluster autoscaler's: there it is the time
//! of tainting. So the deadline is that time, or our first sight, and the pool's `notice`.

use super::source::{Carrier, Source};
use crate::coordinator::membership::{Departure, Millis};
use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use parking_lot::Mutex;
use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

/// Node and source pairs remembered, at most.
const MAX_REMEMBERED: usize = 16_384;
/// On our pods: seconds between a notice and the node's end.
pub const NOTICE_ANNOTATION: &str = "vicuna.dev/notice-seconds";
/// On our pods, set by us: the pod is to leave when its replacement can take over, and why.
pub const LEAVE_ANNOTATION: &str = "vicuna.dev/leave";
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

const TABLE: &[(Carrier, &str, Urgency)] = &[
    (Carrier::Taint, "aws-node-termination-handler/spot-itn", Urgency::Hurry),
    (Carrier::Taint, "aws-node-termination-handler/scheduled-maintenance", Urgency::Hurry),
    (Carrier::Taint, "aws-node-termination-handler/asg-lifecycle-termination", Urgency::Hurry),
    (Carrier::Taint, "aws-node-termination-handler/rebalance-recommendation", Urgency::Advice),
    (Carrier::Taint, "karpenter.sh/disrupted", Urgency::Hurry),
    (Carrier::Taint, CLUSTER_AUTOSCALER, Urgency::Hurry),
    (Carrier::Taint, "cloud.google.com/impending-node-termination", Urgency::Hurry),
    (Carrier::Taint, "node.cloudprovider.kubernetes.io/shutdown", Urgency::Now),
    (Carrier::Taint, "node.kubernetes.io/out-of-service", Urgency::Now),
    // The Azure VM is to be preempted, redeployed, rebooted or terminated; see `azure_urgency`.
    (Carrier::Condition, AZURE_EVENT, Urgency::Hurry),
];
const CLUSTER_AUTOSCALER: &str = "ToBeDeletedByClusterAutoscaler";
const AZURE_EVENT: &str = "VMEventScheduled";
pub const CORDON: &str = "cordon";
pub const NOT_READY: &str = "node is not ready";
pub const SHUTTING_DOWN: &str = "node is shutting down";
pub const NODE_DELETED: &str = "node is being deleted";

/// Which marks on nodes are warnings.
#[derive(Clone, Debug)]
pub struct Sources(Vec<Source>);

impl Default for Sources {
    fn default() -> Self {
        Self::with(Vec::new())
    }
}

impl Sources {
    /// The table and `own`; one of `own` takes the place of a table entry with its name.
    pub fn with(own: Vec<Source>) -> Self {
        let known = TABLE.iter().map(|(carrier, name, urgency)| Source {
            carrier: *carrier,
            name: (*name).to_owned(),
            urgency: *urgency,
        });
        Self(own.into_iter().chain(known).collect())
    }

    fn urgency(&self, carrier: Carrier, name: &str) -> Option<Urgency> {
        self.0.iter().find(|source| source.carrier == carrier && source.name == name).map(|source| source.urgency)
    }

    /// All warnings on a node, most urgent first.
    pub fn notices(&self, node: &Node) -> Vec<NodeNotice> {
        let spec = node.spec.as_ref();
        let taints = spec.and_then(|spec| spec.taints.as_ref());
        let mut notices: Vec<NodeNotice> =
            taints.into_iter().flatten().filter_map(|taint| self.of_taint(taint)).collect();
        let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
        notices.extend(conditions.into_iter().flatten().filter_map(|condition| self.of_condition(condition)));
        notices.extend(self.of_metadata(node));
        if spec.is_some_and(|spec| spec.unschedulable == Some(true)) {
            notices.push(NodeNotice::new(CORDON, Urgency::Calm));
        }
        if let Some(time) = &node.metadata.deletion_timestamp {
            notices.push(NodeNotice { given_at_ms: unix_ms(time), ..NodeNotice::new(NODE_DELETED, Urgency::Hurry) });
        }
        notices.sort_by_key(|notice| std::cmp::Reverse(notice.urgency));
        notices
    }

    fn of_taint(&self, taint: &Taint) -> Option<NodeNotice> {
        let urgency = self.urgency(Carrier::Taint, &taint.key)?;
        let value_is_time = taint.key == CLUSTER_AUTOSCALER;
        let from_value = taint
            .value
            .as_ref()
            .filter(|_| value_is_time)
            .and_then(|value| value.parse::<u64>().ok())
            .map(|seconds| seconds.saturating_mul(1000));
        let from_taint = taint.time_added.as_ref().and_then(unix_ms);
        Some(NodeNotice { given_at_ms: from_value.or(from_taint), ..NodeNotice::new(&taint.key, urgency) })
    }

    fn of_condition(&self, condition: &NodeCondition) -> Option<NodeNotice> {
        let says = |words: &str| condition.message.as_deref().is_some_and(|message| message.contains(words));
        match (condition.type_.as_str(), condition.status.as_str()) {
            // The kubelet gives its pods their time to leave then.
            ("Ready", "False") if says("shutting down") => Some(NodeNotice::new(SHUTTING_DOWN, Urgency::Hurry)),
            ("Ready", status) if status != "True" => Some(NodeNotice::new(NOT_READY, Urgency::Now)),
            (AZURE_EVENT, "True") => {
                let urgency = self.urgency(Carrier::Condition, AZURE_EVENT)?;
                Some(NodeNotice::new(AZURE_EVENT, azure_urgency(condition.reason.as_deref(), urgency)))
            }
            (name, "True") => Some(NodeNotice::new(name, self.urgency(Carrier::Condition, name)?)),
            _ => None,
        }
    }

    fn of_metadata(&self, node: &Node) -> Vec<NodeNotice> {
        let there = |source: &&Source| match source.carrier {
            Carrier::Annotation => node.annotations().contains_key(&source.name),
            Carrier::Label => node.labels().contains_key(&source.name),
            Carrier::Taint | Carrier::Condition => false,
        };
        self.0.iter().filter(there).map(|source| NodeNotice::new(&source.name, source.urgency)).collect()
    }
}

impl NodeNotice {
    fn new(source: &str, urgency: Urgency) -> Self {
        Self { source: source.to_owned(), urgency, given_at_ms: None }
    }
}

/// A frozen VM goes on after some seconds with its memory intact.
fn azure_urgency(reason: Option<&str>, otherwise: Urgency) -> Urgency {
    match reason {
        Some(reason) if reason.starts_with("Freeze") => Urgency::Advice,
        _ => otherwise,
    }
}

fn unix_ms(time: &Time) -> Option<Millis> {
    u64::try_from(time.0.as_millisecond()).ok()
}

/// When each warning was first seen. Shared by controllers and coordinator.
#[derive(Debug, Default)]
pub struct NoticeBook {
    sources: Sources,
    first_seen: Mutex<HashMap<(String, String), Seen>>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    /// When the warning was given, or else when we saw it first.
    given_ms: Millis,
    urgency: Urgency,
}

impl NoticeBook {
    /// A book that knows the table's sources and `own`.
    pub fn new(own: Vec<Source>) -> Self {
        Self { sources: Sources::with(own), first_seen: Mutex::default() }
    }

    /// Takes note of a node's warnings, and forgets those that were taken back.
    pub fn observe(&self, node: &Node, now: Millis) {
        let name = node.name_any();
        let notices = self.sources.notices(node);
        let mut seen = self.first_seen.lock();
        if !notices.is_empty() || seen.keys().any(|(known, _)| *known == name) {
            seen.retain(|(known, source), _| *known != name || notices.iter().any(|notice| notice.source == *source));
        }
        for notice in notices {
            if seen.len() < MAX_REMEMBERED {
                let given_ms = notice.given_at_ms.unwrap_or(now);
                let fresh = Seen { given_ms, urgency: notice.urgency };
                let known = seen.entry((name.clone(), notice.source)).or_insert(fresh);
                // A warning that becomes another one, such as a freeze that becomes a preemption.
                if known.urgency != notice.urgency {
                    *known = fresh;
                }
            }
        }
    }

    /// Nodes that should get no new pod.
    pub fn avoided(&self) -> BTreeSet<String> {
        self.first_seen.lock().keys().map(|(node, _)| node.clone()).collect()
    }

    /// Whether a node should get no new pod, and its pods replacements.
    pub fn is_avoided(&self, node: &Node) -> bool {
        !self.sources.notices(node).is_empty()
    }

    /// What advises to have a replacement for the pods of this node; they need not leave.
    pub fn advice(&self, node: &Node) -> Option<String> {
        let notice = self.sources.notices(node).into_iter().next()?;
        (notice.urgency == Urgency::Advice).then_some(notice.source)
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
        if hurried { from_node } else { pod_departure(pod, now).or(from_node).or_else(|| asked_to_leave(pod)) }
    }

    /// By the most urgent warning, and of those that are equally urgent the one whose time is over first.
    fn node_departure(&self, pod: &Pod, node: &Node, now: Millis) -> Option<Departure> {
        let seen = self.first_seen.lock();
        let dated = self.sources.notices(node).into_iter().filter_map(|notice| {
            let first = seen.get(&(node.name_any(), notice.source.clone())).map(|seen| seen.given_ms);
            let given = notice.given_at_ms.or(first).unwrap_or(now);
            let (hurry, deadline_ms) = match notice.urgency {
                Urgency::Advice => return None,
                Urgency::Calm => (false, 0),
                Urgency::Hurry => (true, given.saturating_add(notice_ms(pod))),
                Urgency::Now => (true, given),
            };
            let departure = Departure { reclaim: hurry, source: notice.source, deadline_ms, hurry };
            Some((std::cmp::Reverse(notice.urgency), departure))
        });
        dated.min_by_key(|(urgency, departure)| (*urgency, departure.deadline_ms)).map(|(_, departure)| departure)
    }
}

fn assigned_node(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}

/// The notice of the pod's pool.
fn notice_ms(pod: &Pod) -> Millis {
    let said = pod.annotations().get(NOTICE_ANNOTATION).and_then(|seconds| seconds.parse().ok());
    let notice = said.map_or(DEFAULT_NOTICE, Duration::from_secs);
    u64::try_from(notice.as_millis()).unwrap_or(u64::MAX)
}

/// We want it elsewhere; there is no hurry.
fn asked_to_leave(pod: &Pod) -> Option<Departure> {
    let source = pod.annotations().get(LEAVE_ANNOTATION)?.clone();
    Some(Departure { source, deadline_ms: 0, hurry: false, reclaim: false })
}

/// What the pod itself shows: an eviction, or a deletion.
fn pod_departure(pod: &Pod, now: Millis) -> Option<Departure> {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    let disruption = conditions
        .into_iter()
        .flatten()
        .find(|condition| condition.type_ == "DisruptionTarget" && condition.status == "True");
    let deleted_at = pod.metadata.deletion_timestamp.as_ref().map(|time| unix_ms(time).unwrap_or(0));
    let said_at = disruption.and_then(|condition| unix_ms(condition.last_transition_time.as_ref()?)).unwrap_or(now);
    let source = match disruption {
        Some(condition) => format!("DisruptionTarget: {}", condition.reason.as_deref().unwrap_or("unknown")),
        None => {
            deleted_at?;
            "the pod is deleted".to_owned()
        }
    };
    // A kubelet that is short of something gives a pod as little time as it likes: the rank hears how much.
    let by_kubelet = disruption.is_some_and(|condition| condition.reason.as_deref() == Some("TerminationByKubelet"));
    let said_until = if by_kubelet { 0 } else { said_at.saturating_add(notice_ms(pod)) };
    Some(Departure {
        source,
        // The API server's deletion timestamp is when the grace period ends. A pod that is about to be evicted is not
        // deleted yet: its pool's notice counts from when that was said.
        deadline_ms: deleted_at.unwrap_or(said_until),
        hurry: true,
        // A node that is short of memory or disk evicts pods and stays.
        reclaim: disruption.is_some()
            && pod.status.as_ref().and_then(|status| status.reason.as_deref()) != Some("Evicted"),
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
        for (carrier, name, urgency) in TABLE {
            let marked = match carrier {
                Carrier::Condition => node(json!({}), json!([{"type": name, "status": "True"}])),
                _ => tainted(name, ""),
            };
            let notices = Sources::default().notices(&marked);
            assert_eq!((notices[0].source.as_str(), notices[0].urgency), (*name, *urgency));
        }
        assert!(Sources::default().notices(&tainted("nvidia.com/gpu", "present")).is_empty());
        let calm =
            node(json!({}), json!([{"type": AZURE_EVENT, "status": "False"}, {"type": "Ready", "status": "True"}]));
        assert!(Sources::default().notices(&calm).is_empty());
    }

    #[test]
    fn administrators_add_sources_and_change_those_of_the_table() {
        let own = ["annotation:example.com/going=calm", "condition:Going=hurry", "taint:karpenter.sh/disrupted=advice"];
        let book = NoticeBook::new(own.iter().map(|text| text.parse().unwrap()).collect());
        let mut annotated = node(json!({}), json!([]));
        annotated.metadata.annotations = Some([("example.com/going".to_owned(), String::new())].into());
        assert!(!book.departure(&pod(), Some(&annotated), 0).unwrap().hurry);
        let condition = node(json!({}), json!([{"type": "Going", "status": "True"}]));
        assert!(book.departure(&pod(), Some(&condition), 0).unwrap().hurry);
        let changed = tainted("karpenter.sh/disrupted", "");
        assert_eq!(book.departure(&pod(), Some(&changed), 0), None);
        assert_eq!(book.advice(&changed).as_deref(), Some("karpenter.sh/disrupted"));
    }

    #[test]
    fn a_node_that_shuts_down_or_is_deleted_gives_its_notice() {
        let book = NoticeBook::default();
        let message = "container runtime is down, node is shutting down";
        let down = node(json!({}), json!([{"type": "Ready", "status": "False", "message": message}]));
        book.observe(&down, 1_000);
        let departure = book.departure(&pod(), Some(&down), 5_000).unwrap();
        assert_eq!((departure.source.as_str(), departure.deadline_ms), (SHUTTING_DOWN, 121_000));
        let mut deleted = node(json!({}), json!([]));
        deleted.metadata.deletion_timestamp = serde_json::from_value(json!("1970-01-01T00:00:10Z")).unwrap();
        let departure = book.departure(&pod(), Some(&deleted), 60_000).unwrap();
        assert_eq!((departure.source.as_str(), departure.deadline_ms), (NODE_DELETED, 130_000));
    }

    #[test]
    fn a_pod_that_we_want_elsewhere_leaves_without_hurry_unless_its_node_goes() {
        let book = NoticeBook::default();
        let mut asked = pod();
        asked.annotations_mut().insert(LEAVE_ANNOTATION.to_owned(), "pool spot has room".to_owned());
        let calm = book.departure(&asked, Some(&node(json!({}), json!([]))), 0).unwrap();
        assert_eq!((calm.hurry, calm.reclaim, calm.source.as_str()), (false, false, "pool spot has room"));
        assert!(book.departure(&asked, Some(&tainted("karpenter.sh/disrupted", "")), 0).unwrap().hurry);
    }

    #[test]
    fn disruptions_of_a_pod_are_reclaims_unless_its_node_is_short_of_something() {
        let disrupted = |reason: &str| {
            let mut pod = pod();
            pod.status = serde_json::from_value(json!({
                "phase": "Failed", "reason": reason,
                "conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}],
            }))
            .unwrap();
            NoticeBook::default().departure(&pod, Some(&node(json!({}), json!([]))), 0).unwrap()
        };
        assert!(disrupted("Terminated").reclaim);
        assert!(!disrupted("Evicted").reclaim);
    }

    #[test]
    fn a_pod_that_is_about_to_be_evicted_has_its_pools_notice() {
        let disrupted = |condition: serde_json::Value, deleted: Option<&str>| {
            let mut pod = pod();
            pod.metadata.deletion_timestamp = deleted.map(|at| serde_json::from_value(json!(at)).unwrap());
            pod.status = serde_json::from_value(json!({ "phase": "Running", "conditions": [condition] })).unwrap();
            NoticeBook::default().departure(&pod, Some(&node(json!({}), json!([]))), 50_000).unwrap().deadline_ms
        };
        let target = json!({"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"});
        let mut dated = target.clone();
        dated["lastTransitionTime"] = json!("1970-01-01T00:00:40Z");
        assert_eq!(disrupted(dated.clone(), None), 160_000);
        let mut by_kubelet = dated.clone();
        by_kubelet["reason"] = json!("TerminationByKubelet");
        assert_eq!(disrupted(by_kubelet, None), 0, "how long it has is not said here");
        assert_eq!(disrupted(target, None), 170_000, "where nobody said when, from now on");
        assert_eq!(disrupted(dated, Some("1970-01-01T00:01:10Z")), 70_000, "a deletion says when it is over");
    }

    #[test]
    fn of_equally_urgent_warnings_the_one_that_is_over_first_counts() {
        let book = NoticeBook::default();
        let both = |first: &str, second: &str| {
            let taint = |key: &str| json!({"key": key, "effect": "NoSchedule"});
            node(json!({"taints": [taint(first), taint(second)]}), json!([]))
        };
        let (earlier, later) = ("aws-node-termination-handler/spot-itn", "karpenter.sh/disrupted");
        book.observe(&tainted(earlier, ""), 1_000);
        for node in [both(later, earlier), both(earlier, later)] {
            book.observe(&node, 31_000);
            let departure = book.departure(&pod(), Some(&node), 40_000).unwrap();
            assert_eq!((departure.source.as_str(), departure.deadline_ms), (earlier, 121_000));
        }
        let mut dead = both(later, earlier);
        let unknown = json!([{"type": "Ready", "status": "Unknown"}]);
        dead.status = serde_json::from_value(json!({ "conditions": unknown })).unwrap();
        assert_eq!(
            book.departure(&pod(), Some(&dead), 40_000).unwrap().source,
            NOT_READY,
            "the most urgent comes first"
        );
    }

    #[test]
    fn a_warning_that_becomes_more_urgent_counts_from_then_on() {
        let book = NoticeBook::default();
        let event = |reason: &str| node(json!({}), json!([{"type": AZURE_EVENT, "status": "True", "reason": reason}]));
        book.observe(&event("FreezeScheduled"), 1_000);
        assert_eq!(book.departure(&pod(), Some(&event("FreezeScheduled")), 1_000), None);
        book.observe(&event("PreemptScheduled"), 50_000);
        assert_eq!(book.departure(&pod(), Some(&event("PreemptScheduled")), 60_000).unwrap().deadline_ms, 170_000);
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
        assert!(book.is_avoided(&advised));
        assert_eq!(book.advice(&cordoned), None);
    }

    #[test]
    fn a_drained_node_is_in_a_hurry_although_it_is_cordoned_too() {
        let both = node(
            json!({"unschedulable": true, "taints": [{"key": "karpenter.sh/disrupted", "effect": "NoSchedule"}]}),
            json!([]),
        );
        assert_eq!(Sources::default().notices(&both)[0].urgency, Urgency::Hurry);
        let cordoned = node(json!({"unschedulable": true}), json!([]));
        let mut evicted = pod();
        evicted.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:30Z")).unwrap();
        let departure = NoticeBook::default().departure(&evicted, Some(&cordoned), 0).unwrap();
        assert!(departure.hurry && !departure.reclaim);
    }

    #[test]
    fn new_pods_are_kept_away_from_every_noticed_node_while_it_exists() {
        let book = NoticeBook::default();
        book.observe(&tainted("aws-node-termination-handler/rebalance-recommendation", ""), 1_000);
        assert_eq!(book.avoided(), ["n1".to_owned()].into());
        book.observe(&node(json!({"unschedulable": true}), json!([])), 2_000);
        assert_eq!(book.avoided().len(), 1);
        book.observe(&node(json!({}), json!([])), 3_000);
        assert!(book.avoided().is_empty());
        book.observe(&tainted("karpenter.sh/disrupted", ""), 4_000);
        book.retain(|_| false);
        assert!(book.avoided().is_empty());
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
