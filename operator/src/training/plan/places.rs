//! Where the next pods go: pools in their order, each up to its `max`; a pool that has no node for a
//! pod within `stockOutAfter` is passed over for a while. Workers of the on-demand floor go where no
//! provider takes nodes back.

use super::leave::unschedulable_since;
use super::{Action, MAX_CREATED, Plan, delete, has_node, is_standby, stays};
use crate::coordinator::membership::Millis;
use crate::training::observe::{Observed, PodView};
use crate::training::time::millis;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use vicuna_crds::Capacity;

/// Pods by pool.
type Filled = BTreeMap<String, u32>;

/// Makes the pods that are missing: `workers.min` first, and the others when those have nodes.
pub fn fill(observed: &Observed, now: Millis, plan: &mut Plan) {
    let moved = move_on(observed, now, plan);
    let staying: Vec<&PodView> = observed
        .pods
        .iter()
        .filter(|pod| stays(observed, pod) && !is_standby(observed, pod) && !moved.contains(&pod.uid))
        .collect();
    let missing = wanted(observed, &staying).saturating_sub(staying.len());
    if missing == 0 {
        return;
    }
    if now < plan.memory.backoff_until_ms {
        let wait = Duration::from_millis(plan.memory.backoff_until_ms - now);
        plan.look_again = plan.look_again.min(wait);
        plan.reason = format!("waits {} s after a failure", wait.as_secs() + 1);
        return;
    }
    let mut filled = count_by_pool(&staying);
    let mut names = Names::of(observed);
    let out = out(observed, plan);
    for _ in 0..missing.min(MAX_CREATED) {
        let Some(pool) = next_pool(observed, &out, &filled) else {
            plan.reason = "every pool is full".to_owned();
            break;
        };
        let pool_name = &observed.pools[pool].name;
        *filled.entry(pool_name.clone()).or_default() += 1;
        plan.actions.push(Action::CreatePod { name: names.next(pool_name), pool, replaces: None });
        plan.reason = format!("{missing} pods are missing");
    }
}

fn wanted(observed: &Observed, staying: &[&PodView]) -> usize {
    let workers = &observed.training.spec.workers;
    let placed = staying.iter().filter(|pod| has_node(pod)).count();
    if placed >= workers.min as usize { workers.max as usize } else { workers.min as usize }
}

/// Takes pods back from pools that have no node for them, if another pool has room.
fn move_on(observed: &Observed, now: Millis, plan: &mut Plan) -> BTreeSet<String> {
    let patience_ms = millis(observed.training.spec.placement.stock_out_after.get());
    let staying: Vec<&PodView> =
        observed.pods.iter().filter(|pod| stays(observed, pod) && !is_standby(observed, pod)).collect();
    let mut stuck = Vec::new();
    for pod in &staying {
        let Some(since) = unschedulable_since(pod) else { continue };
        let due = since.saturating_add(patience_ms);
        if now >= due {
            plan.stocked_out.insert(pod.pool.clone());
            stuck.push(*pod);
        } else {
            plan.look_again = plan.look_again.min(Duration::from_millis(due - now));
        }
    }
    let mut filled = count_by_pool(&staying);
    let mut moved = BTreeSet::new();
    let out = out(observed, plan);
    for pod in stuck {
        let Some(next) = open_pool(observed, &out, &filled) else {
            break;
        };
        *filled.entry(observed.pools[next].name.clone()).or_default() += 1;
        plan.actions.push(delete(pod, "no node of its pool takes it; the next pool is tried", false));
        moved.insert(pod.uid.clone());
    }
    moved
}

pub fn count_by_pool(pods: &[&PodView]) -> Filled {
    let mut count: Filled = BTreeMap::new();
    for pod in pods {
        *count.entry(pod.pool.clone()).or_default() += 1;
    }
    count
}

/// Pools without nodes, as far as is known.
fn out(observed: &Observed, plan: &Plan) -> BTreeSet<String> {
    observed.stocked_out.union(&plan.stocked_out).cloned().collect()
}

/// The first pool with room that has nodes; else the first with room, since a pending pod is what
/// makes an autoscaler add one.
fn next_pool(observed: &Observed, out: &BTreeSet<String>, filled: &Filled) -> Option<usize> {
    open_pool(observed, out, filled).or_else(|| first(observed, filled, |index| is_below_max(observed, index, filled)))
}

/// The first pool that has room and is not `out` of nodes.
pub fn open_pool(observed: &Observed, out: &BTreeSet<String>, filled: &Filled) -> Option<usize> {
    let is_open = |index: usize| !out.contains(&observed.pools[index].name) && is_below_max(observed, index, filled);
    first(observed, filled, is_open)
}

/// The first pool in order; while the on-demand floor is not reached, one that nobody takes back.
fn first(observed: &Observed, filled: &Filled, fits: impl Fn(usize) -> bool) -> Option<usize> {
    let of_the_floor = |index: &usize| observed.pools[*index].capacity != Capacity::Spot;
    let mut all = 0..observed.pools.len();
    let below_floor = is_below_floor(observed, filled);
    let floor = all.clone().filter(of_the_floor).find(|index| below_floor && fits(*index));
    floor.or_else(|| all.find(|index| fits(*index)))
}

fn is_below_floor(observed: &Observed, filled: &Filled) -> bool {
    let kept = observed.pools.iter().filter(|pool| pool.capacity != Capacity::Spot);
    let there: u32 = kept.filter_map(|pool| filled.get(&pool.name)).sum();
    there < observed.training.spec.placement.on_demand_floor
}

fn is_below_max(observed: &Observed, index: usize, filled: &Filled) -> bool {
    let pool = &observed.pools[index];
    let used = filled.get(&pool.name).copied().unwrap_or(0);
    pool.max.is_none_or(|max| used < max)
}

/// Names with an incarnation: higher than that of any pod that is still there, so that one which
/// cannot be deleted is in nobody's way. From the same pods come the same names: a cache that lags
/// behind makes the API server refuse the second pod rather than us make it.
pub struct Names {
    training: String,
    next: u64,
}

impl Names {
    pub fn of(observed: &Observed) -> Self {
        let number = |name: &String| name.rsplit('-').next().and_then(|text| text.parse::<u64>().ok());
        let highest = observed.names.iter().filter_map(number).max();
        Self {
            training: observed.training.metadata.name.clone().unwrap_or_default(),
            next: highest.map_or(0, |highest| highest + 1),
        }
    }

    pub fn next(&mut self, pool: &str) -> String {
        let number = self.next;
        self.next += 1;
        // 63 is the most that a host name may have; the training's name has 40 at most.
        let room = 63usize.saturating_sub(self.training.len() + 2 + number.to_string().len());
        let pool: String = pool.chars().take(room).collect();
        format!("{}-{}-{number}", self.training, pool.trim_end_matches('-'))
    }
}

#[cfg(test)]
mod tests {
    use crate::training::observe::{Observed, Trouble};
    use crate::training::plan::plan;
    use crate::training::tests::{NOW, created, deleted, observed, pool};

    fn mixed(floor: u32) -> Observed {
        let mut seen = observed().spec(|training| {
            training.spec.workers.min = 2;
            training.spec.workers.max = 3;
            training.spec.placement.on_demand_floor = floor;
        });
        seen.pools = vec![pool("spot", "Spot", None), pool("ondemand", "OnDemand", None)];
        seen
    }

    #[test]
    fn workers_min_pods_come_first_and_the_others_when_those_have_nodes() {
        assert_eq!(created(&plan(&mixed(0), NOW)).len(), 2);
        let waiting = mixed(0).pod("t-spot-0", |_| {}).pod("t-spot-1", |pod| pod.node = None);
        assert!(created(&plan(&waiting, NOW)).is_empty());
        let placed = mixed(0).pod("t-spot-0", |_| {}).pod("t-spot-1", |_| {});
        assert_eq!(created(&plan(&placed, NOW)), [("t-spot-2".into(), 0)]);
    }

    #[test]
    fn the_on_demand_floor_is_filled_first_whatever_the_order_of_pools() {
        assert_eq!(created(&plan(&mixed(1), NOW)), [("t-ondemand-0".into(), 1), ("t-spot-1".into(), 0)]);
        let filled = mixed(1).pod("t-ondemand-0", |pod| pod.pool = "ondemand".into()).pod("t-spot-1", |_| {});
        assert_eq!(created(&plan(&filled, NOW)), [("t-spot-2".into(), 0)]);
    }

    #[test]
    fn while_the_floors_pools_have_no_node_the_others_serve() {
        let mut seen = mixed(1);
        seen.stocked_out.insert("ondemand".into());
        assert_eq!(created(&plan(&seen, NOW)), [("t-spot-0".into(), 0), ("t-spot-1".into(), 0)]);
    }

    #[test]
    fn a_gated_pod_says_nothing_about_nodes() {
        let seen = mixed(0).pod("t-spot-0", |_| {}).pod("t-spot-1", |pod| {
            pod.node = None;
            pod.trouble = Some(Trouble::Gated);
        });
        let plan = plan(&seen, NOW + 3_600_000);
        assert!(deleted(&plan).is_empty() && plan.stocked_out.is_empty());
    }
}
