//! The worker with the smallest share of its slots in use.

use super::{Candidate, Policy};

/// Sends no more to a worker than it can run, so that what waits does so here, in order, and can
/// still go to any worker.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeastLoaded;

impl Policy for LeastLoaded {
    fn pick(&self, candidates: &[Candidate]) -> Option<u64> {
        candidates
            .iter()
            .filter(|candidate| candidate.assigned < candidate.slots)
            .min_by(|a, b| {
                // used(a)/slots(a) against used(b)/slots(b), without division.
                let left = used(a) * u64::from(b.slots);
                let right = used(b) * u64::from(a.slots);
                left.cmp(&right).then(a.worker.cmp(&b.worker))
            })
            .map(|candidate| candidate.worker)
    }
}

/// Reports are up to a second old, so what was sent from here since then counts too.
fn used(candidate: &Candidate) -> u64 {
    u64::from(candidate.assigned.max(candidate.reported))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(worker: u64, assigned: u32, reported: u32, slots: u32) -> Candidate {
        Candidate { worker, assigned, reported, slots }
    }

    #[test]
    fn the_smallest_share_wins_not_the_smallest_count() {
        let candidates = [candidate(1, 1, 1, 2), candidate(2, 3, 3, 8)];
        assert_eq!(LeastLoaded.pick(&candidates), Some(2));
    }

    #[test]
    fn load_from_other_gateways_counts() {
        let candidates = [candidate(1, 0, 5, 8), candidate(2, 1, 1, 8)];
        assert_eq!(LeastLoaded.pick(&candidates), Some(2));
    }

    #[test]
    fn a_worker_whose_slots_are_all_taken_from_here_gets_nothing() {
        assert_eq!(LeastLoaded.pick(&[candidate(1, 4, 0, 4)]), None);
        assert_eq!(LeastLoaded.pick(&[]), None);
    }
}
