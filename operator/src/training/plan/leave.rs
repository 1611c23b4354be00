//! Pods that are of no use any more.

use super::{Plan, delete, is_member, is_standby, is_unresponsive, stays};
use crate::coordinator::membership::Millis;
use crate::coordinator::report::Phase;
use crate::training::observe::{Observed, PodView, Trouble};
use std::cmp::Reverse;

/// The training is over: nobody is needed.
pub fn everyone(observed: &Observed, plan: &mut Plan) {
    let pods = observed.pods.iter().filter(|pod| !pod.deleting);
    plan.actions.extend(pods.map(|pod| delete(pod, "the training is over", false)));
}

/// Pods that ended, that answer no more, or whose node is gone.
pub fn ended_and_hung(observed: &Observed, plan: &mut Plan) {
    for pod in observed.pods.iter().filter(|pod| !pod.deleting) {
        if let Some(end) = &pod.ended {
            plan.actions.push(delete(pod, "it has ended", end.with_its_node));
        } else if is_unresponsive(observed, &pod.uid) {
            plan.actions.push(delete(pod, "its rank answers no more", false));
        }
    }
}

/// Pods that wait for an image or a Secret of which their spec, unlike ours, has not been corrected: they would wait
/// for ever, and have nothing to lose.
pub fn waiting_in_vain(observed: &Observed, plan: &mut Plan) {
    let in_vain = |pod: &&PodView| {
        let waits = matches!(pod.trouble, Some(Trouble::ImagePull { .. } | Trouble::Configuration { .. }));
        waits && pod.outdated && !pod.started && !pod.deleting && pod.ended.is_none()
    };
    let pods = observed.pods.iter().filter(in_vain);
    plan.actions.extend(pods.map(|pod| delete(pod, "its image or its Secret has been corrected", false)));
}

/// A suspended training keeps its pods until their checkpoint is written.
pub fn when_stopped(observed: &Observed, plan: &mut Plan) {
    let stopped = observed.report.as_ref().is_some_and(|report| report.phase == Phase::Stopped);
    let idle = |pod: &&PodView| {
        let rank = observed.report.as_ref().and_then(|report| report.ranks.get(&pod.uid));
        rank.is_none() && !is_member(observed, &pod.uid)
    };
    let pods = observed.pods.iter().filter(|pod| !pod.deleting && pod.ended.is_none());
    plan.actions.extend(
        pods.filter(|pod| stopped || (observed.report.is_some() && idle(pod)))
            .map(|pod| delete(pod, "the training is suspended", false)),
    );
}

/// More pods than `workers.max`: those go that do the least. Ranks that train are never deleted here:
/// the coordinator sends them home after a checkpoint.
pub fn surplus(observed: &Observed, plan: &mut Plan) {
    let max = observed.training.spec.workers.max as usize;
    let mut staying: Vec<&PodView> =
        observed.pods.iter().filter(|pod| stays(observed, pod) && !is_standby(observed, pod)).collect();
    let surplus = staying.len().saturating_sub(max);
    let Some(report) = observed.report.as_ref().filter(|_| surplus > 0) else { return };
    let standby = observed.pods.iter().filter(|pod| is_standby(observed, pod));
    plan.actions.extend(standby.map(|pod| delete(pod, "there are more pods than workers.max", false)));
    staying
        .retain(|pod| !is_member(observed, &pod.uid) && !report.ranks.get(&pod.uid).is_some_and(|rank| rank.prepared));
    let place = |pod: &PodView| observed.pools.iter().position(|pool| pool.name == pod.pool).unwrap_or(usize::MAX);
    // The least preferred pool first.
    staying.sort_by_key(|pod| (pod.started, pod.node.is_some(), Reverse(place(pod)), Reverse(pod.name.clone())));
    let pods = staying.into_iter().take(surplus);
    plan.actions.extend(pods.map(|pod| delete(pod, "there are more pods than workers.max", false)));
}

/// Pods that were asked to leave and that the generation does without. The coordinator sends ranks home
/// that it can reach; the others are deleted.
pub fn replaced(observed: &Observed, plan: &mut Plan) {
    let Some(report) = observed.report.as_ref().filter(|report| report.phase == Phase::Steady) else { return };
    let in_reach = |pod: &PodView| report.ranks.get(&pod.uid).is_some_and(|rank| rank.connected);
    let done = |pod: &&PodView| {
        pod.asked_to_leave && !pod.deleting && pod.ended.is_none() && !is_member(observed, &pod.uid) && !in_reach(pod)
    };
    let pods = observed.pods.iter().filter(done);
    plan.actions.extend(pods.map(|pod| delete(pod, "another pod has taken over", false)));
}

/// Since when no node takes the pod.
pub fn unschedulable_since(pod: &PodView) -> Option<Millis> {
    match &pod.trouble {
        Some(Trouble::Unschedulable { since_ms, .. }) if !pod.deleting => Some(*since_ms),
        _ => None,
    }
}
