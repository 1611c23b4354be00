//! Pods that had better be elsewhere: their node may go (advice), their pool was the second choice, the spec has changed, or
//! all of them are on one node. The new pod has its node before the old one is asked to leave, and the old one
//! trains until the new one takes over: the coordinator changes them between two steps.

use super::places::{count_by_pool, open_pool};
use super::{Action, Plan, delete, has_node, is_member, is_standby, stays};
use crate::coordinator::membership::Millis;
use crate::coordinator::report::Phase;
use crate::training::memory::Memory;
use crate::training::observe::{Observed, PodView};
use crate::training::time::millis;
use std::time::Duration;

/// Replacements under way at a time.
const MAX_ADVISED: usize = 4;
const MAX_BACKOFF_FACTOR: u32 = 32;

/// A pod that should be elsewhere.
struct Wish<'a> {
    pod: &'a PodView,
    why: String,
    /// May be carried out from then on.
    from_ms: Millis,
    advised: bool,
    /// It is to be on another node than all the others.
    apart: bool,
}

/// Carries moves on, and begins new ones.
pub fn consider(observed: &Observed, now: Millis, plan: &mut Plan) {
    carry_on(observed, now, plan);
    let steady = observed.report.as_ref().is_some_and(|report| report.phase == Phase::Steady);
    let short = plan.actions.iter().any(|action| matches!(action, Action::CreatePod { .. }));
    if !steady || short || super::is_short(observed) {
        return;
    }
    let under_way = observed.pods.iter().filter(|pod| is_standby(observed, pod) || is_on_its_way_out(pod)).count();
    let mut names = super::places::Names::of(observed);
    let mut begun = 0;
    for wish in wishes(observed) {
        let limit = if wish.advised { MAX_ADVISED } else { 1 };
        let from_ms = match wish {
            // A node that may go does not wait; a pool that had none is passed over by itself.
            Wish { advised: true, .. } => wish.from_ms,
            Wish { apart: true, .. } => wish.from_ms.max(plan.memory.no_parting_before_ms),
            _ => wish.from_ms.max(plan.memory.no_move_before_ms),
        };
        if now < from_ms {
            plan.look_again = plan.look_again.min(Duration::from_millis(from_ms - now));
            continue;
        }
        if under_way + begun >= limit {
            continue;
        }
        let pool = match wish {
            Wish { apart: true, .. } => place_apart(observed, wish.pod),
            Wish { advised: true, .. } => another_place(observed, wish.pod),
            _ => better_pool(observed, wish.pod),
        };
        let Some(pool) = pool else { continue };
        begun += 1;
        let name = names.next(&observed.pools[pool].name);
        plan.reason = format!("{}: {} is to take over", wish.why, name);
        plan.actions.push(Action::CreatePod { name, pool, replaces: Some(wish.pod.uid.clone()) });
    }
}

/// Asks the old pod to leave once the new one has a node; takes the new one back if it gets none.
fn carry_on(observed: &Observed, now: Millis, plan: &mut Plan) {
    let patience_ms = millis(observed.training.spec.placement.stock_out_after.get());
    for standby in observed.pods.iter().filter(|pod| is_standby(observed, pod)) {
        let Some(old) = replaced_by(observed, standby) else { continue };
        let Some(wish) = wish_of(observed, old) else {
            plan.actions.push(delete(standby, "the pod that it was to replace may stay", false));
            continue;
        };
        if has_node(standby) {
            *tries_of(&wish, &mut plan.memory).0 = 0;
            let (name, uid) = (old.name.clone(), old.uid.clone());
            plan.actions.push(Action::AskToLeave { name, uid, why: wish.why });
            continue;
        }
        let Some(since) = super::leave::unschedulable_since(standby) else { continue };
        let due = since.saturating_add(patience_ms);
        if now < due {
            plan.look_again = plan.look_again.min(Duration::from_millis(due - now));
            continue;
        }
        if !wish.apart {
            plan.stocked_out.insert(standby.pool.clone());
        }
        plan.actions.push(delete(standby, "no node of its pool takes it", false));
        let (failed, not_before_ms) = tries_of(&wish, &mut plan.memory);
        *failed = failed.saturating_add(1);
        let factor = (1u32 << (*failed - 1).min(16)).min(MAX_BACKOFF_FACTOR);
        let pause = observed.training.spec.placement.return_after.get().saturating_mul(factor);
        *not_before_ms = now.saturating_add(millis(pause));
    }
}

/// How often such a move has failed in a row, and until when none is tried.
fn tries_of<'m>(wish: &Wish, memory: &'m mut Memory) -> (&'m mut u32, &'m mut Millis) {
    match wish.apart {
        true => (&mut memory.partings_failed, &mut memory.no_parting_before_ms),
        false => (&mut memory.moves_failed, &mut memory.no_move_before_ms),
    }
}

fn replaced_by<'a>(observed: &'a Observed, standby: &PodView) -> Option<&'a PodView> {
    let old = standby.replaces.as_ref()?;
    observed.pods.iter().find(|pod| pod.uid == *old)
}

fn is_on_its_way_out(pod: &PodView) -> bool {
    pod.asked_to_leave && pod.ended.is_none() && !pod.deleting
}

/// Pods that should be elsewhere, those whose node may go first. Pods that wait for a node or start are
/// left alone.
fn wishes(observed: &Observed) -> Vec<Wish<'_>> {
    let settled = |pod: &&PodView| {
        let standby = is_standby(observed, pod);
        let has_standby =
            observed.pods.iter().any(|other| other.replaces.as_ref() == Some(&pod.uid) && stays(observed, other));
        stays(observed, pod) && !standby && !has_standby && is_member(observed, &pod.uid)
    };
    let mut wishes: Vec<Wish> = observed.pods.iter().filter(settled).filter_map(|pod| wish_of(observed, pod)).collect();
    wishes.sort_by_key(|wish| (!wish.advised, wish.from_ms));
    wishes
}

fn wish_of<'a>(observed: &Observed, pod: &'a PodView) -> Option<Wish<'a>> {
    if let Some(source) = &pod.advice {
        let why = format!("its node may go soon ({source})");
        return Some(Wish { pod, why, from_ms: 0, advised: true, apart: false });
    }
    of_pools(observed, pod).or_else(|| of_crowding(observed, pod))
}

/// Who takes the only node takes a block's owner and its twin. Of the pods there the one that came last is to move.
fn of_crowding<'a>(observed: &Observed, pod: &'a PodView) -> Option<Wish<'a>> {
    let (node, staying) = (pod.node.as_ref()?, staying(observed));
    let last = staying.iter().max_by_key(|other| (other.scheduled_at_ms, &other.name))?;
    let crowded = staying.len() > 1 && staying.iter().all(|other| other.node.as_ref() == Some(node));
    let why = format!("all ranks are on node {node}");
    let from_ms = settled_at(observed, pod);
    (crowded && last.uid == pod.uid).then_some(Wish { pod, why, from_ms, advised: false, apart: true })
}

/// From when on a pod is moved that may as well stay for a while.
fn settled_at(observed: &Observed, pod: &PodView) -> Millis {
    let wait_ms = millis(observed.training.spec.placement.return_after.get());
    pod.scheduled_at_ms.unwrap_or(0).saturating_add(wait_ms)
}

fn of_pools<'a>(observed: &Observed, pod: &'a PodView) -> Option<Wish<'a>> {
    let wish = |why: String, from_ms: Millis| Some(Wish { pod, why, from_ms, advised: false, apart: false });
    let better = better_pool(observed, pod).map(|index| &observed.pools[index])?;
    if better.name == pod.pool {
        return None;
    }
    let Some(own) = observed.pools.iter().find(|pool| pool.name == pod.pool) else {
        return wish(format!("pool {} is not in the spec any more", pod.pool), 0);
    };
    let staying: Vec<&PodView> = staying(observed);
    let in_own = count_by_pool(&staying).get(&own.name).copied().unwrap_or(0);
    if own.max.is_some_and(|max| in_own > max) {
        return wish(format!("pool {} is to have fewer pods", own.name), 0);
    }
    wish(format!("pool {} comes before pool {}", better.name, own.name), settled_at(observed, pod))
}

/// Where the pod would be made today, if it were not there. Its own pool has its node, whatever is known
/// of others.
fn better_pool(observed: &Observed, pod: &PodView) -> Option<usize> {
    let mut out = observed.stocked_out.clone();
    out.remove(&pod.pool);
    open_pool(observed, &out, &count_by_pool(&others(observed, pod)))
}

/// Where one more pod finds a node.
fn another_place(observed: &Observed, pod: &PodView) -> Option<usize> {
    open_pool(observed, &observed.stocked_out, &count_by_pool(&others(observed, pod)))
}

/// The pool where the pod would be made anyway, if it has a node without any of the training's pods: from any other pool it
/// would be moved back to the crowd.
fn place_apart(observed: &Observed, pod: &PodView) -> Option<usize> {
    let is_apart = |name: &String| observed.pools_apart.contains(name) && !observed.stocked_out.contains(name);
    better_pool(observed, pod).filter(|index| is_apart(&observed.pools[*index].name))
}

fn others<'a>(observed: &'a Observed, pod: &PodView) -> Vec<&'a PodView> {
    staying(observed).into_iter().filter(|other| other.uid != pod.uid).collect()
}

fn staying(observed: &Observed) -> Vec<&PodView> {
    observed.pods.iter().filter(|pod| stays(observed, pod) && !is_standby(observed, pod)).collect()
}

#[cfg(test)]
mod tests {
    use crate::coordinator::membership::Departure;
    use crate::training::memory::Memory;
    use crate::training::observe::{Observed, PodView, Trouble};
    use crate::training::plan::{Action, Plan, plan};
    use crate::training::tests::{NOW, created, deleted, steady};

    /// The pod of pool `onprem`, the second choice, got its node a minute before `NOW`.
    const DUE: u64 = NOW - 60_000 + 600_000;

    fn second_choice() -> Observed {
        steady(&["spot", "onprem"])
    }

    fn standby(seen: Observed, change: impl FnOnce(&mut PodView)) -> Observed {
        seen.pod("t-spot-2", |pod| {
            pod.replaces = Some("t-onprem-1".into());
            change(pod);
        })
    }

    fn asked(plan: &Plan) -> Vec<&str> {
        let asked = |action: &'_ Action| matches!(action, Action::AskToLeave { .. });
        plan.actions
            .iter()
            .filter(|action| asked(action))
            .map(|action| match action {
                Action::AskToLeave { name, .. } => name.as_str(),
                _ => "",
            })
            .collect()
    }

    #[test]
    fn after_a_while_the_first_choice_is_tried_again_with_a_pod_more() {
        let early = plan(&second_choice(), DUE - 10_000);
        assert!(created(&early).is_empty());
        assert_eq!(early.look_again.as_secs(), 10);
        let due = plan(&second_choice(), DUE);
        let create = Action::CreatePod { name: "t-spot-2".into(), pool: 0, replaces: Some("t-onprem-1".into()) };
        assert!(due.actions.contains(&create), "{:?}", due.actions);
        assert!(deleted(&due).is_empty() && asked(&due).is_empty());
        let mut out = second_choice();
        out.stocked_out.insert("spot".into());
        assert!(created(&plan(&out, DUE)).is_empty(), "it is known to have no node");
    }

    #[test]
    fn the_old_pod_is_asked_to_leave_once_the_new_one_has_a_node() {
        let waiting = plan(&standby(second_choice(), |pod| pod.node = None), DUE);
        assert!(asked(&waiting).is_empty() && created(&waiting).is_empty() && deleted(&waiting).is_empty());
        let placed = plan(&standby(second_choice(), |_| {}), DUE);
        assert_eq!(asked(&placed), ["t-onprem-1"]);
        assert!(deleted(&placed).is_empty(), "it trains until the new one takes over");
    }

    #[test]
    fn nothing_else_is_begun_while_the_old_pod_is_on_its_way_out() {
        let mut seen = standby(second_choice(), |_| {});
        seen.pods[1].asked_to_leave = true;
        seen.pods[1].departure =
            Some(Departure { source: "moved".into(), deadline_ms: 0, hurry: false, reclaim: false });
        let plan = plan(&seen, DUE);
        assert!(
            created(&plan).is_empty() && deleted(&plan).is_empty() && asked(&plan).is_empty(),
            "{:?}",
            plan.actions
        );
    }

    #[test]
    fn a_move_that_finds_no_node_is_taken_back_and_tried_later_and_later() {
        let stuck = |memory: Memory, now: u64| {
            let seen = standby(second_choice(), |pod| {
                pod.node = None;
                pod.trouble = Some(Trouble::Unschedulable { since_ms: now - 60_000, message: "0/3".into() });
            });
            plan(&Observed { memory, ..seen }, now)
        };
        let first = stuck(Memory::default(), DUE);
        assert_eq!(deleted(&first), ["t-spot-2"]);
        assert!(first.stocked_out.contains("spot"));
        assert_eq!(first.memory.no_move_before_ms, DUE + 600_000);
        let second = stuck(first.memory, DUE + 600_000);
        assert_eq!(second.memory.no_move_before_ms, DUE + 600_000 + 1_200_000);
        let mut waits = Observed { memory: second.memory, ..second_choice() };
        assert!(created(&plan(&waits, DUE + 700_000)).is_empty());
        waits.pods[0].advice = Some("rebalance-recommendation".into());
        let advised = Action::CreatePod { name: "t-spot-2".into(), pool: 0, replaces: Some("t-spot-0".into()) };
        assert!(plan(&waits, DUE + 700_000).actions.contains(&advised), "that its node may go does not wait");
    }

    #[test]
    fn advice_starts_a_replacement_and_stops_nothing() {
        let mut seen = steady(&["spot", "spot"]);
        seen.pods[0].advice = Some("rebalance-recommendation".into());
        let begun = plan(&seen, NOW);
        let create = Action::CreatePod { name: "t-spot-2".into(), pool: 0, replaces: Some("t-spot-0".into()) };
        assert!(begun.actions.contains(&create), "{:?}", begun.actions);
        assert!(deleted(&begun).is_empty() && asked(&begun).is_empty());
        let mut withdrawn = seen.pod("t-spot-2", |pod| pod.replaces = Some("t-spot-0".into()));
        withdrawn.pods[0].advice = None;
        assert_eq!(deleted(&plan(&withdrawn, NOW)), ["t-spot-2"]);
    }

    #[test]
    fn ranks_that_all_share_a_node_are_parted_once_another_one_is_there() {
        let crowded = || steady(&["spot", "spot"]);
        let parted = |pods: Observed| Observed { pools_apart: ["spot".to_owned()].into(), ..pods };
        assert!(created(&plan(&crowded(), DUE)).is_empty(), "there is no other node");
        assert!(created(&plan(&parted(crowded()), DUE - 10_000)).is_empty(), "not before a while");
        let create = Action::CreatePod { name: "t-spot-2".into(), pool: 0, replaces: Some("t-spot-1".into()) };
        let begun = plan(&parted(crowded()), DUE);
        assert!(begun.actions.contains(&create), "{:?}", begun.actions);
        let apart = |change: fn(&mut PodView)| {
            crowded().pod("t-spot-2", |pod| {
                pod.replaces = Some("t-spot-1".into());
                change(pod);
            })
        };
        // Its own pod is now on the other node, which so is none without any of them.
        let placed = plan(&apart(|pod| pod.node = Some("n2".into())), DUE);
        assert_eq!((asked(&placed), deleted(&placed)), (vec!["t-spot-1"], vec![]));
        let stuck = plan(
            &apart(|pod| {
                pod.node = None;
                pod.trouble = Some(Trouble::Unschedulable { since_ms: DUE - 60_000, message: "0/2".into() });
            }),
            DUE,
        );
        assert_eq!(deleted(&stuck), ["t-spot-2"]);
        assert!(stuck.stocked_out.is_empty(), "the pool has nodes, only no other one");
        assert_eq!((stuck.memory.no_parting_before_ms, stuck.memory.no_move_before_ms), (DUE + 600_000, 0));
        let later = Observed { memory: stuck.memory.clone(), ..parted(crowded()) };
        assert!(created(&plan(&later, DUE + 10_000)).is_empty());
        let returns = plan(&Observed { memory: stuck.memory, ..second_choice() }, DUE + 10_000);
        assert_eq!(created(&returns), [("t-spot-2".into(), 0)], "what failed says nothing of pools");
        let mut elsewhere = crowded();
        elsewhere.pools_apart = ["onprem".to_owned()].into();
        assert!(created(&plan(&elsewhere, DUE)).is_empty(), "from there it would be moved back");
        let mut done = parted(crowded());
        done.pods[0].node = Some("n2".into());
        assert!(created(&plan(&done, DUE + 3_600_000)).is_empty(), "they are apart");
    }

    #[test]
    fn pools_change_while_it_runs() {
        let mut removed = steady(&["spot", "onprem"]);
        removed.pools.retain(|pool| pool.name == "spot");
        assert_eq!(created(&plan(&removed, NOW)), [("t-spot-2".into(), 0)], "at once");
        let mut fewer = steady(&["spot", "spot"]);
        fewer.pools[0].max = Some(1);
        assert_eq!(created(&plan(&fewer, NOW)), [("t-onprem-2".into(), 1)], "at once");
        let floor = steady(&["spot", "spot"]).spec(|training| training.spec.placement.on_demand_floor = 1);
        assert_eq!(created(&plan(&floor, DUE)), [("t-onprem-2".into(), 1)]);
    }

    #[test]
    fn a_replaced_pod_that_nobody_reaches_is_deleted() {
        let mut seen = steady(&["spot", "spot"]).pod("t-onprem-2", |pod| {
            pod.asked_to_leave = true;
            pod.departure = Some(Departure { source: "moved".into(), deadline_ms: 0, hurry: false, reclaim: false });
        });
        assert_eq!(deleted(&plan(&seen, NOW)), ["t-onprem-2"]);
        seen = seen.rank("t-onprem-2", |_| {});
        assert!(deleted(&plan(&seen, NOW)).is_empty(), "the coordinator sends its rank home");
    }

    #[test]
    fn fewer_workers_end_a_move() {
        let seen = standby(second_choice(), |_| {}).spec(|training| training.spec.workers.max = 1);
        assert!(deleted(&plan(&seen, DUE)).contains(&"t-spot-2".to_owned()));
    }
}
