//! The worker that would be least busy with the request.

use super::{Candidate, Policy, Route};

#[derive(Clone, Copy, Debug, Default)]
pub struct LeastLoaded;

impl Policy for LeastLoaded {
    fn name(&self) -> &'static str {
        "least-loaded"
    }

    fn pick(&self, _: &Route, candidates: &[Candidate]) -> Option<u64> {
        let room = candidates.iter().filter(|candidate| candidate.has_room());
        room.min_by(|a, b| by_load(a, b)).map(|candidate| candidate.worker)
    }
}

/// Equally busy ones by their ids, so that the order of the candidates does not matter.
pub fn by_load(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    a.load().total_cmp(&b.load()).then(a.worker.cmp(&b.worker))
}

#[cfg(test)]
mod tests {
    use super::super::tests::candidate;
    use super::*;

    fn pick(candidates: &[Candidate]) -> Option<u64> {
        LeastLoaded.pick(&Route::default(), candidates)
    }

    #[test]
    fn the_smallest_share_wins_not_the_smallest_count() {
        assert_eq!(pick(&[candidate(1, 1, 2), candidate(2, 3, 8)]), Some(2));
    }

    #[test]
    fn load_from_other_gateways_counts() {
        let others = Candidate { assigned: 0, ..candidate(1, 5, 8) };
        assert_eq!(pick(&[others, candidate(2, 1, 8)]), Some(2));
    }

    #[test]
    fn a_worker_whose_slots_are_all_taken_from_here_gets_nothing() {
        assert_eq!(pick(&[candidate(1, 4, 4)]), None);
        assert_eq!(pick(&[]), None);
    }

    #[test]
    fn a_fast_worker_may_be_busier_and_one_without_memory_is_last() {
        let slow = Candidate { speed: 0.25, ..candidate(1, 0, 8) };
        assert_eq!(pick(&[slow, candidate(2, 2, 8)]), Some(2));
        assert_eq!(pick(&[slow, candidate(2, 5, 8)]), Some(1));
        let full = Candidate { kv_used: 0.95, ..candidate(1, 0, 8) };
        assert_eq!(pick(&[full, candidate(2, 5, 8)]), Some(2));
    }
}
