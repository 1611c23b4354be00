//! Which pods to make and which to let go. A worker that must go (its node leaves, or it is outdated)
//! does not count as one that is wanted, so its replacement is made at once; it goes when the
//! replacement answers, or when its node leaves it no more time.

use super::super::drain;
use super::super::observe::{Life, Observed, Worker};
use super::placement::{self, StockOuts};
use super::{Action, NewWorker, Removal, Why};
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};
use vicuna_crds::Pool;

/// Nodes named in a pod's affinity, at most.
const AVOIDED_NODES_MAX: usize = 32;

/// What is to become of a pod.
enum Fate {
    Stays,
    Goes(Why),
    /// Goes once there are enough others.
    Replaced(Why),
}

pub fn actions(observed: &Observed, desired: u32, stock_outs: &StockOuts, now: SystemTime) -> Vec<Action> {
    let pools = Pool::of(&observed.serving.spec.pools);
    let mut staying = Vec::new();
    let mut replaced = Vec::new();
    let mut actions = Vec::new();
    for worker in observed.workers.iter().filter(|worker| worker.life != Life::Leaving) {
        match fate(worker, observed, &pools, now) {
            Fate::Stays => staying.push(worker),
            Fate::Replaced(why) => replaced.push((worker, why)),
            Fate::Goes(why) => actions.push(remove(worker, why, observed, now)),
        }
    }
    let ready = staying.iter().filter(|worker| worker.life == Life::Ready).count();
    if ready >= desired as usize {
        actions.extend(replaced.iter().map(|(worker, why)| remove(worker, *why, observed, now)));
    }
    let desired = desired as usize;
    if staying.len() > desired {
        let surplus = surplus(&mut staying, desired, &pools);
        actions.extend(surplus.iter().map(|worker| remove(worker, Why::ScaledDown, observed, now)));
    }
    // Without a model there is nothing that a new worker could serve.
    if observed.revision.is_some() {
        actions.extend(missing(observed, &staying, desired, &pools, stock_outs, now));
    }
    actions
}

fn fate(worker: &Worker, observed: &Observed, pools: &[Pool], now: SystemTime) -> Fate {
    if worker.life == Life::Ended {
        return Fate::Goes(Why::Ended);
    }
    if let Some(notice) = &worker.notice {
        let last_moment = drain::last_moment(drain_timeout(worker, observed, pools));
        let urgent = notice.deadline.is_some_and(|deadline| now + last_moment >= deadline);
        // One that never answered is worth no waiting.
        return if urgent || worker.life == Life::Coming {
            Fate::Goes(Why::NodeLeaving)
        } else {
            Fate::Replaced(Why::NodeLeaving)
        };
    }
    // Without a model nothing is compared: what runs goes on until there is something else to run.
    let outdated = observed.revision.as_ref().is_some_and(|revision| *revision != worker.revision);
    if outdated || !pools.iter().any(|pool| pool.name == worker.pool) {
        return match worker.life {
            Life::Ready => Fate::Replaced(Why::Outdated),
            _ => Fate::Goes(Why::Outdated),
        };
    }
    if placement::waits_in_vain(worker, now) && pools.len() > 1 {
        return Fate::Goes(Why::StockOut);
    }
    Fate::Stays
}

/// What the worker was started with, or would be now if its pool is gone.
fn drain_timeout(worker: &Worker, observed: &Observed, pools: &[Pool]) -> Duration {
    let pool = pools.iter().find(|pool| pool.name == worker.pool);
    pool.map_or(observed.serving.spec.drain.timeout.get(), |pool| drain::timeout(&observed.serving, pool))
}

/// Those to let go when there are too many: first who does not answer, then of the last pool, then the youngest.
fn surplus<'a>(staying: &mut Vec<&'a Worker>, desired: usize, pools: &[Pool]) -> Vec<&'a Worker> {
    let place = |worker: &Worker| pools.iter().position(|pool| pool.name == worker.pool);
    staying.sort_by_key(|worker| (worker.life != Life::Ready, place(worker), worker.created, worker.name.clone()));
    staying.split_off(desired)
}

fn remove(worker: &Worker, why: Why, observed: &Observed, now: SystemTime) -> Action {
    let deadline = worker.notice.as_ref().and_then(|notice| notice.deadline);
    let left = deadline.map(|deadline| deadline.duration_since(now).unwrap_or_default());
    let pools = Pool::of(&observed.serving.spec.pools);
    let own = drain_timeout(worker, observed, &pools) + drain::GRACE_MARGIN;
    Action::Delete(Removal {
        name: worker.name.clone(),
        uid: worker.uid.clone(),
        grace: left.filter(|left| *left < own).map(|left| left.max(Duration::from_secs(1))),
        why,
    })
}

fn missing(
    observed: &Observed,
    staying: &[&Worker],
    desired: usize,
    pools: &[Pool],
    stock_outs: &StockOuts,
    now: SystemTime,
) -> Vec<Action> {
    let mut counts = BTreeMap::new();
    for worker in staying {
        *counts.entry(worker.pool.clone()).or_insert(0) += 1;
    }
    let avoid: Vec<_> = observed.avoided_nodes.iter().take(AVOIDED_NODES_MAX).cloned().collect();
    let count = desired.saturating_sub(staying.len());
    let incarnation = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
    let mut made = Vec::new();
    for index in 0..count {
        let Some(pool) = placement::choose(pools, &counts, stock_outs) else {
            break;
        };
        *counts.entry(pool.name.clone()).or_insert(0) += 1;
        made.push(Action::Create(NewWorker {
            name: name(observed, incarnation + index as u64),
            pool: pool.clone(),
            avoid: avoid.clone(),
        }));
    }
    made
}

/// `<serving>-<incarnation>`: the time in base 36, so that no name comes twice.
fn name(observed: &Observed, mut incarnation: u64) -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut digits = Vec::new();
    while incarnation > 0 {
        digits.push(char::from(DIGITS[(incarnation % 36) as usize]));
        incarnation /= 36;
    }
    let serving = observed.serving.metadata.name.as_deref().unwrap_or_default();
    format!("{serving}-{}", digits.iter().rev().collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{at, created, deleted, noticed, observed, unschedulable, worker};
    use super::super::{Plan, plan};
    use super::*;
    use serde_json::json;

    fn replicas(count: u32) -> Observed {
        observed(json!({ "replicas": count, "drain": { "timeout": "60s" } }))
    }

    fn grace(plan: &Plan) -> Option<Duration> {
        plan.actions.iter().find_map(|action| match action {
            Action::Delete(removal) => removal.grace,
            Action::Create(_) => None,
        })
    }

    #[test]
    fn a_worker_whose_node_goes_is_replaced_before_it_is_let_go() {
        let mut seen = replicas(2);
        seen.workers = vec![noticed(worker("a", "spot", Life::Ready), Some(at(30))), worker("b", "spot", Life::Ready)];
        seen.avoided_nodes = vec!["node-of-a".to_owned()];
        let first = plan(&seen, at(0));
        assert_eq!(created(&first).len(), 1);
        assert_eq!(created(&first)[0].avoid, ["node-of-a"]);
        assert_eq!(deleted(&first), []);

        seen.workers.push(worker("c", "spot", Life::Coming));
        assert_eq!(plan(&seen, at(5)).actions, []);

        seen.workers[2].life = Life::Ready;
        let last = plan(&seen, at(8));
        assert_eq!(deleted(&last), [("a", Why::NodeLeaving)]);
        assert_eq!(created(&last).len(), 0);
        assert_eq!(grace(&last), None, "its own, of 20 s, is over before its node goes");
    }

    #[test]
    fn a_worker_is_let_go_at_the_last_moment_even_if_its_replacement_is_late() {
        let mut seen = replicas(1);
        seen.workers = vec![noticed(worker("a", "spot", Life::Ready), Some(at(30))), worker("b", "spot", Life::Coming)];
        assert_eq!(plan(&seen, at(14)).actions, []);
        let late = plan(&seen, at(15));
        assert_eq!(deleted(&late), [("a", Why::NodeLeaving)]);
        let (grace, drain) = (grace(&late).unwrap(), drain::timeout(&seen.serving, &seen.serving.spec.pools[0]));
        assert_eq!(grace, Duration::from_secs(15));
        assert!(drain + Duration::from_secs(5) <= grace, "what still runs is handed back before it is killed");
    }

    #[test]
    fn a_deleted_worker_is_replaced_at_once_under_another_name() {
        let mut seen = replicas(1);
        seen.workers = vec![worker("s-old", "spot", Life::Leaving)];
        let plan = plan(&seen, at(0));
        assert_eq!(created(&plan).len(), 1);
        assert_ne!(created(&plan)[0].name, "s-old");
        assert_eq!(deleted(&plan), []);
    }

    #[test]
    fn a_worker_that_ended_is_removed_and_replaced() {
        let mut seen = replicas(1);
        seen.workers = vec![worker("a", "spot", Life::Ended)];
        let plan = plan(&seen, at(0));
        assert_eq!(deleted(&plan), [("a", Why::Ended)]);
        assert_eq!(created(&plan).len(), 1);
    }

    #[test]
    fn scaling_down_spares_those_that_answer_and_the_older_ones() {
        let mut seen = replicas(1);
        seen.workers = vec![
            worker("young", "spot", Life::Ready),
            worker("old", "spot", Life::Ready),
            worker("coming", "spot", Life::Coming),
            worker("elsewhere", "on-prem", Life::Ready),
        ];
        seen.workers[0].created = at(50);
        let plan = plan(&seen, at(100));
        let mut gone: Vec<_> = deleted(&plan).iter().map(|(name, _)| *name).collect();
        gone.sort_unstable();
        assert_eq!(gone, ["coming", "elsewhere", "young"]);
    }

    #[test]
    fn a_worker_without_a_node_moves_to_the_next_pool() {
        let mut seen = replicas(1);
        seen.workers = vec![unschedulable("a", "spot", at(0))];
        assert_eq!(plan(&seen, at(5)).actions, []);
        let plan = plan(&seen, at(10));
        assert_eq!(deleted(&plan), [("a", Why::StockOut)]);
        assert_eq!(created(&plan)[0].pool.name, "on-prem");
    }

    #[test]
    fn with_one_pool_a_worker_without_a_node_keeps_waiting() {
        let mut seen = observed(json!({ "replicas": 1, "pools": [] }));
        seen.workers = vec![unschedulable("a", "any", at(0))];
        assert_eq!(plan(&seen, at(1000)).actions, []);
    }

    #[test]
    fn another_model_replaces_workers_and_keeps_the_old_until_the_new_answer() {
        let mut seen = replicas(1);
        seen.workers = vec![worker("a", "spot", Life::Ready)];
        seen.revision = Some("other".to_owned());
        let first = plan(&seen, at(0));
        assert_eq!((created(&first).len(), deleted(&first).len()), (1, 0));
        let mut new = worker("b", "spot", Life::Ready);
        new.revision = "other".to_owned();
        seen.workers.push(new);
        assert_eq!(deleted(&plan(&seen, at(9))), [("a", Why::Outdated)]);
    }

    #[test]
    fn ready_workers_never_fall_below_what_is_wanted_by_our_own_hand() {
        // Every mix of three pods' lives, nodes and revisions, with 1 or 2 wanted and no deadline near.
        for mix in 0..8u32.pow(3) {
            for desired in 1..=2 {
                let mut seen = replicas(desired);
                for index in 0..3 {
                    let bits = mix / 8u32.pow(index) % 8;
                    let life = if bits & 1 == 0 { Life::Ready } else { Life::Coming };
                    let mut pod = worker(&format!("w{index}"), "spot", life);
                    if bits & 2 != 0 {
                        pod = noticed(pod, None);
                    }
                    if bits & 4 != 0 {
                        pod.revision = "old".to_owned();
                    }
                    seen.workers.push(pod);
                }
                let ready = |gone: &[(&str, Why)]| {
                    let stays = |pod: &&Worker| !gone.iter().any(|(name, _)| *name == pod.name);
                    seen.workers.iter().filter(|pod| pod.life == Life::Ready).filter(stays).count()
                };
                let plan = plan(&seen, at(0));
                let floor = ready(&[]).min(desired as usize);
                assert!(ready(&deleted(&plan)) >= floor, "mix {mix}, {desired} wanted: {plan:?}");
            }
        }
    }
}
