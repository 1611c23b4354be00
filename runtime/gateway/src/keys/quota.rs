//! So much a minute: a bucket that fills evenly and holds one minute's worth.

use parking_lot::Mutex;
use std::time::Duration;
use tokio::time::Instant;

#[derive(Debug)]
pub struct Quota {
    /// None: no bound.
    per_minute: Option<f64>,
    bucket: Mutex<Bucket>,
}

/// How a quota stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    /// A minute.
    pub limit: u32,
    pub remaining: u32,
    /// Until all of it is there again.
    pub reset: Duration,
}

#[derive(Debug)]
struct Bucket {
    /// Below zero: used in advance.
    left: f64,
    filled: Instant,
}

impl Quota {
    pub fn new(per_minute: Option<u32>, now: Instant) -> Self {
        let per_minute = per_minute.map(f64::from);
        Self { per_minute, bucket: Mutex::new(Bucket { left: per_minute.unwrap_or_default(), filled: now }) }
    }

    /// Takes one, or says after what time there will be one.
    pub fn take(&self, now: Instant) -> Result<(), Duration> {
        self.at_least(1.0, 1.0, now)
    }

    /// Sets aside what may be used, at most a minute's worth, and tells how much that is; or says after what time
    /// there will be enough. Of nothing there must be something, too.
    pub fn reserve(&self, wanted: u32, now: Instant) -> Result<u32, Duration> {
        let amount = self.per_minute.map_or(0.0, |per_minute| f64::from(wanted).min(per_minute));
        self.at_least(amount.max(1.0), amount, now).map(|()| amount as u32)
    }

    /// What was set aside is not any more.
    pub fn give_back(&self, reserved: u32, now: Instant) {
        if let Some(per_minute) = self.per_minute {
            let mut bucket = self.filled(per_minute, now);
            bucket.left = (bucket.left + f64::from(reserved)).min(per_minute);
        }
    }

    /// Takes what has been used, which may be more than is left.
    pub fn charge(&self, used: u32, now: Instant) {
        if let Some(per_minute) = self.per_minute {
            self.filled(per_minute, now).left -= f64::from(used);
        }
    }

    /// What is left; `None`: there is no bound.
    pub fn left(&self, now: Instant) -> Option<Left> {
        let per_minute = self.per_minute?;
        let left = self.filled(per_minute, now).left;
        let minutes = (per_minute - left) / per_minute;
        let reset = Duration::try_from_secs_f64(minutes * 60.0).unwrap_or_default();
        Some(Left { limit: per_minute as u32, remaining: left.max(0.0) as u32, reset })
    }

    fn at_least(&self, needed: f64, taken: f64, now: Instant) -> Result<(), Duration> {
        let Some(per_minute) = self.per_minute else {
            return Ok(());
        };
        let mut bucket = self.filled(per_minute, now);
        if bucket.left >= needed {
            bucket.left -= taken;
            return Ok(());
        }
        let minutes = (needed - bucket.left) / per_minute;
        // A quota of nothing is not worth waiting for.
        Err(Duration::try_from_secs_f64(minutes * 60.0).unwrap_or(Duration::from_secs(86_400)))
    }

    fn filled(&self, per_minute: f64, now: Instant) -> parking_lot::MutexGuard<'_, Bucket> {
        let mut bucket = self.bucket.lock();
        let minutes = now.saturating_duration_since(bucket.filled).as_secs_f64() / 60.0;
        bucket.left = (bucket.left + minutes * per_minute).min(per_minute);
        bucket.filled = bucket.filled.max(now);
        bucket
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minute_s_worth_can_be_used_at_once_and_fills_again_evenly() {
        let start = Instant::now();
        let quota = Quota::new(Some(6), start);
        for _ in 0..6 {
            assert_eq!(quota.take(start), Ok(()));
        }
        assert_eq!(quota.take(start), Err(Duration::from_secs(10)));
        assert_eq!(quota.take(start + Duration::from_secs(10)), Ok(()));
        assert!(quota.take(start + Duration::from_secs(11)).is_err());
    }

    #[test]
    fn what_was_used_in_advance_has_to_come_back_first() {
        let start = Instant::now();
        let quota = Quota::new(Some(60), start);
        quota.charge(89, start);
        assert_eq!(quota.reserve(0, start), Err(Duration::from_secs(30)));
        assert_eq!(quota.reserve(0, start + Duration::from_secs(30)), Ok(0));
        assert_eq!(quota.reserve(0, start + Duration::from_secs(30)), Ok(0), "nothing was set aside");
    }

    #[test]
    fn what_is_set_aside_is_nobody_else_s_until_it_is_given_back() {
        let start = Instant::now();
        let quota = Quota::new(Some(60), start);
        assert_eq!(quota.reserve(50, start), Ok(50));
        assert_eq!(quota.reserve(20, start), Err(Duration::from_secs(10)));
        quota.charge(5, start);
        quota.give_back(50, start);
        assert_eq!(quota.left(start).unwrap().remaining, 55);
        assert_eq!(
            quota.reserve(1000, start),
            Err(Duration::from_secs(5)),
            "more than a minute's worth waits for all of it"
        );
        assert_eq!(quota.reserve(1000, start + Duration::from_secs(5)), Ok(60));
        assert_eq!(Quota::new(None, start).reserve(1000, start), Ok(0));
    }

    #[test]
    fn what_is_left_and_when_all_is_there_again_can_be_told() {
        let start = Instant::now();
        let quota = Quota::new(Some(60), start);
        quota.charge(45, start);
        let left = |after| quota.left(start + Duration::from_secs(after)).unwrap();
        assert_eq!(left(0), Left { limit: 60, remaining: 15, reset: Duration::from_secs(45) });
        assert_eq!(left(50), Left { limit: 60, remaining: 60, reset: Duration::ZERO });
        quota.charge(90, start + Duration::from_secs(50));
        assert_eq!(left(50), Left { limit: 60, remaining: 0, reset: Duration::from_secs(90) });
        assert_eq!(Quota::new(None, start).left(start), None);
    }

    #[test]
    fn no_quota_never_ends_and_a_quota_of_nothing_never_begins() {
        let start = Instant::now();
        let free = Quota::new(None, start);
        free.charge(u32::MAX, start);
        assert_eq!(free.take(start), Ok(()));
        assert!(Quota::new(Some(0), start).take(start).is_err());
    }
}
