//! How long steps take, and how soon one is missed.

use super::{Membership, Millis};
use std::collections::VecDeque;

/// Steps that are remembered.
const RECENT: usize = 32;
/// Fewer than these say little of the next one.
const ENOUGH: usize = 5;
/// Patience is doubled so often at most.
pub(super) const MAX_DOUBLINGS: u32 = 6;

/// Times from one step's report to the next, of steps between which ranks did nothing else.
#[derive(Clone, Debug, Default)]
pub(super) struct Pace(VecDeque<Millis>);

impl Pace {
    pub fn took(&mut self, ms: Millis) {
        if self.0.len() == RECENT {
            self.0.pop_front();
        }
        self.0.push_back(ms);
    }

    /// What nine of ten steps did not exceed: a single one that was held up says nothing of the next.
    pub fn usual(&self) -> Option<Millis> {
        let mut sorted: Vec<Millis> = self.0.iter().copied().collect();
        sorted.sort_unstable();
        (sorted.len() >= ENOUGH).then(|| sorted[(9 * sorted.len()).div_ceil(10) - 1])
    }

    /// Fewer ranks share the same work. That more are faster is believed when it is seen.
    pub fn slow_down(&mut self, before: u64, after: u64) {
        for ms in &mut self.0 {
            *ms = ms.saturating_mul(before.max(after)) / after.max(1);
        }
    }
}

impl Membership {
    /// A step was reported now.
    pub(super) fn measure_pace(&mut self, now: Millis, step_is_next: bool) {
        if self.step_is_next {
            self.pace.took(now.saturating_sub(self.last_step_at));
        }
        self.step_is_next = step_is_next;
    }

    /// After so long without a step one of the ranks is taken to hang. What is no step, such as the copy of a checkpoint,
    /// may take any time, and so may the first step of a generation. A step that took longer than usual, as the first ones
    /// on slower ranks do, says that the next one may, too.
    pub(super) fn step_patience(&self, step_ms: Millis) -> Millis {
        let generous = self.limits.stall_ms.max(5 * step_ms);
        let usual = self.pace.usual().filter(|_| self.step_is_next);
        usual.map_or(generous, |usual| {
            let usual = usual.max(step_ms);
            let soon = (usual + usual / 2 + self.limits.slack_ms).max(self.limits.missed_ms);
            (soon << self.false_alarms).min(generous)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_step_that_was_held_up_does_not_change_what_is_usual() {
        let mut pace = Pace::default();
        for _ in 0..4 {
            pace.took(1_000);
        }
        assert_eq!(pace.usual(), None, "too few");
        for ms in [1_200, 60_000, 1_000, 1_000, 1_000, 1_000] {
            pace.took(ms);
        }
        assert_eq!(pace.usual(), Some(1_200));
        for _ in 0..RECENT {
            pace.took(5_000);
        }
        assert_eq!((pace.usual(), pace.0.len()), (Some(5_000), RECENT));
    }

    #[test]
    fn fewer_ranks_are_given_more_time_and_more_ranks_not_less() {
        let mut pace = Pace::default();
        (0..ENOUGH).for_each(|_| pace.took(900));
        pace.slow_down(3, 2);
        assert_eq!(pace.usual(), Some(1_350));
        pace.slow_down(2, 4);
        assert_eq!(pace.usual(), Some(1_350));
    }
}
