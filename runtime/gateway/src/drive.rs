//! Sees one choice through to its end, over as many workers as it takes.

use crate::api::error::ApiError;
use crate::choice::{Choice, Phase, Progress};
use crate::config::Limits;
use crate::workers::Registry;
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

/// Moves from a worker that went away, for one choice.
const MAX_RESUMES: u32 = 32;
/// Workers that may fail at one choice before the request is taken to be the cause.
const MAX_FAILURES: u32 = 4;
/// Workers in a row that may be lost at one choice before they have sent a token of it. What kills every
/// worker must not get to all of them.
const MAX_FRUITLESS: u32 = 4;
/// Before a worker that had no room is asked again.
const OVERLOADED_PAUSE: Duration = Duration::from_millis(250);

/// Those of one request. They advance as long as they are polled, which is the task's that answers the client: a task for
/// each would cost more than what they do.
#[derive(Default)]
pub struct Drivers(FuturesUnordered<BoxFuture<'static, ()>>);

impl Drivers {
    pub fn add(&mut self, registry: &Arc<Registry>, choice: &Arc<Choice>, limits: &Limits) {
        self.0.push(drive(registry.clone(), choice.clone(), limits.clone()).boxed());
    }

    /// Does not end, since who runs it looks at the choices themselves.
    pub async fn run(&mut self) -> Infallible {
        while self.0.next().await.is_some() {}
        pending().await
    }
}

/// Returns once the choice has ended, with its worker free for another.
pub async fn drive(registry: Arc<Registry>, choice: Arc<Choice>, limits: Limits) {
    loop {
        let progress = choice.progress();
        match &progress.phase {
            Phase::Ended(_) => return registry.leave(&choice, false),
            Phase::Lost => move_on(&registry, &choice, &progress, &limits).await,
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
    let (deadline, error) = deadline(choice, progress, limits);
    if !changed_before(choice, deadline).await {
        choice.expire(error);
    }
}

/// Until when it may be without a worker, and what its client is told then.
fn deadline(choice: &Choice, progress: &Progress, limits: &Limits) -> (Instant, ApiError) {
    let model = choice.job.model();
    let (patience, error) = match choice.variant() {
        Some(_) => (limits.resume_timeout, ApiError::not_resumed(model, progress.position)),
        None => (choice.job.patience, ApiError::no_capacity(model)),
    };
    (progress.waiting_since + patience, error)
}

async fn move_on(registry: &Registry, choice: &Arc<Choice>, progress: &Progress, limits: &Limits) {
    if let Some(error) = given_up(progress) {
        return choice.fail(error);
    }
    if progress.overloaded {
        let (deadline, error) = deadline(choice, progress, limits);
        // A worker that refuses at once leaves no time in the queue in which this would be noticed.
        if timeout_at(deadline, sleep(OVERLOADED_PAUSE)).await.is_err() {
            return choice.fail(error);
        }
    }
    tracing::info!(request = choice.job.id(), choice = choice.index, "looking for another worker");
    registry.readmit(choice);
}

/// Why no other worker gets it.
fn given_up(progress: &Progress) -> Option<ApiError> {
    if progress.fruitless >= MAX_FRUITLESS {
        let message = format!(
            "{} workers in a row were lost before they had sent a token; the request itself may be the cause",
            progress.fruitless
        );
        return Some(ApiError::worker_failed(&message));
    }
    let attempts = progress.failures.max(progress.resumes);
    let too_many = progress.failures >= MAX_FAILURES || progress.resumes >= MAX_RESUMES;
    too_many.then(|| ApiError::worker_failed(&format!("{attempts} attempts failed")))
}

async fn changed_before(choice: &Choice, deadline: Instant) -> bool {
    tokio::select! {
        biased;
        () = choice.phase_changed() => true,
        () = sleep_until(deadline) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choice::tests::{delta, server};
    use crate::choice::{Choice, Job, Loss, Outcome, Work};
    use crate::config::Config;
    use crate::workers::Seat;
    use crate::workers::registry::tests::{attach, hello, registry};
    use clap::Parser;
    use vicuna_protocol::inference::Generate;

    fn limits() -> Limits {
        Config::parse_from(["gateway", "--tls-cert", "c", "--tls-key", "k"]).limits
    }

    /// A choice that is driven, with nobody to take it yet.
    fn driven(registry: &Arc<Registry>) -> (Arc<Choice>, Vec<Seat>) {
        let generate = Generate { request: "r".into(), model: "ns/m".into(), ..Generate::default() };
        let job = Job { generate, patience: Duration::from_secs(60), ..Job::default() };
        let choice = Arc::new(Choice::new(Arc::new(job), 0, Arc::default()));
        let seats = registry.admit(vec![choice.clone()], 8).unwrap();
        tokio::spawn(drive(registry.clone(), choice.clone(), limits()));
        (choice, seats)
    }

    fn error(choice: &Choice) -> Option<ApiError> {
        match choice.progress().phase {
            Phase::Ended(Outcome::Failed(error)) => Some(error),
            _ => None,
        }
    }

    /// Everything that can happen now has happened.
    async fn settle() {
        sleep(Duration::from_millis(1)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_is_handed_back_after_long_waits_as_long_as_one_whose_worker_died() {
        let registry = registry();
        let (worker, _sent) = attach(&registry, hello("w-1", "1"));
        let (choice, _seats) = driven(&registry);
        for position in 0..6 {
            choice.append(worker.id, delta(position, &[1], "a")).unwrap();
            sleep(Duration::from_secs(100)).await;
        }
        worker.drain();
        choice.lose(worker.id, Loss::Overloaded);
        settle().await;
        assert!(choice.is_queued(), "at once: {:?}", choice.progress());
        sleep(Duration::from_secs(110)).await;
        assert!(choice.is_queued(), "{:?}", choice.progress());
        let (_other, _sent) = attach(&registry, hello("w-2", "2"));
        assert_eq!(choice.progress().phase, Phase::Running);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_kills_its_workers_does_not_get_to_all_of_them() {
        let registry = registry();
        let (choice, _seats) = driven(&registry);
        for number in 1..=MAX_FRUITLESS {
            let (worker, _sent) = attach(&registry, hello(&format!("w-{number}"), &number.to_string()));
            assert_eq!(choice.last_worker(), Some(worker.id));
            registry.detach(worker.id);
            settle().await;
        }
        let error = error(&choice).unwrap();
        assert_eq!((error.status.as_u16(), error.code), (502, "worker_failed"));
        assert!(error.message.contains("4 workers in a row"), "{}", error.message);
    }

    #[tokio::test(start_paused = true)]
    async fn workers_without_room_are_not_asked_for_longer_than_a_request_may_wait() {
        let registry = registry();
        let (worker, mut sent) = attach(&registry, hello("w-1", "1"));
        let (choice, _seats) = driven(&registry);
        let started = Instant::now();
        while error(&choice).is_none() {
            while sent.try_recv().is_ok() {}
            choice.lose(worker.id, Loss::Overloaded);
            sleep(Duration::from_millis(100)).await;
            assert!(started.elapsed() < Duration::from_secs(62), "{:?}", choice.progress());
        }
        assert_eq!(error(&choice).unwrap().code, "no_capacity");
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_prompt_is_read_to_its_end_and_a_worker_that_says_nothing_is_left() {
        let registry = registry();
        let (worker, _sent) = attach(&registry, hello("w-1", "1"));
        let (choice, _seats) = driven(&registry);
        for computed in 1..=10 {
            choice.works(worker.id, Work::Reading { computed, all: 11 });
            sleep(Duration::from_secs(100)).await;
            assert_eq!(choice.last_worker(), Some(worker.id));
            assert_eq!(choice.progress().failures, 0);
        }
        sleep(Duration::from_secs(30)).await;
        assert_eq!(choice.progress().failures, 1);
    }

    #[test]
    fn a_worker_that_was_at_it_had_room() {
        let handed_back = |work| {
            let choice = Choice::new(Arc::default(), 0, Arc::default());
            choice.begin(server(1));
            choice.works(1, work);
            choice.lose(1, Loss::Overloaded);
            !choice.progress().overloaded
        };
        assert!(handed_back(Work::Reading { computed: 1, all: 2 }));
        assert!(!handed_back(Work::None));
    }
}
