//! Pods that ended by themselves: whose fault it was, and whether to try again.
//!
//! A reclaim is nobody's fault and costs nothing. What lies outside the training program is tried
//! again for ever, more and more slowly. The program's own failures spend `retries.application`,
//! which progress fills up again.

use super::Plan;
use crate::coordinator::membership::Millis;
use crate::coordinator::report::RankFailure;
use crate::training::observe::{End, Observed, PodView};
use vicuna_crds::training::Failure;
use vicuna_protocol::coordinator::Cause;

/// Failures within this are one incident: when one rank fails, others often follow.
const SAME_INCIDENT_MS: Millis = 10_000;
const APPLICATION_BACKOFF_MS: Millis = 5_000;
const MISHAP_BACKOFF_MS: Millis = 1_000;
const MAX_BACKOFF_MS: Millis = 300_000;

/// Whose fault it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It ended because it was told to, or its node was taken.
    Nobody,
    /// Node, network, store, image.
    Surroundings,
    Application,
}

/// Counts each pod that failed, once.
pub fn judge(observed: &Observed, now: Millis, plan: &mut Plan) {
    refill(observed, plan);
    for pod in &observed.pods {
        let Some(end) = &pod.ended else { continue };
        let said = observed.report.as_ref().and_then(|report| report.failures.get(&pod.uid));
        let fault = fault(pod, end, said);
        if fault == Fault::Nobody || !plan.memory.count(&pod.uid) {
            continue;
        }
        plan.memory.last_failure = Some(failure(pod, end, said, fault));
        let again = now.saturating_sub(plan.memory.last_incident_ms) < SAME_INCIDENT_MS;
        if again {
            continue;
        }
        plan.memory.last_incident_ms = now;
        plan.memory.step_at_failure = plan.memory.step_at_failure.max(reached(observed));
        match fault {
            Fault::Application => spend(observed, now, plan),
            _ => back_off(now, plan),
        }
    }
}

fn reached(observed: &Observed) -> u64 {
    let progress = observed.report.as_ref().and_then(|report| report.progress.as_ref());
    progress.map_or(0, |progress| progress.step)
}

/// A step beyond the one where it failed: what went wrong is overcome.
fn refill(observed: &Observed, plan: &mut Plan) {
    if reached(observed) > plan.memory.step_at_failure {
        plan.memory.restarts = 0;
        plan.memory.mishaps = 0;
    }
}

fn spend(observed: &Observed, now: Millis, plan: &mut Plan) {
    let allowed = observed.training.spec.retries.application;
    let memory = &mut plan.memory;
    memory.restarts += 1;
    if memory.restarts > allowed {
        let message = memory.last_failure.as_ref().map_or("", |failure| &failure.message);
        let verdict = format!("The training program failed {} times without progress: {message}", memory.restarts);
        memory.verdict = Some(("ApplicationFailed".to_owned(), verdict));
    } else {
        memory.backoff_until_ms = now + doubled(APPLICATION_BACKOFF_MS, memory.restarts);
    }
}

fn back_off(now: Millis, plan: &mut Plan) {
    plan.memory.mishaps = plan.memory.mishaps.saturating_add(1);
    plan.memory.backoff_until_ms = now + doubled(MISHAP_BACKOFF_MS, plan.memory.mishaps);
}

fn doubled(base_ms: Millis, times: u32) -> Millis {
    (base_ms << times.saturating_sub(1).min(16)).min(MAX_BACKOFF_MS)
}

/// Whose fault a pod's end was.
pub fn fault(pod: &PodView, end: &End, said: Option<&RankFailure>) -> Fault {
    // 143: it was told to end by SIGTERM, and did not stay to say so.
    let told = end.succeeded || end.exit_code == Some(143);
    if told || end.with_its_node || pod.departure.is_some() || pod.deleting {
        return Fault::Nobody;
    }
    match cause(end, said) {
        Some(Cause::Infrastructure | Cause::Store | Cause::Model | Cause::Data) => return Fault::Surroundings,
        Some(_) => return Fault::Application,
        None => {}
    }
    match (end.reason.as_str(), end.exit_code) {
        ("OOMKilled", _) => Fault::Application,
        // Killed, or never started, by somebody else: the pod has a reason of its own then.
        (_, None | Some(137)) => Fault::Surroundings,
        _ => Fault::Application,
    }
}

/// What the rank said, or else what its exit code says: 20 and the cause's number.
fn cause(end: &End, said: Option<&RankFailure>) -> Option<Cause> {
    said.map(|failure| failure.cause).or_else(|| {
        let number = end.exit_code?.checked_sub(20)?;
        Cause::try_from(number).ok().filter(|cause| *cause != Cause::Unspecified)
    })
}

fn failure(pod: &PodView, end: &End, said: Option<&RankFailure>, fault: Fault) -> Failure {
    let cause = match cause(end, said) {
        Some(Cause::Store) => "Store",
        Some(Cause::Model) => "Model",
        Some(Cause::Data) => "Data",
        Some(Cause::OutOfMemory) => "OutOfMemory",
        Some(Cause::Numerics) => "Numerics",
        Some(Cause::Infrastructure) => "Infrastructure",
        Some(Cause::Application | Cause::Unspecified) => "Application",
        None if end.reason == "OOMKilled" => "OutOfMemory",
        None if fault == Fault::Application => "Application",
        None => "Infrastructure",
    };
    Failure {
        cause: cause.to_owned(),
        exit_code: end.exit_code,
        node: pod.node.clone(),
        message: said.map_or_else(|| explain(pod, end), |failure| failure.message.clone()),
    }
}

fn explain(pod: &PodView, end: &End) -> String {
    let name = &pod.name;
    let detail = if end.message.is_empty() { String::new() } else { format!(" ({})", end.message) };
    match (end.reason.as_str(), end.exit_code) {
        ("OOMKilled", _) => format!(
            "Pod {name} ran out of memory: raise workers.resources.limits.memory, or lower recipe.microBatch or recipe.maxLength."
        ),
        (reason, Some(code)) => format!("Pod {name} ended with exit code {code} {reason}{detail}: see its log."),
        (reason, None) => format!("Pod {name} ended: {reason}{detail}."),
    }
}
