//! Pauses between two attempts to reach a gateway: longer as long as none succeeds, and never the same for all, so that a
//! gateway that comes back is not dialled by everybody at once.

use rand::Rng;
use std::time::Duration;

const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(5);

/// Of one peer that is dialled again and again.
#[derive(Debug)]
pub struct Pauses {
    next: Duration,
}

impl Default for Pauses {
    fn default() -> Self {
        Self { next: FIRST }
    }
}

impl Pauses {
    /// How long to wait after a connection, or an attempt at one, that `lasted` so long.
    pub fn after(&mut self, lasted: Duration) -> Duration {
        self.next = if lasted > LONGEST { FIRST } else { (self.next * 2).min(LONGEST) };
        self.next.mul_f64(rand::rng().random_range(0.5..1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_until_a_connection_has_held() {
        let mut pauses = Pauses::default();
        let mut after = |lasted| pauses.after(Duration::from_secs(lasted)).as_secs_f64();
        for longest in [0.4, 0.8, 1.6, 3.2, 5.0, 5.0] {
            let pause = after(0);
            assert!(pause >= longest / 2.0 && pause < longest, "{pause} of {longest}");
        }
        assert!(after(6) < 0.2);
        assert!(after(1) < 0.4);
    }
}
