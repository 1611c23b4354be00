//! What users see: a pure function of what was observed, planned and done.

use super::apply::Applied;
use super::build::selector;
use super::names::{public_name, public_names};
use super::observe::readiness::MODEL_UNAVAILABLE;
use super::observe::{Life, Model, Observed, Trouble, Worker};
use super::plan::Plan;
use super::plan::scale::{Activity, Decision};
use crate::config::Config;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use vicuna_crds::serving::condition::{MODEL_AVAILABLE, READY, SCALING_ACTIVE};
use vicuna_crds::serving::{Replicas, SCALING_HISTORY_MAX, Scaling, VicunaServingStatus};
use vicuna_crds::{Capacity, Condition, Pool};

/// A condition before it has a time: status, reason, message.
struct Finding {
    type_: &'static str,
    holds: bool,
    reason: String,
    message: String,
}

pub fn status(
    observed: &Observed,
    plan: &Plan,
    applied: &Applied,
    config: &Config,
    now: Timestamp,
) -> VicunaServingStatus {
    let serving = &observed.serving;
    let before = serving.status.clone().unwrap_or_default();
    let replicas = replicas(observed, plan.scaling.desired);
    let findings = [ready(observed, &replicas, applied), model_available(observed), scaling_active(&plan.scaling)];
    let (source, digest) = match &observed.model {
        Model::Known(source) => (Some(source.uri.clone()), source.digest.clone()),
        // What is served from before is still told.
        Model::Missing { .. } => (before.source.clone(), before.digest.clone()),
    };
    let selector = selector(serving).iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>();
    VicunaServingStatus {
        conditions: findings.map(|finding| dated(finding, &before.conditions, observed, now)).into(),
        ready_desired: Some(format!("{}/{}", replicas.ready, replicas.desired)),
        replicas: Some(replicas),
        selector: Some(selector.join(",")),
        url: Some(config.gateway_url()),
        model: Some(public_name(serving)),
        adapters: public_names(serving).split_off(1),
        source,
        digest,
        scaling_history: history(before.scaling_history, &plan.scaling, now),
        observed_generation: serving.metadata.generation,
    }
}

fn replicas(observed: &Observed, desired: u32) -> Replicas {
    let pools = Pool::of(&observed.serving.spec.pools);
    let ready = || observed.workers.iter().filter(|worker| worker.life == Life::Ready);
    let of = |capacity: Capacity| {
        let kind = |worker: &&Worker| {
            let pool = pools.iter().find(|pool| pool.name == worker.pool);
            pool.is_some_and(|pool| pool.capacity == capacity)
        };
        count(ready().filter(kind).count())
    };
    Replicas {
        desired,
        ready: count(ready().count()),
        spot: of(Capacity::Spot),
        on_demand: of(Capacity::OnDemand),
        on_prem: of(Capacity::OnPrem),
    }
}

fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// A worker answers. If none does: the first of our own errors, the missing model, the workers' troubles.
fn ready(observed: &Observed, replicas: &Replicas, applied: &Applied) -> Finding {
    let Replicas { desired, ready, .. } = replicas;
    let trouble = observed.workers.iter().find_map(|worker| worker.trouble.as_ref());
    let finding =
        |holds, reason: &str, message: String| Finding { type_: READY, holds, reason: reason.to_owned(), message };
    let answering = format!("{ready} of {desired} workers answer requests.");
    if *ready > 0 {
        return match trouble {
            Some(Trouble { reason, message, .. }) => finding(true, reason, format!("{answering} {message}")),
            None => finding(true, "WorkersReady", answering),
        };
    }
    if let Some(error) = applied.error() {
        return finding(false, "NotApplied", format!("{error}. It is tried again."));
    }
    match (&observed.model, trouble) {
        (Model::Missing { reason, message }, _) => finding(false, reason, message.clone()),
        (_, Some(Trouble { reason, message, .. })) => finding(false, reason, message.clone()),
        (_, None) if *desired == 0 => finding(false, "ScaledToZero", at_zero(observed).to_owned()),
        (_, None) => finding(false, "WorkersStarting", answering),
    }
}

fn at_zero(observed: &Observed) -> &'static str {
    match observed.serving.spec.autoscaling {
        Some(_) => "Nobody has asked for the model for a while: the next request brings a worker and waits for it.",
        None => "No workers are wanted: set spec.replicas to 1 or more.",
    }
}

/// A worker that is ready has read the model, whatever another one says.
fn model_available(observed: &Observed) -> Finding {
    let mut workers = observed.workers.iter();
    let read = workers.clone().any(|worker| worker.life == Life::Ready);
    let unreadable = workers.find_map(|worker| worker.trouble.as_ref().filter(|it| it.reason == MODEL_UNAVAILABLE));
    let (holds, reason, message) = match (&observed.model, unreadable) {
        (Model::Known(_), Some(Trouble { reason, message, .. })) if !read => (false, *reason, message.clone()),
        (Model::Known(source), _) => (true, "SourceKnown", format!("The model is at {}.", source.uri)),
        (Model::Missing { reason, message }, _) => (false, *reason, message.clone()),
    };
    Finding { type_: MODEL_AVAILABLE, holds, reason: reason.to_owned(), message }
}

fn scaling_active(decision: &Decision) -> Finding {
    let (holds, reason, message) = match decision.activity {
        Activity::Following => (true, "FollowingDemand", "Workers follow the unfinished requests at the gateways."),
        Activity::Fixed => (false, "FixedReplicas", "spec.replicas says how many workers there are."),
        Activity::NoReports => (
            false,
            "NoReports",
            "No gateway has told its load yet, so the number of workers stays: see whether vicuna-gateway runs and reaches the operator.",
        ),
        Activity::StaleReports => (
            false,
            "StaleReports",
            "A gateway has been silent for some time, so no worker is let go: see whether it runs and reaches the operator.",
        ),
        Activity::NoModel => (false, "NoModel", "There is nothing to scale before the model is there."),
    };
    Finding { type_: SCALING_ACTIVE, holds, reason: reason.to_owned(), message: message.to_owned() }
}

/// The transition time is that of the last change of the status.
fn dated(finding: Finding, before: &[Condition], observed: &Observed, now: Timestamp) -> Condition {
    let Finding { type_, holds, reason, message } = finding;
    let status = if holds { "True" } else { "False" };
    let same = before.iter().find(|last| last.type_ == type_ && last.status == status);
    Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason,
        message,
        last_transition_time: same.map_or(Time(now), |last| last.last_transition_time.clone()),
        observed_generation: observed.serving.metadata.generation,
    }
}

fn history(mut history: Vec<Scaling>, decision: &Decision, now: Timestamp) -> Vec<Scaling> {
    let Decision { before, desired, reason, activity: _ } = decision;
    if before != desired {
        history.insert(0, Scaling { time: Time(now), from: *before, to: *desired, reason: reason.clone() });
    }
    history.truncate(SCALING_HISTORY_MAX);
    history
}

#[cfg(test)]
mod tests {
    use super::super::plan::plan;
    use super::super::plan::tests::{at, observed, unschedulable, worker};
    use super::*;
    use crate::config;
    use serde_json::json;
    use std::sync::Arc;

    fn told(seen: &Observed, second: i64) -> VicunaServingStatus {
        let now = Timestamp::from_second(1_000_000 + second).unwrap();
        let plan = plan(seen, at(second as u64));
        status(seen, &plan, &Applied::default(), &config::tests::sample(), now)
    }

    fn found<'a>(status: &'a VicunaServingStatus, type_: &str) -> &'a Condition {
        status.conditions.iter().find(|condition| condition.type_ == type_).unwrap()
    }

    #[test]
    fn users_see_how_many_answer_where_and_under_which_name() {
        let mut seen = observed(json!({ "replicas": 2 }));
        seen.workers = vec![worker("a", "spot", Life::Ready), worker("b", "on-prem", Life::Ready)];
        let status = told(&seen, 0);
        assert_eq!(status.ready_desired.as_deref(), Some("2/2"));
        assert_eq!(status.model.as_deref(), Some("n/s"));
        assert_eq!(status.url.as_deref(), Some("http://vicuna-gateway.vicuna-system.svc:8080/v1"));
        assert_eq!(status.selector.as_deref(), Some("vicuna.dev/serving=s"));
        let replicas = status.replicas.as_ref().unwrap();
        assert_eq!((replicas.spot, replicas.on_prem, replicas.on_demand), (1, 1, 0));
        assert_eq!(found(&status, READY).status, "True");
    }

    #[test]
    fn a_serving_that_waits_for_its_training_says_so_in_both_conditions() {
        let mut seen = observed(json!({ "replicas": 1 }));
        seen.model = Model::Missing { reason: "TrainingNotComplete", message: "Waiting for the training t.".into() };
        seen.revision = None;
        let status = told(&seen, 0);
        for type_ in [READY, MODEL_AVAILABLE] {
            let condition = found(&status, type_);
            assert_eq!((condition.status.as_str(), condition.reason.as_str()), ("False", "TrainingNotComplete"));
            assert!(condition.message.contains("training t"));
        }
    }

    #[test]
    fn trouble_of_a_worker_is_the_reason_why_nothing_is_ready() {
        let mut seen = observed(json!({ "replicas": 1 }));
        seen.workers = vec![unschedulable("a", "spot", at(0))];
        let status = told(&seen, 1);
        assert_eq!(found(&status, READY).reason, "Unschedulable");
        assert_eq!(found(&status, READY).status, "False");
    }

    #[test]
    fn a_model_that_workers_cannot_read_is_not_available_unless_one_of_them_can() {
        let mut seen = observed(json!({ "replicas": 2 }));
        let trouble = Trouble {
            reason: MODEL_UNAVAILABLE,
            message: "there is no object m".to_owned(),
            unschedulable_since: None,
        };
        seen.workers = vec![Worker { trouble: Some(trouble), ..worker("a", "spot", Life::Coming) }];
        let status = told(&seen, 0);
        let available = found(&status, MODEL_AVAILABLE);
        assert_eq!((available.status.as_str(), available.reason.as_str()), ("False", "ModelUnavailable"));
        assert_eq!(available.message, "there is no object m");
        seen.workers.push(worker("b", "spot", Life::Ready));
        assert_eq!(found(&told(&seen, 1), MODEL_AVAILABLE).status, "True");
    }

    #[test]
    fn a_serving_at_zero_says_what_brings_workers() {
        let fixed = told(&observed(json!({ "replicas": 0 })), 0);
        assert!(found(&fixed, READY).message.contains("spec.replicas"));
        let following = observed(json!({ "autoscaling": { "min": 0, "max": 2, "target": { "inFlight": 4 } } }));
        let status = told(&following, 0);
        assert_eq!(found(&status, READY).reason, "ScaledToZero");
        assert!(found(&status, READY).message.contains("next request"));
    }

    #[test]
    fn a_condition_keeps_its_time_until_its_status_changes() {
        let mut seen = observed(json!({ "replicas": 1 }));
        let first = told(&seen, 0);
        Arc::make_mut(&mut seen.serving).status = Some(first.clone());
        seen.workers = vec![unschedulable("a", "spot", at(0))];
        let second = told(&seen, 5);
        assert_eq!(found(&second, READY).last_transition_time, found(&first, READY).last_transition_time);
        seen.workers = vec![worker("a", "spot", Life::Ready)];
        let third = told(&seen, 9);
        assert_ne!(found(&third, READY).last_transition_time, found(&first, READY).last_transition_time);
    }

    #[test]
    fn the_last_five_changes_are_kept_newest_first() {
        let mut seen = observed(json!({ "replicas": 0 }));
        for (index, wanted) in [1, 2, 3, 2, 1, 4, 4].into_iter().enumerate() {
            Arc::make_mut(&mut seen.serving).spec.replicas = Some(wanted);
            let status = told(&seen, index as i64);
            Arc::make_mut(&mut seen.serving).status = Some(status);
        }
        let history = seen.serving.status.clone().unwrap().scaling_history;
        let steps: Vec<_> = history.iter().map(|change| (change.from, change.to)).collect();
        assert_eq!(steps, [(1, 4), (2, 1), (3, 2), (2, 3), (1, 2)]);
        assert_eq!(history[0].reason, "spec.replicas is 4");
    }
}
