//! What to do: a pure function of what was observed and the time.

pub mod placement;
pub mod replace;
pub mod scale;

use super::memory::Memory;
use super::observe::{Model, Observed};
use std::time::{Duration, SystemTime};
use vicuna_crds::Pool;

/// How soon to look again while demand may change, or something is under way.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// How soon to look again at a serving where nothing moves.
const LOOK_AGAIN_AT_REST: Duration = Duration::from_secs(30);

#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub scaling: scale::Decision,
    pub actions: Vec<Action>,
    pub memory: Memory,
    pub again_after: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    Create(NewWorker),
    Delete(Removal),
}

#[derive(Clone, Debug, PartialEq)]
pub struct NewWorker {
    /// Never used before, so that a pod that is stuck in deletion blocks nothing.
    pub name: String,
    pub pool: Pool,
    /// Nodes that are about to go.
    pub avoid: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removal {
    pub name: String,
    pub uid: String,
    /// Time to drain, where it is less than the pod's own.
    pub grace: Option<Duration>,
    pub why: Why,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It ended by itself or with its node.
    Ended,
    /// Fewer workers are wanted.
    ScaledDown,
    /// Its node goes.
    NodeLeaving,
    /// The spec, the model or the image is another.
    Outdated,
    /// Its pool has no node for it.
    StockOut,
}

pub fn plan(observed: &Observed, now: SystemTime) -> Plan {
    let known = matches!(observed.model, Model::Known(_));
    let mut memory = observed.memory.clone();
    let scaling = scale::decide(observed, known, &mut memory.demand, now);
    memory.stock_outs.learn(&observed.workers, now);
    let actions = replace::actions(observed, scaling.desired, &memory.stock_outs, now);
    let moving = !actions.is_empty()
        || observed.workers.len() != scaling.desired as usize
        || (observed.serving.spec.autoscaling.is_some() && !is_asleep(observed, scaling.desired))
        || observed.workers.iter().any(|worker| worker.trouble.is_some());
    Plan { scaling, actions, memory, again_after: if moving { LOOK_AGAIN } else { LOOK_AGAIN_AT_REST } }
}

/// At zero, and nobody waits: the first request that does brings the next look.
fn is_asleep(observed: &Observed, desired: u32) -> bool {
    desired == 0 && observed.workers.is_empty() && observed.demand.as_ref().is_some_and(|demand| demand.unfinished == 0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::observe::{Life, Notice, Source, Trouble, Worker};
    use super::*;
    use crate::loads::Demand;
    use serde_json::json;
    use std::collections::BTreeSet;
    use std::sync::Arc;
    use std::time::Instant;

    pub const REVISION: &str = "current";

    pub fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
    }

    pub fn demand(unfinished: u32) -> Option<Demand> {
        Some(Demand {
            unfinished,
            queued: 0,
            tokens_per_second: 0.0,
            workers: BTreeSet::new(),
            reported_at: Instant::now(),
            gateways: 1,
            stale_gateways: 0,
        })
    }

    /// A serving on pools `spot` and `on-prem`, with what the spec says besides.
    pub fn observed(spec: serde_json::Value) -> Observed {
        let mut whole = json!({
            "model": { "from": { "uri": "s3://b/m" } },
            "pools": [
                { "name": "spot", "capacity": "Spot", "nodeSelector": { "kind": "spot" } },
                { "name": "on-prem", "capacity": "OnPrem", "nodeSelector": { "kind": "on-prem" } }
            ]
        });
        for (key, value) in spec.as_object().unwrap() {
            whole[key] = value.clone();
        }
        let serving = json!({
            "apiVersion": "vicuna.dev/v1alpha1", "kind": "VicunaServing",
            "metadata": { "name": "s", "namespace": "n", "uid": "u", "generation": 1 },
            "spec": whole
        });
        Observed {
            serving: Arc::new(serde_json::from_value(serving).unwrap()),
            model: Model::Known(Source {
                uri: "s3://b/m".into(),
                digest: None,
                credentials: None,
                adapters: Vec::new(),
            }),
            workers: Vec::new(),
            avoided_nodes: Vec::new(),
            demand: demand(0),
            memory: Memory::default(),
            revision: Some(REVISION.to_owned()),
        }
    }

    pub fn worker(name: &str, pool: &str, life: Life) -> Worker {
        Worker {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            address: None,
            pool: pool.to_owned(),
            revision: REVISION.to_owned(),
            node: Some(format!("node-of-{name}")),
            created: at(0),
            life,
            notice: None,
            trouble: None,
        }
    }

    /// A worker whose node goes.
    pub fn noticed(worker: Worker, deadline: Option<SystemTime>) -> Worker {
        Worker { notice: Some(Notice { source: "test".to_owned(), deadline }), ..worker }
    }

    pub fn unschedulable(name: &str, pool: &str, since: SystemTime) -> Worker {
        Worker {
            node: None,
            trouble: Some(Trouble {
                reason: "Unschedulable",
                message: "no node".to_owned(),
                unschedulable_since: Some(since),
            }),
            ..worker(name, pool, Life::Coming)
        }
    }

    pub fn created(plan: &Plan) -> Vec<&NewWorker> {
        let actions = plan.actions.iter();
        actions
            .filter_map(|action| match action {
                Action::Create(new) => Some(new),
                Action::Delete(_) => None,
            })
            .collect()
    }

    pub fn deleted(plan: &Plan) -> Vec<(&str, Why)> {
        let actions = plan.actions.iter();
        actions
            .filter_map(|action| match action {
                Action::Delete(Removal { name, why, .. }) => Some((name.as_str(), *why)),
                Action::Create(_) => None,
            })
            .collect()
    }

    #[test]
    fn nothing_is_made_before_the_model_is_there() {
        let mut seen = observed(json!({ "replicas": 3 }));
        seen.model = Model::Missing { reason: "TrainingNotComplete", message: String::new() };
        seen.revision = None;
        let plan = plan(&seen, at(0));
        assert_eq!(plan.actions, []);
        assert_eq!(plan.scaling.desired, 0);
    }

    #[test]
    fn what_runs_goes_on_when_the_training_that_made_it_is_gone() {
        let mut seen = observed(json!({ "replicas": 2 }));
        seen.model = Model::Missing { reason: "TrainingNotFound", message: String::new() };
        seen.revision = None;
        seen.workers = vec![worker("a", "spot", Life::Ready), worker("b", "spot", Life::Ready)];
        let status = vicuna_crds::VicunaServingStatus {
            replicas: Some(vicuna_crds::serving::Replicas { desired: 2, ..Default::default() }),
            ..Default::default()
        };
        Arc::make_mut(&mut seen.serving).status = Some(status);
        let plan = plan(&seen, at(0));
        assert_eq!((plan.scaling.desired, plan.actions), (2, Vec::new()));
    }

    #[test]
    fn a_new_serving_gets_its_workers_in_the_first_pool_under_names_of_their_own() {
        let plan = plan(&observed(json!({ "replicas": 3 })), at(0));
        let created = created(&plan);
        let names: BTreeSet<_> = created.iter().map(|new| &new.name).collect();
        assert_eq!(names.len(), 3);
        assert!(created.iter().all(|new| new.pool.name == "spot" && new.name.starts_with("s-")));
    }

    #[test]
    fn a_serving_that_sleeps_at_zero_is_looked_at_late() {
        let spec = json!({ "autoscaling": { "min": 0, "max": 2, "target": { "inFlight": 4 } } });
        let mut asleep = observed(spec);
        assert_eq!(plan(&asleep, at(0)).again_after, LOOK_AGAIN_AT_REST);
        asleep.demand = demand(1);
        let woken = plan(&asleep, at(1));
        assert_eq!((woken.again_after, created(&woken).len()), (LOOK_AGAIN, 1));
    }

    #[test]
    fn at_rest_nothing_is_done_and_the_next_look_is_late() {
        let mut seen = observed(json!({ "replicas": 1 }));
        seen.workers = vec![worker("a", "spot", Life::Ready)];
        let plan = plan(&seen, at(0));
        assert_eq!(plan.actions, []);
        assert_eq!(plan.again_after, LOOK_AGAIN_AT_REST);
    }
}
