//! How long a worker may finish what it runs once it is let go.
//!
//! A worker does not know how long its node stays: it hands back what still runs when its own time is over.
//! So that time, which it is given at its start, fits into the notice of its pool, and on a notice it is let
//! go while there is that much left.

use std::time::Duration;
use vicuna_crds::{Capacity, Pool, VicunaServing};

/// For the last messages, and a step that takes long, before the worker is killed.
pub const GRACE_MARGIN: Duration = Duration::from_secs(10);
/// What of that the deadline of a node leaves at least.
const LAST_MARGIN: Duration = Duration::from_secs(5);
/// Most of a notice is for the worker's replacement to come.
const SHARE_OF_NOTICE: u32 = 3;

/// What the serving says, as far as nodes of this pool stay for so long after a notice.
pub fn timeout(serving: &VicunaServing, pool: &Pool) -> Duration {
    let wanted = serving.spec.drain.timeout.get();
    match pool.capacity == Capacity::Spot || pool.notice.is_some() {
        true => wanted.min(pool.notice() / SHARE_OF_NOTICE),
        false => wanted,
    }
}

/// How long before its node goes a worker with this drain is let go at the latest.
pub fn last_moment(timeout: Duration) -> Duration {
    (timeout + LAST_MARGIN).max(GRACE_MARGIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serving::plan::tests::observed;
    use serde_json::json;

    #[test]
    fn a_drain_fits_into_the_notice_of_its_pool() {
        let of = |notice: &str| {
            let spot = json!({ "name": "spot", "capacity": "Spot", "notice": notice });
            let pools = json!([spot, { "name": "owned", "capacity": "OnPrem" }]);
            let seen = observed(json!({ "replicas": 1, "drain": { "timeout": "60s" }, "pools": pools }));
            let pools = &seen.serving.spec.pools;
            [timeout(&seen.serving, &pools[0]), timeout(&seen.serving, &pools[1])].map(|time| time.as_secs())
        };
        assert_eq!(of("30s"), [10, 60]);
        assert_eq!(of("120s"), [40, 60]);
        assert_eq!(of("600s"), [60, 60]);
    }
}
