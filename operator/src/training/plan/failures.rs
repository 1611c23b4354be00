//! Pods that ended by themselves, or hang: whose fault it was, and whether to try again.
//!
//! A reclaim is nobody's fault and costs nothing. Each cause has its budget in `spec.retries`, which
//! progress fills up again; what fails with the store, the model or the data is tried again for ever,
//! more and more slowly, since a person may correct it meanwhile. A loss that is not finite would be
//! the same at the next attempt: the training is given up at once.

use super::{Plan, is_unresponsive};
use crate::coordinator::membership::Millis;
use crate::coordinator::report::RankFailure;
use crate::training::observe::{End, Observed, PodView};
use vicuna_crds::training::Failure;
use vicuna_protocol::coordinator::Cause;

/// Failures within this are one incident: when one rank fails, others often follow.
const SAME_INCIDENT_MS: Millis = 10_000;
const APPLICATION_BACKOFF_MS: Millis = 5_000;
const MISHAP_BACKOFF_MS: Millis = 1_000;
/// Hung ranks of which it is not known yet whether their nodes live, at most.
const MAX_HUNG: usize = 64;
const MAX_BACKOFF_MS: Millis = 300_000;
/// Of the log's end, in characters and lines.
const MAX_LOG: usize = 1024;
const MAX_LOG_LINES: usize = 12;

/// Whose fault it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It ended because it was told to, or its node was taken.
    Nobody,
    /// Store, model or data.
    Storage(&'static str),
    /// Node, network, kubelet.
    Infrastructure,
    Hang,
    /// Of the host, or of a device.
    OutOfMemory {
        device: bool,
    },
    Numerics,
    Application,
}

impl Fault {
    /// As it is written in `status.lastFailure.cause`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nobody => "Nobody",
            Self::Storage(cause) => cause,
            Self::Infrastructure => "Infrastructure",
            Self::Hang => "Hang",
            Self::OutOfMemory { device: false } => "OutOfMemory",
            Self::OutOfMemory { device: true } => "DeviceOutOfMemory",
            Self::Numerics => "Numerics",
            Self::Application => "Application",
        }
    }

    /// Whether it says something about the node on which it happened.
    fn is_of_the_node(self) -> bool {
        matches!(self, Self::Infrastructure | Self::Hang)
    }
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
        let (exit_code, node) = (end.exit_code, pod.node.clone());
        let failure =
            Failure { cause: fault.name().to_owned(), exit_code, node, message: explain(pod, end, said, fault) };
        record(observed, fault, failure, now, plan);
    }
    suspect(observed, plan);
    for failure in proven(observed, plan) {
        record(observed, Fault::Hang, failure, now, plan);
    }
}

fn record(observed: &Observed, fault: Fault, failure: Failure, now: Millis, plan: &mut Plan) {
    plan.faulty_nodes.extend(failure.node.clone().filter(|_| fault.is_of_the_node()));
    plan.memory.last_failure = Some(failure);
    if now.saturating_sub(plan.memory.last_incident_ms) < SAME_INCIDENT_MS {
        return;
    }
    plan.memory.last_incident_ms = now;
    plan.memory.step_at_failure = plan.memory.step_at_failure.max(reached(observed));
    charge(observed, fault, now, plan);
}

/// Takes note of ranks that hang. A node that was taken without notice looks the same at first.
fn suspect(observed: &Observed, plan: &mut Plan) {
    for pod in &observed.pods {
        let hangs = is_unresponsive(observed, &pod.uid) && pod.ended.is_none() && !pod.deleting && !hurried(pod);
        if !hangs || plan.memory.hung.len() >= MAX_HUNG || !plan.memory.count(&format!("{}/hang", pod.uid)) {
            continue;
        }
        let (cause, node) = (Fault::Hang.name().to_owned(), pod.node.clone());
        plan.memory.hung.insert(pod.uid.clone(), Failure { cause, exit_code: None, node, message: hung(pod) });
    }
}

/// Hung ranks whose pods the kubelet has ended: their nodes live. Those whose nodes turned out to be gone
/// were reclaimed.
fn proven(observed: &Observed, plan: &mut Plan) -> Vec<Failure> {
    let mut proven = Vec::new();
    plan.memory.hung.retain(|uid, failure| {
        let pod = observed.pods.iter().find(|pod| pod.uid == *uid);
        let reclaimed = pod.is_some_and(|pod| {
            pod.departure.as_ref().is_some_and(|departure| departure.reclaim)
                || pod.ended.as_ref().is_some_and(|end| end.with_its_node)
        });
        let ended = pod.is_none_or(|pod| pod.ended.is_some());
        if ended && !reclaimed {
            proven.push(failure.clone());
        }
        !ended && !reclaimed
    });
    proven
}

fn reached(observed: &Observed) -> u64 {
    let progress = observed.report.as_ref().and_then(|report| report.progress.as_ref());
    progress.map_or(0, |progress| progress.step)
}

/// A step beyond the one where it failed: what went wrong is overcome.
fn refill(observed: &Observed, plan: &mut Plan) {
    if reached(observed) > plan.memory.step_at_failure {
        plan.memory.restarts.spent = Default::default();
        plan.memory.mishaps = 0;
    }
}

/// Spends one retry of the budget, or gives the training up.
fn charge(observed: &Observed, fault: Fault, now: Millis, plan: &mut Plan) {
    let retries = &observed.training.spec.retries;
    let restarts = &mut plan.memory.restarts;
    let (total, budget) = match fault {
        Fault::Nobody => return,
        Fault::Numerics => return give_up_on_the_numbers(observed, plan),
        Fault::Storage(_) => (&mut restarts.storage, None),
        Fault::Application => (
            &mut restarts.application,
            Some((&mut restarts.spent.application, retries.application, "ApplicationFailed")),
        ),
        Fault::Infrastructure => (
            &mut restarts.infrastructure,
            Some((&mut restarts.spent.infrastructure, retries.infrastructure, "InfrastructureFailed")),
        ),
        Fault::Hang => (
            &mut restarts.hang,
            Some((&mut restarts.spent.infrastructure, retries.infrastructure, "InfrastructureFailed")),
        ),
        Fault::OutOfMemory { .. } => (
            &mut restarts.out_of_memory,
            Some((&mut restarts.spent.out_of_memory, retries.out_of_memory, "OutOfMemory")),
        ),
    };
    *total = total.saturating_add(1);
    if let Some((spent, allowed, reason)) = budget {
        *spent = spent.saturating_add(1);
        if *spent > allowed {
            let times = *spent;
            return give_up(plan, reason, times);
        }
    }
    back_off(fault, now, plan);
}

fn give_up(plan: &mut Plan, reason: &str, times: u32) {
    let message = plan.memory.last_failure.as_ref().map_or("", |failure| &failure.message);
    let verdict = format!("The training failed {times} times without progress: {message}");
    plan.memory.verdict = Some((reason.to_owned(), verdict));
}

fn give_up_on_the_numbers(observed: &Observed, plan: &mut Plan) {
    let message = plan.memory.last_failure.as_ref().map_or("", |failure| &failure.message);
    let checkpoint = observed.report.as_ref().and_then(|report| report.checkpoint.as_ref());
    let last_good = checkpoint.map_or_else(
        || "There is no checkpoint of it.".to_owned(),
        |checkpoint| format!("The last good checkpoint is that of step {}, {}.", checkpoint.step, checkpoint.uri),
    );
    let verdict = format!(
        "The numbers of the training are not finite, and would not be at another attempt: {message} {last_good} Lower recipe.learningRate or recipe.gradientClip, or look for broken samples in the data, and create a new training."
    );
    plan.memory.verdict = Some(("LossNotFinite".to_owned(), verdict));
}

fn back_off(fault: Fault, now: Millis, plan: &mut Plan) {
    let memory = &mut plan.memory;
    memory.mishaps = memory.mishaps.saturating_add(1);
    let base_ms = match fault {
        Fault::Application | Fault::OutOfMemory { .. } => APPLICATION_BACKOFF_MS,
        // The others hold its place, and its work is with its twin or in a checkpoint.
        Fault::Hang => return,
        _ => MISHAP_BACKOFF_MS,
    };
    memory.backoff_until_ms = now + doubled(base_ms, memory.mishaps);
}

fn doubled(base_ms: Millis, times: u32) -> Millis {
    (base_ms << times.saturating_sub(1).min(16)).min(MAX_BACKOFF_MS)
}

fn hurried(pod: &PodView) -> bool {
    pod.departure.as_ref().is_some_and(|departure| departure.hurry)
}

/// Whose fault a pod's end was.
pub fn fault(pod: &PodView, end: &End, said: Option<&RankFailure>) -> Fault {
    // The node is short of memory or disk, and stays.
    if end.reason == "Evicted" && !pod.deleting {
        return Fault::Infrastructure;
    }
    // 143: it was told to end by SIGTERM, and did not stay to say so.
    let told = end.succeeded || end.exit_code == Some(143);
    if told || end.with_its_node || hurried(pod) || pod.deleting {
        return Fault::Nobody;
    }
    let device = says_device(&end.message) || said.is_some_and(|failure| says_device(&failure.message));
    match cause(end, said) {
        Some(Cause::Store) => return Fault::Storage("Store"),
        Some(Cause::Model) => return Fault::Storage("Model"),
        Some(Cause::Data) => return Fault::Storage("Data"),
        Some(Cause::Infrastructure) => return Fault::Infrastructure,
        Some(Cause::OutOfMemory) => return Fault::OutOfMemory { device },
        Some(Cause::Numerics) => return Fault::Numerics,
        Some(Cause::Application | Cause::Unspecified) => return Fault::Application,
        None => {}
    }
    match (end.reason.as_str(), end.exit_code) {
        ("OOMKilled", _) => Fault::OutOfMemory { device: false },
        // Killed, or never started, by somebody else: the pod has a reason of its own then.
        (_, None | Some(137)) => Fault::Infrastructure,
        _ if device => Fault::OutOfMemory { device },
        _ => Fault::Application,
    }
}

/// CUDA's words for a device that has no memory left.
fn says_device(message: &str) -> bool {
    message.contains("CUDA out of memory") || message.contains("CUDA error: out of memory")
}

/// What the rank said, or else what its exit code says: 20 and the cause's number.
fn cause(end: &End, said: Option<&RankFailure>) -> Option<Cause> {
    said.map(|failure| failure.cause).or_else(|| {
        let number = end.exit_code?.checked_sub(20)?;
        Cause::try_from(number).ok().filter(|cause| *cause != Cause::Unspecified)
    })
}

fn hung(pod: &PodView) -> String {
    let node = pod.node.as_deref().unwrap_or("unknown");
    format!("The rank in pod {} on node {node} made no step and did not answer: its pod is replaced.", pod.name)
}

fn explain(pod: &PodView, end: &End, said: Option<&RankFailure>, fault: Fault) -> String {
    let name = &pod.name;
    let what = match (said, fault, end.exit_code) {
        (Some(failure), ..) => failure.message.clone(),
        (None, Fault::OutOfMemory { device: false }, _) => format!(
            "Pod {name} ran out of memory: raise workers.resources.limits.memory, or lower recipe.microBatch or recipe.maxLength."
        ),
        (None, Fault::OutOfMemory { device: true }, _) => format!(
            "Pod {name} ran out of its device's memory: lower recipe.microBatch or recipe.maxLength, or use larger devices."
        ),
        (None, _, Some(code)) => format!("Pod {name} ended with exit code {code} {}.", end.reason),
        (None, _, None) => return format!("Pod {name} ended: {} {}", end.reason, end.message).trim_end().to_owned(),
    };
    let log = last_lines(&end.message);
    if log.is_empty() { what } else { format!("{what}\nThe last lines of its log:\n{log}") }
}

/// The end of what the kubelet kept of the log.
fn last_lines(log: &str) -> String {
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    let tail = lines[lines.len().saturating_sub(MAX_LOG_LINES)..].join("\n");
    let skipped = tail.chars().count().saturating_sub(MAX_LOG);
    tail.chars().skip(skipped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::membership::Departure;

    fn end(exit_code: Option<i32>, reason: &str, message: &str) -> End {
        End { exit_code, reason: reason.into(), message: message.into(), ..End::default() }
    }

    #[test]
    fn each_end_has_its_cause() {
        let cases = [
            (end(Some(1), "Error", ""), Fault::Application),
            (end(Some(139), "Error", ""), Fault::Application),
            (end(Some(21), "Error", ""), Fault::Storage("Store")),
            (end(Some(23), "Error", ""), Fault::Storage("Data")),
            (end(Some(24), "Error", ""), Fault::OutOfMemory { device: false }),
            (end(Some(24), "Error", "CUDA out of memory. Tried to"), Fault::OutOfMemory { device: true }),
            (end(Some(25), "Error", ""), Fault::Numerics),
            (end(Some(26), "Error", ""), Fault::Infrastructure),
            (end(Some(137), "OOMKilled", ""), Fault::OutOfMemory { device: false }),
            (end(Some(137), "Error", ""), Fault::Infrastructure),
            (end(Some(134), "Error", "what(): CUDA error: out of memory"), Fault::OutOfMemory { device: true }),
            (end(None, "UnexpectedAdmissionError", "no device"), Fault::Infrastructure),
            (end(Some(137), "Evicted", "low on memory"), Fault::Infrastructure),
            (end(Some(143), "Error", ""), Fault::Nobody),
        ];
        for (end, expected) in cases {
            assert_eq!(fault(&PodView::default(), &end, None), expected, "{end:?}");
        }
    }

    #[test]
    fn a_failure_on_a_node_that_is_only_cordoned_is_still_a_failure() {
        let departure = |hurry| Departure { source: "x".into(), deadline_ms: 0, hurry, reclaim: hurry };
        let on = |hurry| PodView { departure: Some(departure(hurry)), ..PodView::default() };
        assert_eq!(fault(&on(false), &end(Some(1), "Error", ""), None), Fault::Application);
        assert_eq!(fault(&on(true), &end(Some(1), "Error", ""), None), Fault::Nobody);
    }

    #[test]
    fn a_hang_is_charged_once_its_node_is_known_to_live() {
        use crate::training::tests::{NOW, observed};
        let hung = observed().pod("t-spot-0", |_| {}).reported(|report| {
            report.unresponsive = ["t-spot-0".to_owned()].into();
        });
        let first = crate::training::plan::plan(&hung, NOW);
        assert_eq!((first.memory.restarts.hang, first.memory.hung.len()), (0, 1));
        let lived = Observed { memory: first.memory.clone(), ..observed() };
        let after = crate::training::plan::plan(&lived, NOW + 30_000);
        assert_eq!((after.memory.restarts.hang, after.memory.restarts.spent.infrastructure), (1, 1));
        assert_eq!(after.memory.last_failure.unwrap().cause, "Hang");
        assert_eq!(after.faulty_nodes, ["n1".to_owned()].into());
        let reclaimed = Observed { memory: first.memory, ..observed() }.pod("t-spot-0", |pod| {
            pod.deleting = true;
            pod.departure = Some(Departure { source: "x".into(), deadline_ms: 1, hurry: true, reclaim: true });
        });
        let after = crate::training::plan::plan(&reclaimed, NOW + 30_000);
        assert_eq!((after.memory.restarts.hang, after.memory.hung.len()), (0, 0));
    }

    #[test]
    fn the_message_ends_with_the_last_lines_of_the_log() {
        let log: String = (0..100).map(|line| format!("line {line}\n\n")).collect();
        let pod = PodView { name: "p".into(), ..PodView::default() };
        let text = explain(&pod, &end(Some(1), "Error", &log), None, Fault::Application);
        assert!(
            text.starts_with("Pod p ended with exit code 1 Error.") && text.ends_with("line 98\nline 99"),
            "{text}"
        );
        assert!(!text.contains("line 80"), "{text}");
        assert!(last_lines(&"ä".repeat(5000)).chars().count() <= MAX_LOG);
    }
}
