//! How often one voter may vote: somebody who votes by a program would outvote all people.

use crate::keys::quota::Quota;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

/// Voters remembered, at most: those who have not voted for a minute are forgotten first.
const MAX_VOTERS: usize = 16_384;

#[derive(Debug)]
pub struct Voters {
    per_minute: u32,
    known: Mutex<HashMap<String, Quota>>,
}

impl Voters {
    pub fn new(per_minute: u32) -> Self {
        Self { per_minute, known: Mutex::default() }
    }

    pub fn per_minute(&self) -> u32 {
        self.per_minute
    }

    /// Takes one vote of a voter, the name of a key or an address; or says after what time there will be one.
    pub fn take(&self, voter: &str, now: Instant) -> Result<(), Duration> {
        let mut known = self.known.lock();
        if known.len() >= MAX_VOTERS && !known.contains_key(voter) {
            known.retain(|_, quota| quota.left(now).is_some_and(|left| left.remaining < left.limit));
            if known.len() >= MAX_VOTERS {
                return Err(Duration::from_secs(60));
            }
        }
        let quota = known.entry(voter.to_owned()).or_insert_with(|| Quota::new(Some(self.per_minute), now));
        quota.take(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_voter_s_haste_is_not_another_s() {
        let (voters, now) = (Voters::new(2), Instant::now());
        assert_eq!([voters.take("a", now), voters.take("a", now)], [Ok(()), Ok(())]);
        assert_eq!(voters.take("a", now), Err(Duration::from_secs(30)));
        assert_eq!(voters.take("b", now), Ok(()));
        assert_eq!(voters.take("a", now + Duration::from_secs(30)), Ok(()));
    }

    #[test]
    fn who_has_rested_makes_room_for_others() {
        let (voters, now) = (Voters::new(1), Instant::now());
        for number in 0..MAX_VOTERS {
            voters.take(&number.to_string(), now).unwrap();
        }
        assert!(voters.take("one more", now).is_err());
        assert_eq!(voters.take("one more", now + Duration::from_secs(60)), Ok(()));
        assert!(voters.known.lock().len() == 1, "all others have rested");
    }
}
