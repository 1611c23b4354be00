//! Fixtures, and what plan and status make of them.

use super::apply::Applied;
use super::memory::Memory;
use super::observe::{End, Observed, PodView, Trouble};
use super::plan::{Action, Plan, plan};
use super::status::{WRITE_EVERY, Write, is_terminal, status, when_to_write};
use crate::coordinator::membership::{Departure, Millis};
use crate::coordinator::record::{Finish, Member};
use crate::coordinator::report::{
    Blockage, CheckpointReport, EvaluationReport, MemoryNeed, Phase, RankFailure, RankView, Remedy, Report, StepReport,
};
use crate::spot::capacity::Size;
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use vicuna_crds::Pool;
use vicuna_crds::training::{Restarts, Spent, TrainingState, VicunaTraining, VicunaTrainingStatus};
use vicuna_protocol::coordinator::Cause;

/// A training with two workers of at least one, in the pools `spot` and `onprem`.
pub(crate) fn training(name: &str) -> VicunaTraining {
    serde_json::from_value(json!({
        "apiVersion": "vicuna.dev/v1alpha1",
        "kind": "VicunaTraining",
        "metadata": {"name": name, "namespace": "ns", "uid": format!("uid-{name}"), "generation": 1},
        "spec": {
            "model": {"from": "s3://bucket/model"},
            "dataset": [{"from": "s3://bucket/data.json"}],
            "recipe": {"globalBatch": 8, "microBatch": 1, "steps": 100},
            "workers": {"min": 1, "max": 2},
            "pools": [
                {"name": "spot", "capacity": "Spot", "nodeSelector": {"kind": "spot"}},
                {"name": "onprem", "capacity": "OnPrem", "nodeSelector": {"kind": "onprem"}},
            ],
            "checkpoint": {"to": "s3://bucket/run", "credentials": {"name": "store"}},
        },
    }))
    .unwrap()
}

pub(crate) const NOW: Millis = 10_000_000;

pub(crate) fn observed() -> Observed {
    let training = training("t");
    Observed {
        pools: Pool::of(&training.spec.pools),
        training: Arc::new(training),
        pods: Vec::new(),
        names: BTreeSet::new(),
        report: Some(Report { phase: Phase::Held, ..Report::default() }),
        stocked_out: BTreeSet::new(),
        avoided_nodes: BTreeSet::new(),
        suspect_nodes: BTreeSet::new(),
        pools_apart: BTreeSet::new(),
        rivals: Vec::new(),
        size: Size::default(),
        memory: Memory::default(),
    }
}

/// A pool of its own nodes.
pub(crate) fn pool(name: &str, capacity: &str, hourly_price: Option<f64>) -> Pool {
    serde_json::from_value(json!({
        "name": name, "capacity": capacity, "nodeSelector": {"kind": name}, "hourlyPrice": hourly_price,
    }))
    .unwrap()
}

impl Observed {
    pub(crate) fn pod(mut self, name: &str, change: impl FnOnce(&mut PodView)) -> Self {
        let mut pod = PodView {
            name: name.to_owned(),
            uid: name.to_owned(),
            pool: "spot".to_owned(),
            node: Some("n1".to_owned()),
            started: true,
            scheduled_at_ms: Some(NOW - 60_000),
            share: 1.0,
            ..PodView::default()
        };
        change(&mut pod);
        self.names.insert(name.to_owned());
        self.pods.push(pod);
        self
    }

    pub(crate) fn ended(self, name: &str, end: End) -> Self {
        self.pod(name, |pod| pod.ended = Some(end))
    }

    pub(crate) fn rank(self, pod: &str, change: impl FnOnce(&mut RankView)) -> Self {
        let mut rank =
            RankView { connected: true, prepared: true, leaving: false, released: false, blocked: None, held_up: None };
        change(&mut rank);
        self.reported(|report| {
            report.ranks.insert(pod.to_owned(), rank);
        })
    }

    pub(crate) fn reported(mut self, change: impl FnOnce(&mut Report)) -> Self {
        change(self.report.get_or_insert_default());
        self
    }

    pub(crate) fn spec(mut self, change: impl FnOnce(&mut VicunaTraining)) -> Self {
        change(Arc::make_mut(&mut self.training));
        self.pools = Pool::of(&self.training.spec.pools);
        self
    }
}

/// Pods in these pools, which all train.
pub(crate) fn steady(pools: &[&str]) -> Observed {
    let mut seen = observed().reported(|report| {
        report.phase = Phase::Steady;
        report.generation = 1;
        report.progress = Some(step_report(10));
    });
    for (index, pool) in pools.iter().enumerate() {
        let name = format!("t-{pool}-{index}");
        seen = seen.pod(&name, |pod| pod.pool = (*pool).to_owned()).rank(&name, |_| {}).reported(|report| {
            report.members.push(Member {
                pod_uid: name.clone(),
                pod_name: name.clone(),
                node: "n1".into(),
                address: "a".into(),
            });
        });
    }
    seen
}

pub(crate) fn created(plan: &Plan) -> Vec<(String, usize)> {
    let create = |action: &Action| match action {
        Action::CreatePod { name, pool, .. } => Some((name.clone(), *pool)),
        _ => None,
    };
    plan.actions.iter().filter_map(create).collect()
}

pub(crate) fn deleted(plan: &Plan) -> Vec<String> {
    let delete = |action: &Action| match action {
        Action::DeletePod { name, .. } => Some(name.clone()),
        _ => None,
    };
    plan.actions.iter().filter_map(delete).collect()
}

fn notice(hurry: bool) -> Departure {
    Departure { source: "spot-itn".into(), deadline_ms: NOW + 30_000, hurry, reclaim: hurry }
}

fn failed(exit_code: i32) -> End {
    End { exit_code: Some(exit_code), reason: "Error".into(), ..End::default() }
}

#[test]
fn missing_pods_are_made_in_the_first_pool_with_room() {
    let both = || observed().spec(|training| training.spec.workers.min = 2);
    let plan_ = plan(&both(), NOW);
    assert_eq!(created(&plan_), [("t-spot-0".into(), 0), ("t-spot-1".into(), 0)]);
    let limited = both().spec(|training| training.spec.pools[0].max = Some(1));
    assert_eq!(created(&plan(&limited, NOW)), [("t-spot-0".into(), 0), ("t-onprem-1".into(), 1)]);
    assert!(plan_.actions.contains(&Action::Prepare { min_available: 2 }));
}

#[test]
fn a_pod_on_a_noticed_node_is_replaced_at_once_under_another_name() {
    let seen = observed().pod("t-spot-0", |pod| pod.departure = Some(notice(true))).pod("t-spot-1", |_| {});
    let plan = plan(&seen, NOW);
    assert_eq!(created(&plan), [("t-spot-2".into(), 0)]);
    assert!(deleted(&plan).is_empty(), "its rank still writes its checkpoint");
}

#[test]
fn a_pod_that_cannot_be_deleted_blocks_nobody() {
    let seen = observed().pod("t-spot-0", |pod| pod.deleting = true).pod("t-spot-1", |_| {});
    assert_eq!(created(&plan(&seen, NOW)), [("t-spot-2".into(), 0)]);
}

#[test]
fn a_stocked_out_pool_is_passed_over() {
    let stuck = |since_ms| {
        observed().pod("t-spot-0", |_| {}).pod("t-spot-1", |pod| {
            pod.trouble = Some(Trouble::Unschedulable { since_ms, message: "0/3 nodes".into() });
            pod.node = None;
        })
    };
    let waiting = plan(&stuck(NOW - 59_000), NOW);
    assert!(deleted(&waiting).is_empty() && created(&waiting).is_empty());
    assert_eq!(waiting.look_again, Duration::from_secs(1));
    let moved = plan(&stuck(NOW - 60_000), NOW);
    assert_eq!(deleted(&moved), ["t-spot-1"]);
    assert_eq!(created(&moved), [("t-onprem-2".into(), 1)]);
    assert!(moved.stocked_out.contains("spot"));
    let mut nowhere = stuck(NOW - 60_000);
    nowhere.stocked_out.insert("onprem".into());
    assert!(deleted(&plan(&nowhere, NOW)).is_empty(), "a pending pod is what an autoscaler acts on");
}

#[test]
fn a_reclaim_never_spends_a_retry() {
    let ends = [
        End { with_its_node: true, exit_code: Some(137), ..End::default() },
        End { succeeded: true, exit_code: Some(0), ..End::default() },
        End { exit_code: Some(143), ..End::default() },
    ];
    for end in ends {
        let plan = plan(&observed().ended("t-spot-0", end).pod("t-spot-1", |_| {}), NOW);
        assert_eq!((plan.memory.restarts.clone(), plan.memory.mishaps), (Restarts::default(), 0));
        assert_eq!(created(&plan).len(), 1, "it is replaced without delay");
    }
    let noticed = observed().pod("t-spot-0", |pod| {
        pod.ended = Some(failed(1));
        pod.departure = Some(notice(true));
    });
    assert_eq!(plan(&noticed, NOW).memory.restarts, Restarts::default());
}

#[test]
fn an_application_failure_spends_one_retry_and_waits() {
    let seen = observed().ended("t-spot-0", failed(1)).ended("t-spot-1", failed(1));
    let first = plan(&seen, NOW);
    assert_eq!(first.memory.restarts.application, 1, "ranks that fail together are one incident");
    assert!(created(&first).is_empty());
    assert_eq!(deleted(&first).len(), 2);
    let again = Observed { memory: first.memory.clone(), ..seen };
    assert_eq!(plan(&again, NOW + 60_000).memory.restarts.application, 1, "each pod counts once");
    let replaced = Observed { memory: first.memory, ..observed() };
    assert_eq!(created(&plan(&replaced, NOW + 5_000)).len(), 1);
}

#[test]
fn without_progress_the_training_is_given_up_and_stays_so() {
    let mut memory = Memory::default();
    for attempt in 0..4u64 {
        let now = NOW + attempt * 600_000;
        let seen = Observed { memory, ..observed() }.ended(&format!("t-spot-{attempt}"), failed(1));
        let plan = plan(&seen, now);
        memory = plan.memory.clone();
        let status = status(&seen, &plan, &Applied::default(), now);
        assert_eq!(status.state == Some(TrainingState::Failed), attempt == 3, "{attempt}");
        if attempt == 3 {
            assert!(is_terminal(&status));
            let later = seen.spec(|training| training.status = Some(status.clone()));
            let plan = super::plan::plan(&later, now + 1);
            assert!(created(&plan).is_empty());
            assert_eq!(super::status::status(&later, &plan, &Applied::default(), now + 1), status);
        }
    }
}

#[test]
fn progress_fills_the_budget_up_again() {
    let spent = Spent { application: 3, infrastructure: 2, out_of_memory: 1 };
    let restarts = Restarts { application: 7, spent, ..Restarts::default() };
    let memory = Memory { restarts, step_at_failure: 10, ..Memory::default() };
    let at = |step: u64| {
        let seen = Observed { memory: memory.clone(), ..observed() };
        seen.reported(|report| report.progress = Some(step_report(step)))
    };
    assert_eq!(plan(&at(10), NOW).memory.restarts.spent, spent);
    let refilled = plan(&at(11), NOW).memory.restarts;
    assert_eq!((refilled.application, refilled.spent), (7, Spent::default()));
}

pub(crate) fn step_report(step: u64) -> StepReport {
    StepReport {
        generation: 1,
        step,
        steps: 100,
        epoch: 0.1,
        loss: Some(2.0),
        learning_rate: 1e-5,
        tokens: 100,
        step_seconds: 2.0,
    }
}

#[test]
fn what_a_person_can_put_right_outside_spends_no_retry() {
    for cause in [Cause::Store, Cause::Model, Cause::Data] {
        let failure = RankFailure { cause, message: "no".into(), step: 0 };
        let seen = observed()
            .ended("t-spot-0", failed(1))
            .reported(|report| drop(report.failures.insert("t-spot-0".into(), failure)));
        let plan = plan(&seen, NOW);
        assert_eq!((plan.memory.restarts.spent, plan.memory.restarts.storage), (Spent::default(), 1), "{cause:?}");
        assert!(plan.memory.backoff_until_ms > NOW);
    }
    let unheard = plan(&observed().ended("t-spot-0", failed(21)), NOW);
    assert_eq!(unheard.memory.restarts.storage, 1, "the exit code says Store");
}

#[test]
fn each_cause_has_its_budget_and_its_own_words() {
    let oom = End { exit_code: Some(137), reason: "OOMKilled".into(), ..End::default() };
    let out = plan(&observed().ended("t-spot-0", oom), NOW);
    assert_eq!(out.memory.restarts.spent, Spent { out_of_memory: 1, ..Spent::default() });
    assert!(out.memory.last_failure.unwrap().message.contains("raise workers.resources"));
    let evicted = End { reason: "Evicted".into(), ..End::default() };
    let evicted = plan(&observed().ended("t-spot-0", evicted), NOW);
    assert_eq!(evicted.memory.restarts.spent, Spent { infrastructure: 1, ..Spent::default() });
    assert_eq!(evicted.faulty_nodes, ["n1".to_owned()].into());
}

#[test]
fn a_budget_of_none_gives_the_training_up_at_the_first_failure_of_its_kind() {
    let oom = End { exit_code: Some(137), reason: "OOMKilled".into(), ..End::default() };
    let seen = observed().ended("t-spot-0", oom).spec(|training| training.spec.retries.out_of_memory = 0);
    assert_eq!(plan(&seen, NOW).memory.verdict.unwrap().0, "OutOfMemory");
    let seen = observed().ended("t-spot-0", failed(26)).spec(|training| training.spec.retries.out_of_memory = 0);
    assert_eq!(plan(&seen, NOW).memory.verdict, None);
}

#[test]
fn numbers_that_are_not_finite_end_the_training_and_name_the_last_good_checkpoint() {
    let seen = observed().ended("t-spot-0", failed(25)).reported(|report| {
        let uri = "s3://bucket/run/manifests/7".to_owned();
        report.checkpoint =
            Some(CheckpointReport { step: 40, uri, digest: "d".into(), at_ms: 1, ..Default::default() });
    });
    let (reason, message) = plan(&seen, NOW).memory.verdict.unwrap();
    assert_eq!(reason, "LossNotFinite");
    assert!(message.contains("step 40, s3://bucket/run/manifests/7"), "{message}");
}

#[test]
fn the_first_generation_starts_and_later_ones_recover() {
    let state = |steps: Option<u64>| {
        let seen = observed().pod("t-spot-0", |_| {}).reported(|report| {
            report.phase = Phase::Moving;
            report.generation = 1;
            report.progress = steps.map(step_report);
        });
        told(&seen).state
    };
    assert_eq!(state(None), Some(TrainingState::Starting));
    assert_eq!(state(Some(3)), Some(TrainingState::Recovering));
}

#[test]
fn surplus_pods_go_but_ranks_that_train_are_sent_home_by_the_coordinator() {
    let seen = observed()
        .pod("t-spot-0", |_| {})
        .pod("t-spot-1", |_| {})
        .pod("t-spot-2", |pod| pod.started = false)
        .rank("t-spot-0", |_| {})
        .rank("t-spot-1", |_| {})
        .spec(|training| training.spec.workers.max = 1);
    assert_eq!(deleted(&plan(&seen, NOW)), ["t-spot-2"]);
}

#[test]
fn of_pods_that_do_nothing_yet_those_of_the_least_preferred_pool_go_first() {
    let seen = observed()
        .pod("t-onprem-0", |pod| pod.pool = "onprem".into())
        .pod("t-spot-1", |_| {})
        .pod("t-spot-2", |_| {})
        .spec(|training| training.spec.workers.max = 2);
    assert_eq!(deleted(&plan(&seen, NOW)), ["t-onprem-0"]);
}

#[test]
fn hung_and_released_pods_are_replaced() {
    let seen = observed()
        .pod("t-spot-0", |_| {})
        .pod("t-spot-1", |_| {})
        .rank("t-spot-1", |rank| rank.released = true)
        .reported(|report| report.unresponsive = ["t-spot-0".to_owned()].into());
    let plan = plan(&seen, NOW);
    assert_eq!(deleted(&plan), ["t-spot-0"]);
    assert_eq!(created(&plan).len(), 1);
}

#[test]
fn a_suspended_training_keeps_its_pods_until_the_coordinator_has_stopped() {
    let suspended = |phase| {
        let seen = observed().pod("t-spot-0", |_| {}).rank("t-spot-0", |_| {});
        seen.spec(|training| training.spec.suspend = true).reported(|report| report.phase = phase)
    };
    assert!(deleted(&plan(&suspended(Phase::Collecting), NOW)).is_empty());
    let stopped = plan(&suspended(Phase::Stopped), NOW);
    assert_eq!(deleted(&stopped), ["t-spot-0"]);
    assert!(created(&stopped).is_empty());
}

fn reason<'a>(status: &'a VicunaTrainingStatus, kind: &str) -> (&'a str, &'a str, &'a str) {
    let condition = status.conditions.iter().find(|it| it.type_ == kind).unwrap();
    (&condition.status, &condition.reason, &condition.message)
}

fn told(seen: &Observed) -> VicunaTrainingStatus {
    status(seen, &plan(seen, NOW), &Applied::default(), NOW)
}

#[test]
fn each_obstacle_has_its_reason_and_says_what_to_do() {
    let store = |message: &str| {
        let blockage = Blockage { cause: Cause::Store, message: message.into() };
        observed().pod("t-spot-0", |_| {}).rank("t-spot-0", |rank| {
            rank.prepared = false;
            rank.blocked = Some(blockage);
        })
    };
    let trouble = |trouble: Trouble| {
        observed().pod("t-spot-0", |pod| {
            pod.started = false;
            pod.trouble = Some(trouble);
        })
    };
    let cases = [
        (store("the bucket of s3://b/x does not exist: create it"), "BucketMissing", "create it"),
        (store("the store refused the credentials for s3://b"), "CredentialsRefused", "credentials"),
        (store("the store of s3://b/x is full (QuotaExceeded): raise the quota"), "StoreFull", "raise the quota"),
        (store("the store of s3://b cannot be reached (x): check"), "StoreUnreachable", "check"),
        (
            trouble(Trouble::Unschedulable { since_ms: NOW, message: "0/3 nodes are available.".into() }),
            "Unschedulable",
            "Add nodes",
        ),
        (
            trouble(Trouble::ImagePull { image: "runtime:x".into(), message: "not found".into() }),
            "ImagePullFailed",
            "runtime:x",
        ),
        (
            trouble(Trouble::Configuration { message: "secret \"store\" not found".into() }),
            "PodMisconfigured",
            "Create the Secret store",
        ),
    ];
    for (seen, expected, advice) in cases {
        let status = told(&seen);
        let (holds, reason, message) = reason(&status, "Progressing");
        assert_eq!((holds, reason), ("False", expected));
        assert!(message.contains(advice), "{message}");
        assert_eq!(status.state, Some(TrainingState::Blocked));
        assert_eq!(status.restarts.unwrap().application, 0);
    }
}

#[test]
fn a_running_training_shows_numbers_and_members() {
    let member =
        |pod: &str| Member { pod_uid: pod.into(), pod_name: pod.into(), node: "n".into(), address: "a".into() };
    let seen =
        observed().pod("t-spot-0", |_| {}).pod("t-onprem-1", |pod| pod.pool = "onprem".into()).reported(|report| {
            report.phase = Phase::Steady;
            report.generation = 3;
            report.members = vec![member("t-spot-0"), member("t-onprem-1")];
            report.progress = Some(step_report(40));
            report.disruptions.reclaims = 1;
            report.disruptions.last_recovery_ms = Some(7_300);
        });
    let status = told(&seen);
    assert_eq!(status.state, Some(TrainingState::Running));
    assert_eq!(status.ready_max.as_deref(), Some("2/2"));
    let progress = status.progress.clone().unwrap();
    assert_eq!((progress.step_of.as_deref(), progress.tokens_per_second), (Some("40/100"), Some(50.0)));
    assert_eq!(status.membership.clone().unwrap().pools.len(), 2);
    assert_eq!(status.disruptions.clone().unwrap().last_recovery.unwrap().to_string(), "7s300ms");
    assert_eq!(reason(&status, "Running").0, "True");
    assert_eq!(reason(&status, "Finished").0, "False");
    let text = serde_json::to_value(&status).unwrap();
    assert_eq!(serde_json::from_value::<VicunaTrainingStatus>(text).unwrap(), status);
}

#[test]
fn a_new_leader_leaves_the_status_until_it_knows() {
    let running = VicunaTrainingStatus { state: Some(TrainingState::Running), ..Default::default() };
    let known = |phase| {
        let seen = observed().spec(|training| training.status = Some(running.clone()));
        told(&seen.reported(|report| report.phase = phase))
    };
    assert_eq!(known(Phase::Adopting), running);
    assert_eq!(known(Phase::Collecting).state, Some(TrainingState::Pending));
}

#[test]
fn workers_that_have_too_little_memory_are_said_with_the_numbers() {
    let need = |ranks: u32, fits: bool| MemoryNeed {
        ranks,
        host_bytes: 96_000_000_000 / u64::from(ranks),
        device_bytes: 0,
        fits,
    };
    let seen = observed().spec(|training| (training.spec.workers.min, training.spec.workers.max) = (1, 4)).reported(
        |report| report.memory = vec![need(1, false), need(2, false), need(3, true), need(4, true), need(5, true)],
    );
    let remedy = |settings: &str, ranks| Remedy { settings: settings.to_owned(), ranks };
    let seen = seen.reported(|report| {
        report.remedies = vec![remedy("recipe.maxLength to 512", 2), remedy("recipe.method to LoRA", 1)];
    });
    let told = status(&seen, &plan(&seen, NOW), &Applied::default(), NOW);
    let shown: Vec<_> = told.memory.iter().map(|size| (size.workers, size.host.as_str(), size.fits)).collect();
    assert_eq!(shown, [(1, "96.0 GB", false), (2, "48.0 GB", false), (3, "32.0 GB", true), (4, "24.0 GB", true)]);
    let admitted = told.conditions.iter().find(|condition| condition.type_ == "Admitted").unwrap();
    assert_eq!((admitted.status.as_str(), admitted.reason.as_str()), ("False", "DoesNotFit"));
    assert!(
        admitted.message.contains("96.0 GB") && admitted.message.contains("set workers.min to 3"),
        "{}",
        admitted.message
    );
    let advice = ", or set recipe.method to LoRA, or set recipe.maxLength to 512 with at least 2 workers.";
    assert!(admitted.message.ends_with(advice), "{}", admitted.message);
    let enough = seen.spec(|training| training.spec.workers.min = 3);
    let told = status(&enough, &plan(&enough, NOW), &Applied::default(), NOW);
    assert_eq!(told.conditions.iter().find(|condition| condition.type_ == "Admitted").unwrap().status, "True");
}

#[test]
fn the_held_out_loss_stays_shown_under_a_new_leader() {
    let trained = observed().pod("t-spot-0", |_| {}).reported(|report| {
        report.phase = Phase::Steady;
        report.progress = Some(step_report(10));
        report.evaluation = Some(EvaluationReport { step: 8, loss: 1.5 });
    });
    let shown = |seen: &Observed| {
        let progress = status(seen, &plan(seen, NOW), &Applied::default(), NOW).progress.unwrap();
        (progress.evaluation_step, progress.evaluation_loss)
    };
    assert_eq!(shown(&trained), (Some(8), Some(1.5)));
    let mut later = trained.reported(|report| report.evaluation = None);
    std::sync::Arc::make_mut(&mut later.training).status = Some(VicunaTrainingStatus {
        progress: Some(vicuna_crds::training::Progress {
            evaluation_step: Some(8),
            evaluation_loss: Some(1.5),
            ..Default::default()
        }),
        ..VicunaTrainingStatus::default()
    });
    assert_eq!(shown(&later), (Some(8), Some(1.5)));
}

#[test]
fn the_result_ends_the_training() {
    let finish = Finish { step: 100, uri: "s3://bucket/run/result".into(), digest: "d".into(), loss: 1.0 };
    let seen = observed().pod("t-spot-0", |_| {}).reported(|report| {
        report.phase = Phase::Finished;
        report.finish = Some(finish);
    });
    let plan = plan(&seen, NOW);
    assert_eq!(deleted(&plan), ["t-spot-0"]);
    let status = status(&seen, &plan, &Applied::default(), NOW);
    assert_eq!(status.state, Some(TrainingState::Complete));
    assert_eq!(reason(&status, "Finished").0, "True");
    assert_eq!(status.result.unwrap().uri, "s3://bucket/run/result");
}

#[test]
fn progress_is_written_now_and_then_and_changes_at_once() {
    let base = VicunaTrainingStatus::default();
    let with_step = |step| VicunaTrainingStatus {
        progress: Some(vicuna_crds::training::Progress { step, ..Default::default() }),
        ..base.clone()
    };
    let written = (with_step(1), NOW);
    assert_eq!(when_to_write(&with_step(1), Some(&written), NOW + 60_000), Write::No);
    let after = when_to_write(&with_step(2), Some(&written), NOW + 5_000);
    assert_eq!(after, Write::After(Duration::from_secs(10)));
    let due = NOW + u64::try_from(WRITE_EVERY.as_millis()).unwrap();
    assert_eq!(when_to_write(&with_step(2), Some(&written), due), Write::Now);
    let changed = VicunaTrainingStatus { state: Some(TrainingState::Running), ..with_step(2) };
    assert_eq!(when_to_write(&changed, Some(&written), NOW + 1), Write::Now);
    assert_eq!(when_to_write(&base, None, NOW), Write::Now);
}

#[test]
fn the_last_status_is_written_once_however_late_the_cache_shows_it() {
    let result = Finish { step: 100, uri: "s3://bucket/run/result".into(), digest: "d".into(), loss: 1.0 };
    let seen = steady(&["spot"]).reported(|report| report.finish = Some(result));
    let ended = told(&seen);
    assert!(is_terminal(&ended));
    // The cache shows the training as it was before that.
    let behind = Observed { memory: Memory { ended: Some(ended.clone()), ..Memory::default() }, ..seen };
    let later = NOW + 5_000;
    assert_eq!(status(&behind, &plan(&behind, later), &Applied::default(), later), ended);
}

#[test]
fn pods_are_seen_as_the_api_server_shows_them() {
    let pod = serde_json::from_value(json!({
        "metadata": {"name": "p", "uid": "u", "labels": {"vicuna.dev/pool": "spot"}},
        "spec": {"containers": [], "nodeName": "n1"},
        "status": {
            "phase": "Failed",
            "containerStatuses": [{
                "name": "trainer", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
            }],
        },
    }))
    .unwrap();
    let view = super::observe::pod_view(&pod, None, false);
    let end = view.ended.unwrap();
    assert_eq!((end.exit_code, end.reason.as_str(), end.with_its_node), (Some(137), "OOMKilled", false));
    assert!(super::observe::pod_view(&pod, None, true).ended.unwrap().with_its_node);
    let waiting = serde_json::from_value(json!({
        "metadata": {"name": "p"},
        "spec": {"containers": []},
        "status": {"phase": "Pending", "containerStatuses": [{
            "name": "trainer", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"waiting": {"reason": "CreateContainerConfigError", "message": "secret \"store\" not found"}},
        }]},
    }))
    .unwrap();
    let view = super::observe::pod_view(&waiting, None, false);
    assert!(matches!(view.trouble, Some(Trouble::Configuration { .. })) && !view.started);
}

#[test]
fn a_pod_that_waits_for_what_was_corrected_is_made_anew_and_costs_no_retry() {
    let image = || Trouble::ImagePull { image: "wrong".to_owned(), message: "not found".to_owned() };
    let waiting = |outdated| {
        observed().pod("t-spot-0", move |pod| {
            pod.started = false;
            pod.trouble = Some(image());
            pod.outdated = outdated;
        })
    };
    assert!(deleted(&plan(&waiting(false), NOW)).is_empty(), "nothing has been corrected");
    let plan_then = plan(&waiting(true), NOW);
    assert_eq!(deleted(&plan_then), ["t-spot-0"]);
    assert_eq!(plan_then.memory.restarts, Restarts::default());
    let running = observed().pod("t-spot-0", |pod| pod.outdated = true);
    assert!(deleted(&plan(&running, NOW)).is_empty(), "a rank that trains is left alone");
}

#[test]
fn a_pod_is_outdated_when_its_image_or_its_secret_is_another() {
    let (training, config) = (training("t"), crate::config::tests::sample());
    let pool = Pool::any_node();
    let none = BTreeSet::new();
    let place =
        super::build::pod::Place { pool: &pool, name: "t-any-0", replaces: None, avoided: &none, suspect: &none };
    let pod = super::build::pod::pod(&training, &config, &place).unwrap();
    let is_outdated = super::observe::is_outdated;
    assert!(!is_outdated(&pod, &config.runtime_image, &training));
    assert!(is_outdated(&pod, "runtime:corrected", &training));
    let mut corrected = training.clone();
    corrected.spec.checkpoint.credentials = None;
    assert!(is_outdated(&pod, &config.runtime_image, &corrected));
}

#[test]
fn a_training_keeps_the_image_that_made_its_first_step() {
    let seen = steady(&["spot"]);
    assert_eq!(told(&seen).image, None, "the pod's is not known");
    let mut seen = seen;
    seen.pods[0].image = Some("runtime:1".to_owned());
    let status = told(&seen);
    assert_eq!(status.image.as_deref(), Some("runtime:1"));
    let (mut training, mut config) = (training("t"), crate::config::tests::sample());
    config.runtime_image = "runtime:2".to_owned();
    let image = super::build::pod::image;
    assert_eq!(image(&training, &config), "runtime:2");
    training.status = Some(status);
    assert_eq!(image(&training, &config), "runtime:1", "whatever the operator was upgraded to");
}

#[test]
fn an_image_that_is_given_up_by_its_name_makes_way_for_the_operator_s() {
    let mut seen = steady(&["spot"]);
    seen.pods[0].image = Some("runtime:1".to_owned());
    let status = told(&seen);
    let mut config = crate::config::tests::sample();
    config.runtime_image = "runtime:2".to_owned();
    let mut training = (*seen.training).clone();
    training.status = Some(status);
    let give_up = |training: &mut VicunaTraining, image: &str| {
        let annotation = crate::config::GIVE_UP_IMAGE_ANNOTATION.to_owned();
        training.metadata.annotations.get_or_insert_default().insert(annotation, image.to_owned());
        super::build::pod::image(training, &config).to_owned()
    };
    let target = super::controller::target;
    assert_eq!(give_up(&mut training, "runtime:0"), "runtime:1", "another one was meant");
    assert!(!target(&training).any_class, "and opens nothing");
    seen.training = training.clone().into();
    let status = told(&seen);
    let (holds, why, said) = reason(&status, "Admitted");
    assert_eq!((holds, why), ("True", "NoSuchImageToGiveUp"));
    assert!(said.contains("names runtime:0") && said.contains("bound to runtime:1"), "{said}");

    assert_eq!(give_up(&mut training, "runtime:1"), "runtime:2");
    assert!(target(&training).any_class);
    seen.training = training.clone().into();
    let status = told(&seen);
    assert_eq!(status.image, None, "who trains with it still does not bring it back");
    assert_eq!(reason(&status, "Admitted").1, "Valid");
    training.status = Some(status);
    assert!(target(&training).any_class, "it is remembered what was given up");
    seen.training = training.into();
    seen.pods[0].image = Some("runtime:2".to_owned());
    assert_eq!(told(&seen).image.as_deref(), Some("runtime:2"));
}

#[test]
fn that_weights_are_not_exact_is_said_in_a_condition() {
    let mut seen = steady(&["spot"]);
    assert_eq!(reason(&told(&seen), "Admitted").1, "Valid");
    let mut training = (*seen.training).clone();
    training.spec.recipe.reproducibility = vicuna_crds::training::Reproducibility::Fast;
    seen.training = training.into();
    let status = told(&seen);
    let (holds, why, said) = reason(&status, "Admitted");
    assert_eq!((holds, why), ("True", "ValidButNotExact"));
    assert!(said.contains("reproducibility is Fast"), "{said}");
}

#[test]
fn a_checkpoint_that_waits_behind_the_training_is_a_condition() {
    let message = "the store of s3://b cannot be reached (x): check";
    let held_up = Some(Blockage { cause: Cause::Store, message: message.into() });
    let seen = steady(&["spot"]).rank("t-spot-0", |rank| rank.held_up = held_up);
    let status = told(&seen);
    assert_eq!(status.state, Some(TrainingState::Running));
    let (holds, why, said) = reason(&status, "Checkpointed");
    assert_eq!((holds, why), ("False", "StoreUnreachable"));
    assert!(said.starts_with("The training goes on;") && said.ends_with(message), "{said}");
}

#[test]
fn where_a_pod_is_and_why_it_is_there_is_seen() {
    let pod = serde_json::from_value(json!({
        "metadata": {"name": "p", "annotations": {"vicuna.dev/replaces": "old", "vicuna.dev/leave": "moved"}},
        "spec": {"containers": [], "nodeName": "n1"},
        "status": {
            "phase": "Failed",
            "conditions": [{"type": "PodScheduled", "status": "True", "lastTransitionTime": "1970-01-01T00:00:07Z"}],
            "containerStatuses": [{
                "name": "trainer", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"terminated": {"exitCode": 1, "finishedAt": "1970-01-01T00:00:09Z"}},
            }],
        },
    }))
    .unwrap();
    let view = super::observe::pod_view(&pod, None, false);
    assert_eq!((view.scheduled_at_ms, view.ended.unwrap().at_ms), (Some(7_000), Some(9_000)));
    assert!(view.asked_to_leave);
    assert_eq!(view.replaces.as_deref(), Some("old"));
    let gated = serde_json::from_value(json!({
        "metadata": {"name": "p"},
        "spec": {"containers": []},
        "status": {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]},
    }))
    .unwrap();
    assert_eq!(super::observe::pod_view(&gated, None, false).trouble, Some(Trouble::Gated));
}

#[test]
fn a_bad_node_is_avoided_only_where_its_pool_has_another() {
    let node = |name: &str, kind: &str| -> k8s_openapi::api::core::v1::Node {
        serde_json::from_value(json!({"metadata": {"name": name, "labels": {"kind": kind}}})).unwrap()
    };
    let nodes = [node("a", "spot"), node("b", "spot"), node("c", "onprem")];
    let nodes: Vec<_> = nodes.iter().collect();
    let pools = observed().pools;
    let alternative = |name: &str, leaving: &[&str]| {
        let leaving = leaving.iter().map(|name| (*name).to_owned()).collect();
        super::observe::has_alternative(name, &nodes, &leaving, &pools)
    };
    assert!(alternative("a", &[]) && !alternative("a", &["b"]));
    assert!(!alternative("c", &[]));
}

#[test]
fn a_pool_s_node_takes_a_pod_if_it_is_large_enough_and_no_taint_keeps_it_off() {
    let takes = |node: serde_json::Value, size: Size| {
        let pool = serde_json::from_value::<Pool>(json!({
            "name": "spot", "capacity": "Spot", "nodeSelector": {"kind": "spot"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
        }));
        super::observe::takes(&pool.unwrap(), &serde_json::from_value(node).unwrap(), size)
    };
    let node = |kind: &str, taint: &str, effect: &str| {
        json!({
            "metadata": {"name": "n", "labels": {"kind": kind}},
            "spec": {"taints": [{"key": taint, "effect": effect}]},
            "status": {"allocatable": {"cpu": "8", "memory": "16Gi"}},
        })
    };
    let size = Size { cpu_milli: 8_000, ..Size::default() };
    assert!(takes(node("spot", "gpu", "NoSchedule"), size));
    assert!(takes(node("spot", "other", "PreferNoSchedule"), size));
    assert!(!takes(node("spot", "other", "NoSchedule"), size));
    assert!(!takes(node("onprem", "gpu", "NoSchedule"), size));
    assert!(!takes(node("spot", "gpu", "NoSchedule"), Size { cpu_milli: 9_000, ..Size::default() }));
}

#[test]
fn what_was_had_and_what_it_cost_is_told() {
    let mut seen = steady(&["spot", "onprem"]);
    seen.pools[0].hourly_price = Some(3.6);
    let status = told(&seen);
    assert_eq!(status.worker_time.unwrap().held_seconds, 120);
    assert_eq!(status.cost.unwrap().pools, [("spot".to_owned(), 0.06)].into());
    assert_eq!(status.goodput, Some(0.333));
    assert_eq!(status.membership.unwrap().by_pool.as_deref(), Some("onprem 1, spot 1"));
    assert_eq!(status.progress.unwrap().remaining.unwrap().to_string(), "3m");
}

#[test]
fn a_move_that_finds_no_node_is_in_nobodys_way() {
    let seen = steady(&["spot", "onprem"]).pod("t-spot-2", |pod| {
        pod.replaces = Some("t-onprem-1".into());
        pod.node = None;
        pod.trouble = Some(Trouble::Unschedulable { since_ms: NOW, message: "0/3".into() });
    });
    let status = told(&seen);
    assert_eq!(reason(&status, "Progressing").1, "StepsAreMade");
    assert!(!reason(&status, "Progressing").2.contains("Unschedulable"), "{:?}", reason(&status, "Progressing"));
}
