//! What one reconciliation of a serving leaves for the next. It may be lost: replicas then stay up a
//! little longer. The rest is in the API server.

use super::plan::{placement::StockOuts, scale::Window};
use kube::ResourceExt;
use std::time::{Duration, Instant};
use vicuna_crds::{VicunaServing, VicunaServingStatus};

/// Between writes of a status in which only messages differ.
const WRITE_EVERY: Duration = Duration::from_secs(15);
const SLOWEST_RETRY: Duration = Duration::from_secs(60);

/// The part that a plan reads and renews.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Memory {
    pub demand: Window,
    pub stock_outs: StockOuts,
}

/// All that is kept of one serving.
#[derive(Clone, Debug, Default)]
pub struct Remembered {
    uid: Option<String>,
    pub memory: Memory,
    /// The last status: the cache may not show it yet.
    pub status: Option<VicunaServingStatus>,
    written: Option<(VicunaServingStatus, Instant)>,
    failures: u32,
}

impl Remembered {
    /// Nothing is taken over from a namesake.
    pub fn of(serving: &VicunaServing, last: Option<Self>) -> Self {
        let uid = serving.uid();
        match last {
            Some(last) if last.uid == uid => last,
            _ => Self { uid, ..Self::default() },
        }
    }

    /// Whether `status` is to be written now.
    pub fn is_due(&self, status: &VicunaServingStatus, now: Instant) -> bool {
        let Some((written, at)) = &self.written else { return true };
        let quiet = now.duration_since(*at) < WRITE_EVERY;
        written != status && !(quiet && without_messages(written) == without_messages(status))
    }

    pub fn wrote(&mut self, status: VicunaServingStatus, now: Instant) {
        self.written = Some((status, now));
    }

    pub fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// Counts a failure and says when to try again.
    pub fn failed(&mut self) -> Duration {
        let pause = Duration::from_secs(1 << self.failures.min(6)).min(SLOWEST_RETRY);
        self.failures = self.failures.saturating_add(1);
        pause
    }
}

fn without_messages(status: &VicunaServingStatus) -> VicunaServingStatus {
    let mut bare = status.clone();
    for condition in &mut bare.conditions {
        condition.message.clear();
    }
    bare
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serving::plan::tests::observed;
    use serde_json::json;

    #[test]
    fn a_new_message_alone_is_not_written_more_often_than_every_15_seconds() {
        let now = Instant::now();
        let status = |message: &str, ready: &str| -> VicunaServingStatus {
            serde_json::from_value(json!({ "readyDesired": ready, "conditions": [{
                "type": "Ready", "status": "False", "reason": "WorkerNotReady", "message": message,
                "lastTransitionTime": "2026-01-01T00:00:00Z" }] }))
            .unwrap()
        };
        let mut remembered = Remembered::default();
        assert!(remembered.is_due(&status("1 of 9 bytes", "0/1"), now));
        remembered.wrote(status("1 of 9 bytes", "0/1"), now);
        assert!(!remembered.is_due(&status("1 of 9 bytes", "0/1"), now + WRITE_EVERY));
        assert!(!remembered.is_due(&status("2 of 9 bytes", "0/1"), now));
        assert!(remembered.is_due(&status("2 of 9 bytes", "0/1"), now + WRITE_EVERY));
        assert!(remembered.is_due(&status("1 of 9 bytes", "1/1"), now));
    }

    #[test]
    fn failures_are_retried_ever_slower_and_a_success_forgets_them() {
        let mut remembered = Remembered::default();
        let pauses: Vec<_> = (0..8).map(|_| remembered.failed().as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        remembered.succeeded();
        assert_eq!(remembered.failed().as_secs(), 1);
    }

    #[test]
    fn a_namesake_inherits_nothing() {
        let serving = observed(json!({ "replicas": 1 })).serving;
        let old = Remembered { uid: Some("another".into()), failures: 3, ..Remembered::default() };
        assert_eq!(Remembered::of(&serving, Some(old)).failures, 0);
        let own = Remembered { uid: Some("u".into()), failures: 3, ..Remembered::default() };
        assert_eq!(Remembered::of(&serving, Some(own)).failures, 3);
    }
}
