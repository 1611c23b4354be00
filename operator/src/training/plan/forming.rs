//! Gangs: trainings that each hold a part of what they need must not starve each other.
//!
//! A training that has had nodes for fewer than `workers.min` pods for `placement.formingTimeout` gives
//! them back if an older one waits for nodes of the same kind, and makes no pods for a while. So the
//! oldest gets what all the younger ones held. Should the oldest not get enough even so, it lets the
//! others try in its turn: what fits nowhere blocks nobody for ever.

use super::{Plan, delete, has_node, stays};
use crate::coordinator::membership::Millis;
use crate::coordinator::report::Phase;
use crate::spot::stock_outs::nodes_of;
use crate::training::known::{Claim, ClaimState, Seniority};
use crate::training::memory::GivenBack;
use crate::training::observe::{Observed, Trouble};
use crate::training::time::millis;
use kube::ResourceExt;
use std::time::Duration;

/// The oldest waits so many times `formingTimeout`.
const PATIENCE_OF_THE_OLDEST: u64 = 4;
/// Pods are given back for at most so many times `formingTimeout`.
const MAX_FACTOR: u64 = 16;
/// A training that waits for its turn looks this often whether it has come.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Settles who of several forming trainings goes first. `true`: not this one, its pods are given back.
pub fn settle(observed: &Observed, now: Millis, plan: &mut Plan) -> bool {
    let me = seniority(observed);
    if let Some(given_back) = plan.memory.given_back {
        if now < given_back.until_ms && (given_back.as_the_oldest || !is_my_turn(observed, &me)) {
            wait(observed, now, given_back, plan);
            return true;
        }
        plan.memory.given_back = None;
    }
    if !is_forming(observed) {
        plan.memory.forming_since_ms = None;
        if observed.report.as_ref().is_some_and(|report| report.phase == Phase::Steady) {
            plan.memory.gave_back = 0;
        }
        plan.claim = Some(claim(observed, me, ClaimState::Satisfied));
        return false;
    }
    let since = *plan.memory.forming_since_ms.get_or_insert(now);
    let waited_ms = now.saturating_sub(since);
    let timeout_ms = timeout_ms(observed);
    let mut rivals = observed.rivals.iter();
    let an_older_one_waits = rivals.any(|rival| rival.state == ClaimState::Forming && rival.seniority < me);
    let holds = observed.pods.iter().any(|pod| stays(observed, pod) && has_node(pod));
    let patience_ms = timeout_ms.saturating_mul(PATIENCE_OF_THE_OLDEST);
    let due_ms = match (an_older_one_waits, observed.rivals.is_empty()) {
        (true, _) if holds => timeout_ms,
        (false, false) => patience_ms,
        _ => Millis::MAX,
    };
    if waited_ms >= due_ms {
        give_back(observed, now, !an_older_one_waits, plan);
        return true;
    }
    plan.look_again = plan.look_again.min(Duration::from_millis(due_ms - waited_ms)).min(LOOK_AGAIN);
    plan.claim = Some(claim(observed, me, ClaimState::Forming));
    false
}

/// How it stands when it wants no nodes.
pub fn satisfied(observed: &Observed) -> Claim {
    claim(observed, seniority(observed), ClaimState::Satisfied)
}

fn claim(observed: &Observed, seniority: Seniority, state: ClaimState) -> Claim {
    Claim { seniority, nodes: observed.pools.iter().map(nodes_of).collect(), state }
}

fn seniority(observed: &Observed) -> Seniority {
    let training = &observed.training;
    let trained = training.status.as_ref().is_some_and(|status| status.progress.is_some());
    Seniority {
        untrained: !trained,
        created_at_seconds: training.creation_timestamp().map_or(0, |time| time.0.as_second()),
        name: (training.namespace().unwrap_or_default(), training.name_any()),
    }
}

/// Fewer than `workers.min` pods have a node, and some wait for one in vain.
fn is_forming(observed: &Observed) -> bool {
    let mut staying = observed.pods.iter().filter(|pod| stays(observed, pod));
    let placed = staying.clone().filter(|pod| has_node(pod)).count();
    let waits = staying.any(|pod| matches!(pod.trouble, Some(Trouble::Unschedulable { .. })));
    waits && placed < observed.training.spec.workers.min as usize
}

/// The oldest of those that gave their pods back need not wait once nobody forms any more.
fn is_my_turn(observed: &Observed, me: &Seniority) -> bool {
    observed.rivals.iter().all(|rival| match rival.state {
        ClaimState::Satisfied | ClaimState::GaveWay => true,
        ClaimState::Forming => false,
        ClaimState::GaveBack => *me < rival.seniority,
    })
}

fn timeout_ms(observed: &Observed) -> Millis {
    let timeout = observed.training.spec.placement.forming_timeout.get();
    millis(timeout).max(1)
}

fn give_back(observed: &Observed, now: Millis, as_the_oldest: bool, plan: &mut Plan) {
    plan.memory.forming_since_ms = None;
    plan.memory.gave_back = plan.memory.gave_back.saturating_add(1);
    let factor = (1u64 << (plan.memory.gave_back - 1).min(16)).min(MAX_FACTOR);
    let until_ms = now.saturating_add(timeout_ms(observed).saturating_mul(factor));
    let given_back = GivenBack { until_ms, as_the_oldest };
    plan.memory.given_back = Some(given_back);
    wait(observed, now, given_back, plan);
}

fn wait(observed: &Observed, now: Millis, given_back: GivenBack, plan: &mut Plan) {
    let pods = observed.pods.iter().filter(|pod| !pod.deleting && pod.ended.is_none());
    plan.actions.extend(pods.map(|pod| delete(pod, "another training needs its node to start", false)));
    let left = Duration::from_millis(given_back.until_ms.saturating_sub(now));
    plan.look_again = plan.look_again.min(left).min(LOOK_AGAIN);
    let state = if given_back.as_the_oldest { ClaimState::GaveWay } else { ClaimState::GaveBack };
    plan.claim = Some(claim(observed, seniority(observed), state));
    plan.reason = format!("lets another training have its nodes for up to {} s", left.as_secs() + 1);
}
