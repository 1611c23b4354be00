//! Between what the API writes and what is reckoned with: milliseconds.

use crate::coordinator::membership::Millis;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use std::time::Duration;
use vicuna_crds::Period;

/// Unix time; `None` before 1970.
pub fn unix_ms(time: &Time) -> Option<Millis> {
    u64::try_from(time.0.as_millisecond()).ok()
}

pub fn millis(duration: Duration) -> Millis {
    u64::try_from(duration.as_millis()).unwrap_or(Millis::MAX)
}

pub fn period(ms: Millis) -> Period {
    Period::from(Duration::from_millis(ms))
}
