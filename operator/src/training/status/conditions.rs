//! The conditions. All are always there, so that waiting for one never hangs for want of it.

use super::Obstacle;
use super::obstacle::reason_of;
use crate::coordinator::report::{MemoryNeed, Remedy};
use crate::training::build::pod::nothing_to_give_up;
use crate::training::observe::Observed;
use crate::training::plan::Plan;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use vicuna_crds::training::{Reproducibility, TrainingState, VicunaTrainingStatus, condition};
use vicuna_protocol::gigabytes;

/// Reason of condition and Event where an image is to be given up that the training was never bound to.
pub const NO_SUCH_IMAGE: &str = "NoSuchImageToGiveUp";

/// Changes of a recipe that are named, at most.
const REMEDIES: usize = 3;

/// A condition before it has its time.
struct Verdict {
    kind: &'static str,
    holds: bool,
    reason: String,
    message: String,
}

fn verdict(kind: &'static str, holds: bool, reason: impl Into<String>, message: impl Into<String>) -> Verdict {
    Verdict { kind, holds, reason: reason.into(), message: message.into() }
}

pub fn conditions(
    observed: &Observed,
    plan: &Plan,
    state: TrainingState,
    obstacle: Option<&Obstacle>,
    before: &VicunaTrainingStatus,
    now: &Time,
) -> Vec<Condition> {
    let verdicts = [
        admitted(observed),
        running(observed, state),
        progressing(observed, plan, state, obstacle),
        checkpointed(observed, obstacle, before),
        suspended(state),
        complete(observed, state),
        failed(plan, state),
        finished(state),
    ];
    let generation = observed.training.metadata.generation;
    verdicts.into_iter().map(|verdict| dated(verdict, before, generation, now)).collect()
}

/// The time of a condition is when it last changed between True and False.
fn dated(verdict: Verdict, before: &VicunaTrainingStatus, generation: Option<i64>, now: &Time) -> Condition {
    let status = if verdict.holds { "True" } else { "False" };
    let same = before.conditions.iter().find(|old| old.type_ == verdict.kind && old.status == status);
    Condition {
        type_: verdict.kind.to_owned(),
        status: status.to_owned(),
        reason: verdict.reason,
        message: verdict.message,
        observed_generation: generation,
        last_transition_time: same.map_or_else(|| now.clone(), |old| old.last_transition_time.clone()),
    }
}

fn admitted(observed: &Observed) -> Verdict {
    match crate::coordinator::job::job(&observed.training) {
        Ok(_) => match too_few(observed) {
            None => with_doubt(admitted_as(observed.training.spec.recipe.reproducibility), observed),
            Some(message) => verdict(condition::ADMITTED, false, "DoesNotFit", message),
        },
        Err(error) => verdict(condition::ADMITTED, false, "InvalidSpec", error.to_string()),
    }
}

/// What is promised, where it is not every bit.
fn admitted_as(reproducibility: Reproducibility) -> Verdict {
    match reproducibility {
        Reproducibility::Exact => verdict(condition::ADMITTED, true, "Valid", "The spec can be run."),
        Reproducibility::Fast => verdict(
            condition::ADMITTED,
            true,
            "ValidButNotExact",
            "The spec can be run. recipe.reproducibility is Fast: another run, or this one with other nodes, gives weights that differ in their last bits.",
        ),
    }
}

/// It runs, but not all that was asked for is done.
fn with_doubt(admitted: Verdict, observed: &Observed) -> Verdict {
    match nothing_to_give_up(&observed.training) {
        Some(why) => verdict(admitted.kind, admitted.holds, NO_SUCH_IMAGE, format!("{} But {why}", admitted.message)),
        None => admitted,
    }
}

/// Why `workers.min` workers have too little memory.
fn too_few(observed: &Observed) -> Option<String> {
    let needs = &observed.report.as_ref()?.memory;
    let min = observed.training.spec.workers.min;
    let need = needs.iter().find(|need| need.ranks == min && !need.fits)?;
    let device = match need.device_bytes {
        0 => String::new(),
        bytes => format!(" and {} on its GPU", gigabytes(bytes)),
    };
    let fewest = MemoryNeed::fewest_that_fit(needs);
    let others = settings_that_fit(observed, min);
    let advice = match needs.iter().any(|need| need.fits) {
        true => format!(
            "At least {fewest} workers are waited for; set workers.min to {fewest}, or give workers.resources more memory{others}."
        ),
        false => format!("No number of workers is enough: give workers.resources more memory{others}."),
    };
    Some(format!(
        "Each of {min} workers needs {}{device} by estimate, and has less. {advice}",
        gigabytes(need.host_bytes)
    ))
}

/// Changes of the recipe that would fit, those first that do so with `min` workers.
fn settings_that_fit(observed: &Observed, min: u32) -> String {
    let remedies = observed.report.iter().flat_map(|report| &report.remedies);
    let (enough, more): (Vec<_>, Vec<_>) = remedies.partition(|remedy| remedy.ranks <= min);
    let enough = enough.iter().map(|remedy| format!(", or set {}", remedy.settings));
    let more =
        more.iter().map(|Remedy { settings, ranks }| format!(", or set {settings} with at least {ranks} workers"));
    enough.chain(more).take(REMEDIES).collect()
}

fn word(state: TrainingState) -> String {
    format!("{state:?}")
}

fn activity(observed: &Observed) -> String {
    let report = observed.report.as_ref();
    report.map_or_else(|| "The membership is being read.".to_owned(), |report| sentence(&report.activity))
}

fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(|first| first.to_uppercase().to_string()).unwrap_or_default();
    format!("{first}{}.", letters.as_str())
}

fn running(observed: &Observed, state: TrainingState) -> Verdict {
    let holds = state == TrainingState::Running;
    verdict(condition::RUNNING, holds, word(state), activity(observed))
}

fn progressing(observed: &Observed, plan: &Plan, state: TrainingState, obstacle: Option<&Obstacle>) -> Verdict {
    let kind = condition::PROGRESSING;
    match (state, obstacle) {
        (TrainingState::Running, Some(obstacle)) => verdict(
            kind,
            true,
            "StepsAreMade",
            format!("{} But {}: {}", activity(observed), obstacle.reason, obstacle.message),
        ),
        (TrainingState::Running, None) => verdict(kind, true, "StepsAreMade", activity(observed)),
        (TrainingState::Complete | TrainingState::Failed | TrainingState::Suspended, _) => {
            verdict(kind, false, word(state), "No more steps are made.")
        }
        (_, Some(obstacle)) => verdict(kind, false, obstacle.reason, obstacle.message.clone()),
        (_, None) => verdict(kind, false, word(state), waiting(observed, plan)),
    }
}

/// Why it does not go on although nothing is in its way.
fn waiting(observed: &Observed, plan: &Plan) -> String {
    match &plan.memory.last_failure {
        Some(failure) if plan.memory.mishaps > 0 => {
            format!("{} The last failure: {}", activity(observed), failure.message)
        }
        _ => activity(observed),
    }
}

fn checkpointed(observed: &Observed, obstacle: Option<&Obstacle>, before: &VicunaTrainingStatus) -> Verdict {
    let kind = condition::CHECKPOINTED;
    if let Some(obstacle) = obstacle.filter(|obstacle| obstacle.of_store) {
        return verdict(kind, false, obstacle.reason, obstacle.message.clone());
    }
    let report = observed.report.as_ref();
    let held_up = report.and_then(|report| report.ranks.values().find_map(|rank| rank.held_up.as_ref()));
    if let Some(held_up) = held_up {
        let message = format!("The training goes on; its checkpoint waits: {}", held_up.message);
        return verdict(kind, false, reason_of(held_up), message);
    }
    let known = report.is_some_and(|report| report.checkpoint.is_some() || report.finish.is_some());
    if known || before.checkpoint.is_some() {
        verdict(kind, true, "Written", "A complete checkpoint is in the bucket.")
    } else {
        verdict(kind, false, "NoneYet", "No checkpoint has been written yet.")
    }
}

fn suspended(state: TrainingState) -> Verdict {
    let holds = state == TrainingState::Suspended;
    let message = if holds {
        "The pods are given back; set suspend to false to go on from the last checkpoint."
    } else {
        "The training is not suspended."
    };
    verdict(condition::SUSPENDED, holds, word(state), message)
}

fn complete(observed: &Observed, state: TrainingState) -> Verdict {
    let finish = observed.report.as_ref().and_then(|report| report.finish.as_ref());
    match finish {
        Some(finish) => verdict(
            condition::COMPLETE,
            true,
            "ResultWritten",
            format!("The result after step {} is at {}.", finish.step, finish.uri),
        ),
        None => verdict(condition::COMPLETE, false, word(state), "There is no result yet."),
    }
}

fn failed(plan: &Plan, state: TrainingState) -> Verdict {
    match (&plan.memory.verdict, state) {
        (Some((reason, message)), TrainingState::Failed) => {
            verdict(condition::FAILED, true, reason.clone(), message.clone())
        }
        _ => verdict(condition::FAILED, false, word(state), "The training has not been given up."),
    }
}

fn finished(state: TrainingState) -> Verdict {
    let holds = matches!(state, TrainingState::Complete | TrainingState::Failed);
    let message = if holds { "Nothing more will happen." } else { "The training is not over." };
    verdict(condition::FINISHED, holds, word(state), message)
}
