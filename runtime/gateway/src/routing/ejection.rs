//! Workers that fail again and again get nothing for a while (outlier ejection): longer each time, and
//! never so many that too few are left.

use std::time::Duration;
use tokio::time::Instant;

/// Failures in a row after which a worker is left out.
const FAILURES: u32 = 3;
const FIRST: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(300);

/// How a worker has done of late.
#[derive(Clone, Copy, Debug, Default)]
pub struct Health {
    failures_in_a_row: u32,
    ejections: u32,
    until: Option<Instant>,
}

impl Health {
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// Tells whether the worker is left out from now on.
    pub fn failed(&mut self, now: Instant) -> bool {
        self.failures_in_a_row += 1;
        // One that fails right after its time is over is left out again at once.
        let ejected = self.failures_in_a_row >= FAILURES && !self.is_ejected(now);
        if ejected {
            let time = FIRST * 2u32.saturating_pow(self.ejections.min(8));
            self.ejections += 1;
            self.until = Some(now + time.min(LONGEST));
        }
        ejected
    }

    pub fn is_ejected(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

/// Leaves ejected workers out of `candidates`, if at least half of them stay; `ejected` tells which.
pub fn without_ejected<T>(candidates: &mut Vec<T>, ejected: impl Fn(&T) -> bool) {
    let healthy = candidates.iter().filter(|candidate| !ejected(candidate)).count();
    if healthy > 0 && 2 * healthy >= candidates.len() {
        candidates.retain(|candidate| !ejected(candidate));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_worker_is_left_out_longer_each_time_until_it_succeeds() {
        let start = Instant::now();
        let mut health = Health::default();
        assert!(!health.failed(start) && !health.failed(start) && health.failed(start));
        let later = start + FIRST;
        assert!(health.is_ejected(later - Duration::from_millis(1)) && !health.is_ejected(later));
        assert!(health.failed(later), "at once");
        assert!(health.is_ejected(later + FIRST) && !health.is_ejected(later + 2 * FIRST));
        health.succeeded();
        assert!(!health.failed(later));
    }

    #[test]
    fn it_is_never_left_out_for_longer_than_five_minutes() {
        let mut now = Instant::now();
        let mut health = Health::default();
        for _ in 0..50 {
            health.failed(now);
            now += LONGEST;
            assert!(!health.is_ejected(now));
        }
    }

    #[test]
    fn half_of_the_workers_stay_whatever_happens() {
        let left = |ejected: &[u32]| {
            let mut candidates = vec![0, 1, 2, 3];
            without_ejected(&mut candidates, |candidate| ejected.contains(candidate));
            candidates
        };
        assert_eq!(left(&[1]), [0, 2, 3]);
        assert_eq!(left(&[1, 2]), [0, 3]);
        assert_eq!(left(&[1, 2, 3]), [0, 1, 2, 3]);
        assert_eq!(left(&[0, 1, 2, 3]), [0, 1, 2, 3]);
    }
}
