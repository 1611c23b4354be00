//! What to do next, from what there is and the time alone. One policy a file; the first that applies
//! to a pod wins.

mod deadline;
mod failures;
mod forming;
mod leave;
mod moves;
mod places;
#[cfg(test)]
mod simulation;

use super::known::Claim;
use super::memory::Memory;
use super::observe::{Observed, PodView};
use crate::coordinator::membership::Millis;
use std::collections::BTreeSet;
use std::time::Duration;
use vicuna_crds::training::condition;

/// Looked at again after so long when nothing happens.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// Pods made in one go, at most.
const MAX_CREATED: usize = 64;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    pub actions: Vec<Action>,
    /// Why, for logs.
    pub reason: String,
    pub memory: Memory,
    /// Pools that turned out to have no node.
    pub stocked_out: BTreeSet<String>,
    /// Nodes on which a rank failed, and not by its own fault.
    pub faulty_nodes: BTreeSet<String>,
    /// What others are to know of its need for nodes; `None` once it is over.
    pub claim: Option<Claim>,
    pub look_again: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Trust, service account and disruption budget are to be there.
    Prepare {
        min_available: u32,
    },
    CreatePod {
        name: String,
        pool: usize,
        /// UID of the pod from which it is to take over.
        replaces: Option<String>,
    },
    /// The pod trains until another one takes over.
    AskToLeave {
        name: String,
        uid: String,
        why: String,
    },
    /// The training itself, some time after its end.
    DeleteTraining,
    DeletePod {
        name: String,
        uid: String,
        why: String,
        force: bool,
    },
}

/// What to do next.
pub fn plan(observed: &Observed, now: Millis) -> Plan {
    let mut plan = Plan { memory: observed.memory.clone(), look_again: LOOK_AGAIN, ..Plan::default() };
    if is_over(observed) {
        plan.reason = "the training is over".to_owned();
        leave::everyone(observed, &mut plan);
        deadline::expire(observed, now, &mut plan);
        return plan;
    }
    plan.memory.accounts.count(observed, now);
    failures::judge(observed, now, &mut plan);
    deadline::watch(observed, now, &mut plan);
    if plan.memory.verdict.is_some() {
        plan.reason = "the training is given up".to_owned();
        leave::everyone(observed, &mut plan);
        return plan;
    }
    plan.claim = Some(forming::satisfied(observed));
    leave::ended_and_hung(observed, &mut plan);
    leave::waiting_in_vain(observed, &mut plan);
    if observed.training.spec.suspend {
        plan.reason = "the training is suspended".to_owned();
        leave::when_stopped(observed, &mut plan);
        return plan;
    }
    let min_available = budget(observed);
    plan.actions.push(Action::Prepare { min_available });
    if forming::settle(observed, now, &mut plan) {
        return plan;
    }
    leave::surplus(observed, &mut plan);
    leave::replaced(observed, &mut plan);
    places::fill(observed, now, &mut plan);
    moves::consider(observed, now, &mut plan);
    if plan.reason.is_empty() {
        plan.reason = "all pods are as they should be".to_owned();
    }
    plan
}

/// Whether nothing can change any more: the status says so, or the coordinator has the result.
pub fn is_over(observed: &Observed) -> bool {
    let status = observed.training.status.as_ref();
    let conditions = status.map(|status| status.conditions.as_slice()).unwrap_or_default();
    let finished = conditions.iter().any(|it| it.type_ == condition::FINISHED && it.status == "True");
    finished || observed.report.as_ref().is_some_and(|report| report.finish.is_some())
}

/// Pods that an eviction must leave running: an integer, since a share of what is there would shrink
/// with each eviction.
fn budget(observed: &Observed) -> u32 {
    observed.training.spec.workers.min
}

/// Pods that count for the number of workers: there, and to stay.
fn stays(observed: &Observed, pod: &PodView) -> bool {
    let rank = observed.report.as_ref().and_then(|report| report.ranks.get(&pod.uid));
    pod.ended.is_none()
        && !pod.deleting
        && pod.departure.is_none()
        && !rank.is_some_and(|rank| rank.released)
        && !is_unresponsive(observed, &pod.uid)
}

fn has_node(pod: &PodView) -> bool {
    pod.node.is_some()
}

/// It is to take over from a pod that is still needed, and does not count until then.
fn is_standby(observed: &Observed, pod: &PodView) -> bool {
    let Some(old) = &pod.replaces else { return false };
    stays(observed, pod) && observed.pods.iter().any(|other| other.uid == *old && stays(observed, other))
}

/// There are fewer pods than `workers.max`.
fn is_short(observed: &Observed) -> bool {
    let count = observed.pods.iter().filter(|pod| stays(observed, pod) && !is_standby(observed, pod)).count();
    count < observed.training.spec.workers.max as usize
}

fn is_unresponsive(observed: &Observed, uid: &str) -> bool {
    observed.report.as_ref().is_some_and(|report| report.unresponsive.contains(uid))
}

fn is_member(observed: &Observed, uid: &str) -> bool {
    let report = observed.report.as_ref();
    report.is_some_and(|report| report.members.iter().any(|member| member.pod_uid == uid))
}

fn delete(pod: &PodView, why: &str, force: bool) -> Action {
    Action::DeletePod { name: pod.name.clone(), uid: pod.uid.clone(), why: why.to_owned(), force }
}
