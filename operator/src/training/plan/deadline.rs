//! Trainings that take too long, and trainings that ended long ago.

use super::{Action, Plan};
use crate::coordinator::membership::Millis;
use crate::training::observe::Observed;
use crate::training::time::{millis, unix_ms};
use std::time::Duration;
use vicuna_crds::training::condition;

/// Gives the training up when it has been active for longer than `activeDeadline`.
pub fn watch(observed: &Observed, now: Millis, plan: &mut Plan) {
    let spec = &observed.training.spec;
    let Some(allowed) = spec.active_deadline.filter(|_| !spec.suspend) else { return };
    let Some(since) = active_since_ms(observed) else { return };
    let due = since.saturating_add(millis(allowed.get()));
    if now < due {
        plan.look_again = plan.look_again.min(Duration::from_millis(due - now));
    } else if plan.memory.verdict.is_none() {
        let message = format!(
            "The training was active for longer than activeDeadline, {allowed}. Its checkpoints stay in its bucket."
        );
        plan.memory.verdict = Some(("DeadlineExceeded".to_owned(), message));
    }
}

/// The first pod, or when the training was last resumed.
fn active_since_ms(observed: &Observed) -> Option<Millis> {
    let status = observed.training.status.as_ref()?;
    let started = status.start_time.as_ref().and_then(unix_ms)?;
    let suspended = status.conditions.iter().find(|it| it.type_ == condition::SUSPENDED && it.status == "False");
    let resumed = suspended.and_then(|condition| unix_ms(&condition.last_transition_time));
    Some(started.max(resumed.unwrap_or(0)))
}

/// Deletes the training `ttlAfterFinished` after its end, once its pods are gone.
pub fn expire(observed: &Observed, now: Millis, plan: &mut Plan) {
    let Some(kept) = observed.training.spec.ttl_after_finished else { return };
    let status = observed.training.status.as_ref();
    let Some(ended) = status.and_then(|status| status.completion_time.as_ref()).and_then(unix_ms) else { return };
    let due = ended.saturating_add(millis(kept.get()));
    if now < due {
        plan.look_again = plan.look_again.min(Duration::from_millis(due - now));
    } else if observed.pods.is_empty() {
        plan.actions.push(Action::DeleteTraining);
        plan.reason = "ttlAfterFinished has passed".to_owned();
    }
}

#[cfg(test)]
mod tests {
    use crate::training::observe::Observed;
    use crate::training::plan::{Action, plan};
    use crate::training::tests::{NOW, deleted, observed};
    use serde_json::{Value, json};
    use vicuna_crds::training::VicunaTraining;

    fn with(spec: fn(&mut VicunaTraining), status: Value) -> Observed {
        observed().spec(|training| {
            spec(training);
            training.status = serde_json::from_value(status).unwrap();
        })
    }

    fn condition(kind: &str, status: &str, time: &str) -> Value {
        json!({"type": kind, "status": status, "reason": "R", "message": "m", "lastTransitionTime": time})
    }

    /// `NOW` is 02:46:40 on the first day.
    fn active(suspended: &str) -> Observed {
        let status = json!({
            "startTime": "1970-01-01T00:46:40Z",
            "conditions": [condition("Suspended", "False", suspended)],
        });
        with(|training| training.spec.active_deadline = Some("2h".parse().unwrap()), status).pod("t-spot-0", |_| {})
    }

    #[test]
    fn a_training_that_is_active_for_too_long_is_given_up() {
        let seen = active("1970-01-01T00:00:00Z");
        let before = plan(&seen, NOW - 1_000);
        assert_eq!((before.memory.verdict, before.look_again.as_secs()), (None, 1));
        let after = plan(&seen, NOW);
        assert_eq!(after.memory.verdict.as_ref().unwrap().0, "DeadlineExceeded");
        assert_eq!(deleted(&after), ["t-spot-0"]);
    }

    #[test]
    fn time_in_which_it_is_suspended_does_not_count() {
        assert_eq!(plan(&active("1970-01-01T02:00:00Z"), NOW).memory.verdict, None, "resumed lately");
        let suspended = active("1970-01-01T00:00:00Z").spec(|training| training.spec.suspend = true);
        assert_eq!(plan(&suspended, NOW).memory.verdict, None);
    }

    #[test]
    fn a_finished_training_is_deleted_after_its_time_and_after_its_pods() {
        let status = json!({
            "completionTime": "1970-01-01T01:46:40Z",
            "conditions": [condition("Finished", "True", "1970-01-01T01:46:40Z")],
        });
        let finished = || {
            let status = status.clone();
            with(|training| training.spec.ttl_after_finished = Some("1h".parse().unwrap()), status)
        };
        let expires = |seen: &Observed, now| plan(seen, now).actions.contains(&Action::DeleteTraining);
        assert!(expires(&finished(), NOW) && !expires(&finished(), NOW - 1));
        assert!(!expires(&finished().pod("t-spot-0", |_| {}), NOW));
        let kept = finished().spec(|training| training.spec.ttl_after_finished = None);
        assert!(!expires(&kept, NOW + 86_400_000));
    }
}
