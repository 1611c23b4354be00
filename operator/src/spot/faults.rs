//! Nodes on which ranks fail again and again: new pods are kept away from them for a while.

use crate::coordinator::membership::Millis;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};

/// So many failures within [`WINDOW_MS`] make a node suspect.
const REPEATED: usize = 2;
const WINDOW_MS: Millis = 3_600_000;
/// … for so long after the last one.
const AVOIDED_MS: Millis = 1_800_000;
/// Ranks that fail together on a node failed once.
const SAME_INCIDENT_MS: Millis = 30_000;
const MAX_NODES: usize = 4096;
const MAX_REMEMBERED: usize = 8;

/// When ranks failed, by node. What one training finds out is known to all.
#[derive(Debug, Default)]
pub struct NodeFaults(Mutex<BTreeMap<String, Vec<Millis>>>);

impl NodeFaults {
    /// A rank failed on this node, and not by its own fault.
    pub fn note(&self, node: &str, now: Millis) {
        let mut faults = self.0.lock();
        faults.retain(|_, at| at.last().is_some_and(|last| now.saturating_sub(*last) < WINDOW_MS));
        if faults.len() >= MAX_NODES && !faults.contains_key(node) {
            return;
        }
        let at = faults.entry(node.to_owned()).or_default();
        if at.last().is_some_and(|last| now.saturating_sub(*last) < SAME_INCIDENT_MS) {
            return;
        }
        at.push(now);
        if at.len() > MAX_REMEMBERED {
            at.remove(0);
        }
    }

    /// Nodes that are better avoided.
    pub fn suspects(&self, now: Millis) -> BTreeSet<String> {
        let faults = self.0.lock();
        let suspect = |at: &Vec<Millis>| {
            let recent = at.iter().filter(|at| now.saturating_sub(**at) < WINDOW_MS).count();
            recent >= REPEATED && at.last().is_some_and(|last| now.saturating_sub(*last) < AVOIDED_MS)
        };
        faults.iter().filter(|(_, at)| suspect(at)).map(|(node, _)| node.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_fails_ranks_repeatedly_is_suspect_for_a_while() {
        let faults = NodeFaults::default();
        faults.note("a", 0);
        faults.note("a", 1_000);
        assert!(faults.suspects(2_000).is_empty(), "ranks that fail together failed once");
        faults.note("b", 60_000);
        faults.note("a", 60_000);
        assert_eq!(faults.suspects(60_000), ["a".to_owned()].into());
        assert!(faults.suspects(60_000 + AVOIDED_MS).is_empty());
    }

    #[test]
    fn failures_that_lie_far_apart_do_not_add_up() {
        let faults = NodeFaults::default();
        faults.note("a", 0);
        faults.note("a", WINDOW_MS);
        assert!(faults.suspects(WINDOW_MS).is_empty());
    }
}
