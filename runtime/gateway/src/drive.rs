//! Sees one choice through to its end, over as many workers as it takes.

use crate::api::error::ApiError;
use crate::choice::{Choice, Phase, Progress};
use crate::config::Limits;
use crate::workers::Registry;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};

/// Moves from a worker that went away, for one choice.
const MAX_RESUMES: u32 = 32;
/// Workers that may fail at one choice before the request is taken to be the cause.
const MAX_FAILURES: u32 = 4;
/// Before a worker that had no room is asked again.
const OVERLOADED_PAUSE: Duration = Duration::from_millis(250);

/// Returns once the choice has ended, with its worker free for another.
pub async fn drive(registry: Arc<Registry>, choice: Arc<Choice>, limits: Limits) {
    loop {
        let progress = choice.progress();
        match &progress.phase {
            Phase::Ended(_) => return registry.leave(&choice, false),
            Phase::Lost => move_on(&registry, &choice, &progress).await,
            Phase::Queued => wait(&choice, &progress, &limits).await,
            Phase::Running => {
                let deadline = progress.moved + limits.stall_timeout;
                if !changed_before(&choice, deadline).await
                    && let Some(worker) = choice.lose_if_stalled(limits.stall_timeout)
                {
                    tracing::warn!(request = choice.job.id(), worker, "a worker sends nothing");
                    registry.failed(worker);
                }
            }
        }
    }
}

async fn wait(choice: &Choice, progress: &Progress, limits: &Limits) {
    let (timeout, error) = match choice.variant() {
        Some(_) => (limits.resume_timeout, ApiError::not_resumed(choice.job.model(), progress.position)),
        None => (choice.job.patience, ApiError::no_capacity(choice.job.model())),
    };
    if !changed_before(choice, progress.waiting_since + timeout).await {
        choice.expire(error);
    }
}

async fn move_on(registry: &Registry, choice: &Arc<Choice>, progress: &Progress) {
    if progress.failures >= MAX_FAILURES || progress.resumes >= MAX_RESUMES {
        let message = format!("{} attempts failed", progress.failures.max(progress.resumes));
        return choice.fail(ApiError::worker_failed(&message));
    }
    if progress.overloaded {
        sleep(OVERLOADED_PAUSE).await;
    }
    tracing::info!(request = choice.job.id(), choice = choice.index, "looking for another worker");
    registry.readmit(choice);
}

async fn changed_before(choice: &Choice, deadline: Instant) -> bool {
    tokio::select! {
        () = choice.phase_changed() => true,
        () = sleep_until(deadline) => false,
    }
}
