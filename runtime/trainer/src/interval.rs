//! How often a checkpoint is worth its stall.

use std::time::Duration;

const SHORTEST: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(1800);
/// Until the first checkpoint has shown what one costs.
const FIRST: Duration = Duration::from_secs(60);

/// The time from one checkpoint to the next at which stalls and steps made again cost least together (J. W. Young, 1974).
pub fn best(stall: Option<Duration>, between_interruptions: Duration) -> Duration {
    let Some(stall) = stall else { return FIRST };
    let seconds = (2.0 * stall.as_secs_f64() * between_interruptions.as_secs_f64()).sqrt();
    Duration::from_secs_f64(seconds).clamp(SHORTEST, LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_of_half_a_second_every_hour_is_worth_a_checkpoint_a_minute() {
        let hour = Duration::from_secs(3600);
        assert_eq!(best(Some(Duration::from_millis(500)), hour), Duration::from_secs(60));
        assert_eq!(best(None, hour), FIRST);
        assert_eq!(best(Some(Duration::ZERO), hour), SHORTEST);
        assert_eq!(best(Some(Duration::from_secs(60)), 24 * hour), LONGEST);
    }
}
