//! Which pool a new worker goes to: the first in order that has room, and that no worker waits for in vain.

use super::super::observe::Worker;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};
use vicuna_crds::Pool;

/// A worker that finds no node in its pool for so long is made in the next pool instead.
pub const STOCK_OUT_AFTER: Duration = Duration::from_secs(10);
/// A pool that had no node is tried again after so long.
pub const RETRY_AFTER: Duration = Duration::from_secs(120);

/// Pools that had no node for a worker, and when that was seen last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StockOuts(BTreeMap<String, SystemTime>);

impl StockOuts {
    /// Takes note of workers that have waited too long, and forgets what is old.
    pub fn learn(&mut self, workers: &[Worker], now: SystemTime) {
        self.0.retain(|_, at| !passed(*at, RETRY_AFTER, now));
        for worker in workers.iter().filter(|worker| waits_in_vain(worker, now)) {
            self.0.insert(worker.pool.clone(), now);
        }
    }

    fn contains(&self, pool: &str) -> bool {
        self.0.contains_key(pool)
    }
}

fn passed(since: SystemTime, time: Duration, now: SystemTime) -> bool {
    now.duration_since(since).is_ok_and(|age| age >= time)
}

pub fn waits_in_vain(worker: &Worker, now: SystemTime) -> bool {
    let trouble = worker.trouble.as_ref();
    let since = trouble.and_then(|trouble| trouble.unschedulable_since);
    since.is_some_and(|since| passed(since.max(worker.created), STOCK_OUT_AFTER, now))
}

/// The pool for one more worker, when `counts` workers are in each; `None`: all pools are full.
/// Where no pool has nodes, the first one's pending pods ask the cluster's autoscaler for some.
pub fn choose<'a>(pools: &'a [Pool], counts: &BTreeMap<String, u32>, stock_outs: &StockOuts) -> Option<&'a Pool> {
    let room = |pool: &&Pool| {
        let count = counts.get(&pool.name).copied().unwrap_or(0);
        pool.max.is_none_or(|max| count < max)
    };
    let with_nodes = |pool: &&Pool| !stock_outs.contains(&pool.name);
    let mut open = pools.iter().filter(room);
    open.clone().find(with_nodes).or_else(|| open.next())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{at, observed, unschedulable};
    use super::*;
    use serde_json::json;

    fn pools() -> Vec<Pool> {
        observed(json!({ "replicas": 1 })).serving.spec.pools.clone()
    }

    #[test]
    fn pools_are_filled_in_order_up_to_their_maximum() {
        let mut pools = pools();
        pools[0].max = Some(1);
        let none = StockOuts::default();
        let mut counts = BTreeMap::new();
        assert_eq!(choose(&pools, &counts, &none).unwrap().name, "spot");
        counts.insert("spot".to_owned(), 1);
        assert_eq!(choose(&pools, &counts, &none).unwrap().name, "on-prem");
        pools[1].max = Some(1);
        counts.insert("on-prem".to_owned(), 1);
        assert!(choose(&pools, &counts, &none).is_none());
    }

    #[test]
    fn a_pool_without_nodes_is_left_out_for_a_while() {
        let mut stock_outs = StockOuts::default();
        let waiting = [unschedulable("a", "spot", at(0))];
        stock_outs.learn(&waiting, at(5));
        assert_eq!(choose(&pools(), &BTreeMap::new(), &stock_outs).unwrap().name, "spot");
        stock_outs.learn(&waiting, at(10));
        assert_eq!(choose(&pools(), &BTreeMap::new(), &stock_outs).unwrap().name, "on-prem");
        stock_outs.learn(&[], at(131));
        assert_eq!(choose(&pools(), &BTreeMap::new(), &stock_outs).unwrap().name, "spot");
    }

    #[test]
    fn where_no_pool_has_nodes_the_first_one_is_asked() {
        let mut stock_outs = StockOuts::default();
        stock_outs.learn(&[unschedulable("a", "spot", at(0)), unschedulable("b", "on-prem", at(0))], at(30));
        assert_eq!(choose(&pools(), &BTreeMap::new(), &stock_outs).unwrap().name, "spot");
    }
}
