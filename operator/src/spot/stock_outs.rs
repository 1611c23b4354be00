//! Pools that had no node for a pod. What one training finds out is known to all.
//!
//! Pools of different objects are the same when they select the same nodes. A stock-out seen by a pod
//! says something about pods that are as large or larger, and nothing about smaller ones.

use super::capacity::Size;
use crate::coordinator::membership::Millis;
use parking_lot::Mutex;
use serde_json::json;
use std::collections::BTreeMap;
use vicuna_crds::Pool;

/// The first time a pool is passed over for so many times the patience that was had with it; each
/// further time twice as long.
const FACTOR: u64 = 10;
const MAX_PASSED_OVER_MS: Millis = 3_600_000;
/// How often a stock-out was seen is forgotten so long after the last.
const REMEMBERED_MS: Millis = 7_200_000;
const MAX_KNOWN: usize = 4096;

/// What makes two pools the same, for pods of one size.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kind(String, Size);

/// Which nodes a pool selects.
pub fn nodes_of(pool: &Pool) -> String {
    json!([pool.node_selector, pool.tolerations]).to_string()
}

#[derive(Clone, Copy, Debug, Default)]
struct StockOut {
    times: u32,
    /// When it was seen last.
    seen_ms: Millis,
    /// The pool is passed over until then.
    until_ms: Millis,
}

/// All stock-outs that are known.
#[derive(Debug, Default)]
pub struct StockOuts(Mutex<BTreeMap<Kind, StockOut>>);

impl StockOuts {
    /// A pod of this size has waited `patience_ms` for a node of the pool.
    pub fn note(&self, pool: &Pool, size: Size, patience_ms: Millis, now: Millis) {
        let mut known = self.0.lock();
        known.retain(|_, out| now < out.until_ms.saturating_add(REMEMBERED_MS));
        let kind = Kind(nodes_of(pool), size);
        if known.len() >= MAX_KNOWN && !known.contains_key(&kind) {
            return;
        }
        let out = known.entry(kind).or_default();
        if now < out.until_ms {
            return;
        }
        out.seen_ms = now;
        out.times = out.times.saturating_add(1);
        let doubled = patience_ms.saturating_mul(FACTOR).saturating_mul(1 << (out.times - 1).min(16));
        out.until_ms = now.saturating_add(doubled.min(MAX_PASSED_OVER_MS));
    }

    /// A pod of this size got a node of the pool at `at_ms`: a stock-out before that is over.
    pub fn has_room(&self, pool: &Pool, size: Size, at_ms: Millis) {
        let nodes = nodes_of(pool);
        let over = |out: &String, of: &Size, seen_ms| *out == nodes && size.covers(of) && seen_ms < at_ms;
        self.0.lock().retain(|Kind(out, of), stock_out| !over(out, of, stock_out.seen_ms));
    }

    /// Whether a pod of this size is better not made there.
    pub fn is_out(&self, pool: &Pool, size: Size, now: Millis) -> bool {
        let nodes = nodes_of(pool);
        let known = self.0.lock();
        known.iter().any(|(Kind(out, of), stock_out)| *out == nodes && size.covers(of) && now < stock_out.until_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(name: &str, nodes: &str) -> Pool {
        serde_json::from_value(json!({"name": name, "capacity": "Spot", "nodeSelector": {"kind": nodes}})).unwrap()
    }

    fn size(cpu_milli: u64) -> Size {
        Size { cpu_milli, ..Size::default() }
    }

    #[test]
    fn what_one_finds_out_all_know_whatever_they_call_the_pool() {
        let outs = StockOuts::default();
        outs.note(&pool("spot", "a"), size(1000), 60_000, 1_000);
        assert!(outs.is_out(&pool("cheap", "a"), size(1000), 2_000));
        assert!(outs.is_out(&pool("cheap", "a"), size(2000), 2_000));
        assert!(!outs.is_out(&pool("cheap", "a"), size(500), 2_000), "smaller pods may fit");
        assert!(!outs.is_out(&pool("spot", "b"), size(1000), 2_000));
    }

    #[test]
    fn a_pool_is_tried_again_and_passed_over_longer_each_time() {
        let outs = StockOuts::default();
        let pool = pool("spot", "a");
        outs.note(&pool, size(1), 1_000, 0);
        outs.note(&pool, size(1), 1_000, 5_000);
        assert!(outs.is_out(&pool, size(1), 9_999) && !outs.is_out(&pool, size(1), 10_000));
        outs.note(&pool, size(1), 1_000, 10_000);
        assert!(outs.is_out(&pool, size(1), 29_999) && !outs.is_out(&pool, size(1), 30_000));
    }

    #[test]
    fn a_pod_that_gets_a_node_ends_the_stock_out_for_pods_of_its_size() {
        let outs = StockOuts::default();
        let pool = pool("spot", "a");
        outs.note(&pool, size(4), 60_000, 0);
        outs.has_room(&pool, size(1), 500);
        assert!(outs.is_out(&pool, size(4), 501), "a small pod proves nothing for a large one");
        outs.has_room(&pool, size(4), 0);
        assert!(outs.is_out(&pool, size(4), 501), "it got its node before");
        outs.has_room(&pool, size(4), 500);
        assert!(!outs.is_out(&pool, size(4), 501));
    }
}
