//! Sees one choice through to its end, over as many workers as it takes.

use crate::api::error::ApiError;
use crate::choice::{Choice, Phase, Progress};
use crate::config::Limits;
use crate::workers::Seat;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};

/// Moves from a worker that went away, for one choice.
const MAX_RESUMES: u32 = 32;
/// Workers that may fail at one choice before the request is taken to be the cause.
const MAX_FAILURES: u32 = 4;
/// Before a worker that had no room is asked again.
const OVERLOADED_PAUSE: Duration = Duration::from_millis(250);

/// Returns once the choice has ended. Dropping the future gives it up: the worker is told.
pub async fn drive(seat: Seat, limits: &Limits) {
    let choice = seat.choice.clone();
    loop {
        let progress = choice.progress();
        match &progress.phase {
            Phase::Ended(_) => return,
            Phase::Lost => move_on(&seat, &progress).await,
            Phase::Queued => {
                let timeout = match choice.variant() {
                    Some(_) => limits.resume_timeout,
                    None => limits.queue_timeout,
                };
                let deadline = progress.waiting_since + timeout;
                if !changed_before(&choice, deadline).await {
                    choice.fail(ApiError::no_capacity(&choice.job.model));
                }
            }
            Phase::Running => {
                let deadline = progress.moved + limits.stall_timeout;
                if !changed_before(&choice, deadline).await {
                    choice.lose_if_stalled(limits.stall_timeout);
                }
            }
        }
    }
}

async fn move_on(seat: &Seat, progress: &Progress) {
    let choice = &seat.choice;
    if progress.failures >= MAX_FAILURES || progress.resumes >= MAX_RESUMES {
        let message = format!("{} attempts failed", progress.failures.max(progress.resumes));
        return choice.fail(ApiError::worker_failed(&message));
    }
    if progress.overloaded {
        sleep(OVERLOADED_PAUSE).await;
    }
    tracing::info!(request = choice.job.id, choice = choice.index, "looking for another worker");
    seat.readmit();
}

async fn changed_before(choice: &Choice, deadline: Instant) -> bool {
    tokio::select! {
        () = choice.phase_changed() => true,
        () = sleep_until(deadline) => false,
    }
}
