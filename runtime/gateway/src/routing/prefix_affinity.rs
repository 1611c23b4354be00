//! Prompts that begin alike go where their keys and values are.

use super::{Candidate, Policy, Route, rendezvous};

/// How much of a prompt, in bytes, makes it alike: system prompts and few-shot examples are longer.
pub const PREFIX_BYTES: usize = 1024;

#[derive(Clone, Copy, Debug, Default)]
pub struct PrefixAffinity;

impl Policy for PrefixAffinity {
    fn pick(&self, route: &Route, candidates: &[Candidate]) -> Option<u64> {
        rendezvous::pick(route.prefix, candidates)
    }

    fn favourite(&self, route: &Route, candidates: &[Candidate]) -> Option<u64> {
        rendezvous::first(route.prefix, candidates)
    }

    fn name(&self) -> &'static str {
        "prefix-affinity"
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::candidate;
    use super::*;

    #[test]
    fn prompts_that_begin_alike_stay_together_until_their_worker_is_too_busy() {
        let mut workers: Vec<_> = (0..3).map(|worker| candidate(worker, 0, 8)).collect();
        let route = |draw| Route { prefix: 42, session: None, draw };
        let favourite = PrefixAffinity.pick(&route(1), &workers).unwrap();
        assert_eq!(PrefixAffinity.pick(&route(2), &workers), Some(favourite));
        workers[favourite as usize] = candidate(favourite, 6, 8);
        assert_ne!(PrefixAffinity.pick(&route(3), &workers), Some(favourite));
    }
}
