//! What one training finds out and all trainings know: pools without nodes, bad nodes, and who wants
//! which nodes.

use crate::coordinator::membership::Millis;
use crate::coordinator::registry::Key;
use crate::spot::capacity::Size;
use crate::spot::faults::NodeFaults;
use crate::spot::stock_outs::{StockOuts, nodes_of};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use vicuna_crds::Pool;

#[derive(Debug, Default)]
pub struct Known {
    pub stock_outs: StockOuts,
    pub faults: NodeFaults,
    claims: Mutex<BTreeMap<Key, Claim>>,
}

/// How a training stands in the competition for nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    pub seniority: Seniority,
    /// Which nodes its pools select.
    pub nodes: BTreeSet<String>,
    pub state: ClaimState,
}

/// The smaller one is the older training; one that has a trained state to lose is older than any that
/// has none.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seniority {
    pub untrained: bool,
    pub created_at_seconds: i64,
    pub name: Key,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimState {
    /// It has its `workers.min`, or wants nothing.
    Satisfied,
    /// It has fewer, and pods that wait for nodes.
    Forming,
    /// It has given its pods back for an older one.
    GaveBack,
    /// It was the oldest, waited long in vain, and lets others try.
    GaveWay,
}

impl Known {
    /// Names of those pools that lately had no node for a pod of this size.
    pub fn stocked_out(&self, pools: &[Pool], size: Size, now: Millis) -> BTreeSet<String> {
        pools.iter().filter(|pool| self.stock_outs.is_out(pool, size, now)).map(|pool| pool.name.clone()).collect()
    }

    /// Claims of others on nodes of these pools.
    pub fn rivals(&self, namespace: &str, name: &str, pools: &[Pool]) -> Vec<Claim> {
        let nodes: BTreeSet<String> = pools.iter().map(nodes_of).collect();
        let own = (namespace.to_owned(), name.to_owned());
        let claims = self.claims.lock();
        let others = claims.iter().filter(|(key, claim)| **key != own && !claim.nodes.is_disjoint(&nodes));
        // Who has all that it needs competes with nobody.
        others.filter(|(_, claim)| claim.state != ClaimState::Satisfied).map(|(_, claim)| claim.clone()).collect()
    }

    pub fn claim(&self, key: &Key, claim: Option<Claim>) {
        let mut claims = self.claims.lock();
        match claim {
            Some(claim) => drop(claims.insert(key.clone(), claim)),
            None => drop(claims.remove(key)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::tests::pool;

    #[test]
    fn rivals_are_others_that_lack_nodes_of_the_same_kind() {
        let known = Known::default();
        let key = |name: &str| ("ns".to_owned(), name.to_owned());
        let claim = |name: &str, pool: &Pool, state| Claim {
            seniority: Seniority { name: key(name), ..Seniority::default() },
            nodes: [nodes_of(pool)].into(),
            state,
        };
        let (spot, other) = (pool("spot", "Spot", None), pool("other", "Spot", None));
        known.claim(&key("own"), Some(claim("own", &spot, ClaimState::Forming)));
        known.claim(&key("rival"), Some(claim("rival", &spot, ClaimState::GaveBack)));
        known.claim(&key("elsewhere"), Some(claim("elsewhere", &other, ClaimState::Forming)));
        known.claim(&key("content"), Some(claim("content", &spot, ClaimState::Satisfied)));
        let rivals = known.rivals("ns", "own", std::slice::from_ref(&spot));
        assert_eq!(rivals.iter().map(|rival| rival.seniority.name.1.as_str()).collect::<Vec<_>>(), ["rival"]);
        known.claim(&key("rival"), None);
        assert!(known.rivals("ns", "own", &[spot]).is_empty());
    }

    #[test]
    fn a_training_that_has_trained_is_older_than_any_that_has_not() {
        let of = |untrained, created_at_seconds| Seniority { untrained, created_at_seconds, ..Seniority::default() };
        assert!(of(false, 200) < of(true, 100) && of(true, 100) < of(true, 200));
    }
}
