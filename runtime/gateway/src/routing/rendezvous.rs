//! Rendezvous hashing (Thaler and Ravishankar 1998) with bounded load (Mirrokni, Thorup and
//! Zadimoghaddam 2018): a key has an order of workers that is the same at every gateway and changes
//! little when workers come and go; it goes to the first that is not much busier than the average.

use super::least_loaded::by_load;
use super::{Candidate, mix};

/// How much busier than the average a worker may be.
const BOUND: f64 = 1.25;
/// A worker no busier than this is not busy, whatever the others are.
const FREE: f64 = 0.5;

pub fn pick(key: u64, candidates: &[Candidate]) -> Option<u64> {
    let bound = bound(candidates).max(FREE);
    let mut room: Vec<_> = candidates.iter().filter(|candidate| candidate.has_room()).collect();
    room.sort_unstable_by_key(|candidate| rank(key, candidate));
    let first = room.iter().find(|candidate| share(candidate) <= bound || candidate.used == 0);
    let picked = first.or_else(|| room.iter().min_by(|a, b| by_load(a, b)));
    picked.map(|candidate| candidate.worker)
}

/// Lower ones come first in the key's order.
fn rank(key: u64, candidate: &Candidate) -> (std::cmp::Reverse<u64>, u64) {
    (std::cmp::Reverse(mix(key ^ candidate.name_hash)), candidate.worker)
}

/// The first in the key's order, however busy.
pub fn first(key: u64, candidates: &[Candidate]) -> Option<u64> {
    candidates.iter().min_by_key(|candidate| rank(key, candidate)).map(|candidate| candidate.worker)
}

/// What a worker's share of its slots may be once it has the request.
fn bound(candidates: &[Candidate]) -> f64 {
    let capacity: f64 = candidates.iter().map(capacity).sum();
    let used: f64 = candidates.iter().map(|candidate| f64::from(candidate.used)).sum();
    BOUND * (used + 1.0) / capacity.max(f64::MIN_POSITIVE)
}

fn share(candidate: &Candidate) -> f64 {
    (f64::from(candidate.used) + 1.0) / capacity(candidate)
}

fn capacity(candidate: &Candidate) -> f64 {
    f64::from(candidate.slots.max(1)) * candidate.speed
}

#[cfg(test)]
mod tests {
    use super::super::tests::{candidate, candidates};
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_key_stays_when_other_workers_leave(key: u64, count in 2u64..12, gone: prop::sample::Index) {
            let mut idle: Vec<_> = (0..count).map(|worker| candidate(worker, 0, 8)).collect();
            let before = pick(key, &idle);
            let gone = idle.remove(gone.index(idle.len()));
            if before != Some(gone.worker) {
                prop_assert_eq!(pick(key, &idle), before);
            }
        }

        #[test]
        fn nobody_gets_more_than_its_bound_while_another_is_idle(key: u64, candidates in candidates()) {
            let bound = bound(&candidates).max(FREE);
            if let Some(picked) = pick(key, &candidates) {
                let picked = candidates.iter().find(|one| one.worker == picked).unwrap();
                let idle = candidates.iter().any(|one| one.has_room() && one.used == 0);
                prop_assert!(!idle || picked.used == 0 || share(picked) <= bound);
            }
        }

        #[test]
        fn keys_spread_over_all_workers(seed: u64) {
            let mut workers: Vec<_> = (0..4).map(|worker| candidate(worker, 0, 64)).collect();
            for key in 0..100u64 {
                let picked = pick(mix(seed.wrapping_add(key)), &workers).unwrap();
                let picked = &mut workers[picked as usize];
                picked.used += 1;
                picked.assigned += 1;
            }
            // 25 each on the average, and the bound of a quarter more.
            prop_assert!(workers.iter().all(|worker| worker.used <= 32), "{workers:?}");
        }
    }
}
