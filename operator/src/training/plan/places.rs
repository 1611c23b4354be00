//! Where the next pods go: pools in their order, each up to its `max`; a pool that has no node for a
//! pod within `stockOutAfter` is passed over for a while.

use super::leave::unschedulable_since;
use super::{Action, MAX_CREATED, Plan, delete, stays};
use crate::coordinator::membership::Millis;
use crate::training::observe::{Observed, PodView};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Makes the pods that are missing.
pub fn fill(observed: &Observed, now: Millis, plan: &mut Plan) {
    let moved = move_on(observed, now, plan);
    let staying: Vec<&PodView> =
        observed.pods.iter().filter(|pod| stays(observed, pod) && !moved.contains(&pod.uid)).collect();
    let missing = (observed.training.spec.workers.max as usize).saturating_sub(staying.len());
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
    for _ in 0..missing.min(MAX_CREATED) {
        let Some(pool) = next_pool(observed, &plan.stocked_out, &filled) else {
            plan.reason = "every pool is full".to_owned();
            break;
        };
        let pool_name = &observed.pools[pool].name;
        *filled.entry(pool_name.clone()).or_default() += 1;
        plan.actions.push(Action::CreatePod { name: names.next(pool_name), pool });
        plan.reason = format!("{missing} pods are missing");
    }
}

/// Takes pods back from pools that have no node for them, if another pool has room.
fn move_on(observed: &Observed, now: Millis, plan: &mut Plan) -> BTreeSet<String> {
    let patience = observed.training.spec.placement.stock_out_after.get();
    let patience_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
    let mut stuck = Vec::new();
    for pod in observed.pods.iter().filter(|pod| stays(observed, pod)) {
        let Some(since) = unschedulable_since(pod) else { continue };
        let due = since.saturating_add(patience_ms);
        if now >= due {
            plan.stocked_out.insert(pod.pool.clone());
            stuck.push(pod);
        } else {
            plan.look_again = plan.look_again.min(Duration::from_millis(due - now));
        }
    }
    let staying: Vec<&PodView> = observed.pods.iter().filter(|pod| stays(observed, pod)).collect();
    let mut filled = count_by_pool(&staying);
    let mut moved = BTreeSet::new();
    for pod in stuck {
        let out = &plan.stocked_out;
        let Some(next) = (0..observed.pools.len()).find(|index| has_room(observed, *index, out, &filled)) else {
            break;
        };
        *filled.entry(observed.pools[next].name.clone()).or_default() += 1;
        plan.actions.push(delete(pod, "no node of its pool takes it; the next pool is tried", false));
        moved.insert(pod.uid.clone());
    }
    moved
}

fn count_by_pool(pods: &[&PodView]) -> BTreeMap<String, u32> {
    let mut count: BTreeMap<String, u32> = BTreeMap::new();
    for pod in pods {
        *count.entry(pod.pool.clone()).or_default() += 1;
    }
    count
}

/// The first pool with room that has nodes; else the first with room, since a pending pod is what
/// makes an autoscaler add one.
fn next_pool(observed: &Observed, found_out: &BTreeSet<String>, filled: &BTreeMap<String, u32>) -> Option<usize> {
    let mut all = 0..observed.pools.len();
    all.clone()
        .find(|index| has_room(observed, *index, found_out, filled))
        .or_else(|| all.find(|index| is_below_max(observed, *index, filled)))
}

fn has_room(observed: &Observed, index: usize, found_out: &BTreeSet<String>, filled: &BTreeMap<String, u32>) -> bool {
    let name = &observed.pools[index].name;
    let out = observed.stocked_out.contains(name) || found_out.contains(name);
    !out && is_below_max(observed, index, filled)
}

fn is_below_max(observed: &Observed, index: usize, filled: &BTreeMap<String, u32>) -> bool {
    let pool = &observed.pools[index];
    let used = filled.get(&pool.name).copied().unwrap_or(0);
    pool.max.is_none_or(|max| used < max)
}

/// Names with an incarnation: higher than that of any pod that is still there, so that one which
/// cannot be deleted is in nobody's way. From the same pods come the same names: a cache that lags
/// behind makes the API server refuse the second pod rather than us make it.
struct Names {
    training: String,
    next: u64,
}

impl Names {
    fn of(observed: &Observed) -> Self {
        let number = |name: &String| name.rsplit('-').next().and_then(|text| text.parse::<u64>().ok());
        let highest = observed.names.iter().filter_map(number).max();
        Self {
            training: observed.training.metadata.name.clone().unwrap_or_default(),
            next: highest.map_or(0, |highest| highest + 1),
        }
    }

    fn next(&mut self, pool: &str) -> String {
        let number = self.next;
        self.next += 1;
        // 63 is the most that a host name may have; the training's name has 40 at most.
        let room = 63usize.saturating_sub(self.training.len() + 2 + number.to_string().len());
        let pool: String = pool.chars().take(room).collect();
        format!("{}-{}-{number}", self.training, pool.trim_end_matches('-'))
    }
}
