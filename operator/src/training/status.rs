//! What the user is told: conditions, numbers and one word. Pure, but for the write at the end.

mod conditions;
mod obstacle;

pub use conditions::NO_SUCH_IMAGE;
pub use obstacle::{Obstacle, obstacle};

use super::accounts::Accounts;
use super::apply::Applied;
use super::build;
use super::observe::{Observed, PodView};
use super::plan::Plan;
use super::time::period;
use crate::coordinator::membership::Millis;
use crate::coordinator::report::{MemoryNeed, Phase, Report};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use std::collections::BTreeMap;
use std::time::Duration;
use vicuna_crds::training::{
    CheckpointStatus, Disruptions, Membership, MemoryEstimate, Progress, TrainingResult, TrainingState,
    VicunaTrainingStatus, condition,
};
use vicuna_protocol::gigabytes;

/// Between writes of mere progress.
pub const WRITE_EVERY: Duration = Duration::from_secs(15);

/// The status that follows from what was seen and done.
pub fn status(observed: &Observed, plan: &Plan, applied: &Applied, now: Millis) -> VicunaTrainingStatus {
    let before = observed.training.status.clone().unwrap_or_default();
    if is_terminal(&before) {
        return before;
    }
    if let Some(ended) = &observed.memory.ended {
        return ended.clone();
    }
    if is_taking_over(observed) && before.state.is_some() && plan.memory.verdict.is_none() {
        return before;
    }
    let obstacle = obstacle(observed, applied);
    let state = state(observed, plan, obstacle.as_ref());
    let report = observed.report.as_ref();
    let time = time(now);
    let over = matches!(state, TrainingState::Complete | TrainingState::Failed);
    let ready = report.filter(|report| report.phase == Phase::Steady).map_or(0, |report| report.members.len());
    VicunaTrainingStatus {
        conditions: conditions::conditions(observed, plan, state, obstacle.as_ref(), &before, &time),
        state: Some(state),
        progress: report
            .and_then(|report| progress(report, &plan.memory.accounts, before.progress.as_ref()))
            .or(before.progress.clone()),
        membership: report.map(|report| membership(report, &observed.pods, ready)).or(before.membership),
        ready_max: Some(format!("{ready}/{}", observed.training.spec.workers.max)),
        selector: Some(build::selector(&observed.training)),
        checkpoint: report.and_then(checkpoint).or(before.checkpoint),
        disruptions: report
            .map(|report| disruptions(report, before.disruptions.as_ref()))
            .or(before.disruptions.clone()),
        image: image(observed, report),
        given_up_image: build::pod::given_up_image(&observed.training).map(str::to_owned).or(before.given_up_image),
        memory: report
            .map(|report| memory(observed, report))
            .filter(|known| !known.is_empty())
            .unwrap_or(before.memory),
        restarts: Some(plan.memory.restarts.clone()),
        cost: plan.memory.accounts.cost(&observed.pools).or(before.cost.clone()),
        worker_time: plan.memory.accounts.worker_time().or(before.worker_time.clone()),
        goodput: plan.memory.accounts.goodput().or(before.goodput),
        last_failure: plan.memory.last_failure.clone().or(before.last_failure),
        result: report.and_then(result).or(before.result),
        observed_generation: observed.training.metadata.generation,
        start_time: before
            .start_time
            .or_else(|| (!observed.pods.is_empty() || applied.created > 0).then(|| time.clone())),
        completion_time: before.completion_time.or_else(|| over.then(|| time.clone())),
    }
}

/// That of the pods that made the first step, until it is given up; then of those that make the next one with another.
fn image(observed: &Observed, report: Option<&Report>) -> Option<String> {
    let training = &observed.training;
    if let Some(pinned) = build::pod::pinned_image(training) {
        return Some(pinned.to_owned());
    }
    let report = report.filter(|report| report.progress.is_some())?;
    let is_member = |pod: &&PodView| report.members.iter().any(|member| member.pod_uid == pod.uid);
    let images = observed.pods.iter().filter(is_member).filter_map(|pod| pod.image.as_deref());
    images.into_iter().find(|image| build::pod::given_up_image(training) != Some(image)).map(str::to_owned)
}

fn memory(observed: &Observed, report: &Report) -> Vec<MemoryEstimate> {
    let workers = &observed.training.spec.workers;
    let asked = report.memory.iter().filter(|need| (workers.min..=workers.max).contains(&need.ranks));
    let estimate = |need: &MemoryNeed| MemoryEstimate {
        workers: need.ranks,
        host: gigabytes(need.host_bytes),
        device: (need.device_bytes > 0).then(|| gigabytes(need.device_bytes)),
        fits: need.fits,
    };
    asked.map(estimate).collect()
}

/// A new leader does not know yet how things stand: ranks train on without it, so the status stays.
fn is_taking_over(observed: &Observed) -> bool {
    observed.report.as_ref().is_none_or(|report| report.phase == Phase::Adopting)
}

/// Terminal stays terminal.
pub fn is_terminal(status: &VicunaTrainingStatus) -> bool {
    status.conditions.iter().any(|it| it.type_ == condition::FINISHED && it.status == "True")
}

/// When the status should be written: now, after some time, or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    Now,
    After(Duration),
    No,
}

/// Changes of state are written at once, mere progress now and then.
pub fn when_to_write(
    new: &VicunaTrainingStatus,
    written: Option<&(VicunaTrainingStatus, Millis)>,
    now: Millis,
) -> Write {
    let Some((old, at)) = written else { return Write::Now };
    if new == old {
        return Write::No;
    }
    let since = Duration::from_millis(now.saturating_sub(*at));
    if without_numbers(new) != without_numbers(old) || since >= WRITE_EVERY {
        Write::Now
    } else {
        Write::After(WRITE_EVERY - since)
    }
}

/// What is left is worth a write at once. The first step and the first checkpoint are.
fn without_numbers(status: &VicunaTrainingStatus) -> (bool, bool, VicunaTrainingStatus) {
    let (first_step, first_checkpoint) = (status.progress.is_some(), status.checkpoint.is_some());
    let rest = VicunaTrainingStatus {
        progress: None,
        checkpoint: None,
        cost: None,
        worker_time: None,
        goodput: None,
        ..status.clone()
    };
    (first_step, first_checkpoint, rest)
}

fn time(now: Millis) -> Time {
    let ms = i64::try_from(now).unwrap_or(i64::MAX);
    // Whole seconds, as the API server stores them: else each status would differ from the stored one.
    Time(Timestamp::from_second(ms / 1000).unwrap_or(Timestamp::UNIX_EPOCH))
}

fn state(observed: &Observed, plan: &Plan, obstacle: Option<&Obstacle>) -> TrainingState {
    let Some(report) = &observed.report else {
        return if plan.memory.verdict.is_some() { TrainingState::Failed } else { TrainingState::Pending };
    };
    if report.finish.is_some() {
        return TrainingState::Complete;
    }
    if plan.memory.verdict.is_some() {
        return TrainingState::Failed;
    }
    if observed.training.spec.suspend {
        let gone = report.phase == Phase::Stopped && observed.pods.is_empty();
        return if gone { TrainingState::Suspended } else { TrainingState::Suspending };
    }
    match report.phase {
        Phase::Steady => TrainingState::Running,
        _ if obstacle.is_some_and(|obstacle| obstacle.blocks) => TrainingState::Blocked,
        _ if has_trained(observed, report) => TrainingState::Recovering,
        _ if observed.pods.iter().any(|pod| pod.started) => TrainingState::Starting,
        _ => TrainingState::Pending,
    }
}

/// Before the first step there is nothing to recover.
fn has_trained(observed: &Observed, report: &Report) -> bool {
    let before = observed.training.status.as_ref().and_then(|status| status.progress.as_ref());
    report.progress.is_some() || before.is_some_and(|progress| progress.step > 0)
}

fn progress(report: &Report, accounts: &Accounts, before: Option<&Progress>) -> Option<Progress> {
    // A new leader hears of the next evaluation, not of the last one.
    let evaluation = report.evaluation.map(|it| (it.step, it.loss));
    let evaluation = evaluation.or_else(|| before.and_then(|it| it.evaluation_step.zip(it.evaluation_loss)));
    let last = report.progress.as_ref();
    let steps = last.map_or(0, |last| last.steps).max(report.steps);
    let step = report.finish.as_ref().map(|finish| finish.step).or(last.map(|last| last.step))?;
    let rate = last.filter(|last| last.step_seconds > 0.0).map(|last| last.tokens as f64 / last.step_seconds);
    Some(Progress {
        step,
        steps,
        step_of: Some(format!("{step}/{steps}")),
        epoch: last.map_or(0.0, |last| last.epoch),
        loss: last.and_then(|last| last.loss),
        evaluation_loss: evaluation.map(|(_, loss)| loss),
        evaluation_step: evaluation.map(|(step, _)| step),
        learning_rate: last.map(|last| last.learning_rate),
        tokens_per_second: rate,
        remaining: accounts.remaining(step, steps),
    })
}

fn membership(report: &Report, pods: &[PodView], ready: usize) -> Membership {
    let mut pools: BTreeMap<String, u32> = BTreeMap::new();
    let steady = report.phase == Phase::Steady;
    for member in report.members.iter().filter(|_| steady) {
        if let Some(pod) = pods.iter().find(|pod| pod.uid == member.pod_uid) {
            *pools.entry(pod.pool.clone()).or_default() += 1;
        }
    }
    let by_pool: Vec<String> = pools.iter().map(|(pool, ranks)| format!("{pool} {ranks}")).collect();
    Membership {
        generation: report.generation,
        ready: u32::try_from(ready).unwrap_or(u32::MAX),
        by_pool: (!by_pool.is_empty()).then(|| by_pool.join(", ")),
        pools,
    }
}

fn checkpoint(report: &Report) -> Option<CheckpointStatus> {
    report.checkpoint.as_ref().map(|checkpoint| CheckpointStatus {
        step: checkpoint.step,
        uri: checkpoint.uri.clone(),
        digest: checkpoint.digest.clone(),
        time: Some(time(checkpoint.at_ms)),
        stall: Some(period(checkpoint.stall_ms)),
        upload: Some(period(checkpoint.upload_ms)),
        interval: (checkpoint.interval_ms > 0).then(|| period(checkpoint.interval_ms)),
    })
}

fn disruptions(report: &Report, before: Option<&Disruptions>) -> Disruptions {
    let counters = report.disruptions;
    Disruptions {
        notices: counters.notices,
        reclaims: counters.reclaims,
        lost_steps: counters.lost_steps,
        last_recovery: counters.last_recovery_ms.map(period).or(before.and_then(|before| before.last_recovery)),
    }
}

fn result(report: &Report) -> Option<TrainingResult> {
    report.finish.as_ref().map(|finish| TrainingResult { uri: finish.uri.clone(), digest: finish.digest.clone() })
}
