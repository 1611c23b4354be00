//! The less loaded of two (Mitzenmacher 2001): reports of load are up to a second old, and gateways
//! that all know the same would all send to the same worker.

use super::least_loaded::by_load;
use super::{Candidate, Policy, Route};

#[derive(Clone, Copy, Debug, Default)]
pub struct PowerOfTwo;

impl Policy for PowerOfTwo {
    fn name(&self) -> &'static str {
        "power-of-two"
    }

    fn pick(&self, route: &Route, candidates: &[Candidate]) -> Option<u64> {
        let room: Vec<_> = candidates.iter().filter(|candidate| candidate.has_room()).collect();
        let count = room.len() as u64;
        let first = (route.draw >> 32).checked_rem(count)?;
        // Any but the first.
        let other = (route.draw & 0xffff_ffff).checked_rem(count - 1).unwrap_or(0);
        let second = (first + 1 + other) % count;
        let pair = [room[first as usize], room[second as usize]];
        pair.into_iter().min_by(|a, b| by_load(a, b)).map(|candidate| candidate.worker)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::candidate;
    use super::super::{Route, mix};
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn all_but_the_busiest_are_used() {
        let candidates: Vec<_> = (0..4).map(|worker| candidate(worker, worker as u32, 8)).collect();
        let mut picked = HashMap::new();
        for draw in 0..1000 {
            let route = Route { draw: mix(draw), ..Route::default() };
            *picked.entry(PowerOfTwo.pick(&route, &candidates).unwrap()).or_insert(0) += 1;
        }
        assert!(!picked.contains_key(&3), "it is the busier one of every pair");
        assert!(picked[&0] > picked[&1] && picked[&1] > picked[&2] && picked[&2] > 0, "{picked:?}");
    }
}
