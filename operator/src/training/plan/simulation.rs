//! Trainings that compete for too few nodes, with the real plan, a scheduler that hands nodes to pods in
//! any order, and virtual time.

use super::{Action, plan};
use crate::coordinator::membership::Millis;
use crate::coordinator::report::{Phase, Report};
use crate::training::known::{Claim, ClaimState};
use crate::training::memory::Memory;
use crate::training::observe::{Observed, PodView, Trouble};
use crate::training::tests::{observed, step_report, training};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use vicuna_crds::{Pool, VicunaTraining};

const SECOND: Millis = 1_000;

struct Contender {
    training: Arc<VicunaTraining>,
    memory: Memory,
    claim: Option<Claim>,
    pods: Vec<PodView>,
    /// Pods made so far.
    incarnation: u64,
    /// Seconds of training left; it is over at 0.
    work: u64,
}

impl Contender {
    fn new(index: usize, min: u32, forming_timeout: &str, work: u64) -> Self {
        let mut training = training(&format!("t{index}"));
        let created = format!("1970-01-01T00:{index:02}:00Z");
        training.metadata.creation_timestamp = serde_json::from_value(serde_json::json!(created)).unwrap();
        training.spec.workers.min = min;
        training.spec.workers.max = min;
        training.spec.pools.truncate(1);
        training.spec.placement.forming_timeout = forming_timeout.parse().unwrap();
        let training = Arc::new(training);
        Self { training, memory: Memory::default(), claim: None, pods: Vec::new(), incarnation: 0, work }
    }

    fn placed(&self) -> usize {
        self.pods.iter().filter(|pod| pod.node.is_some()).count()
    }

    fn trains(&self) -> bool {
        self.work > 0 && self.placed() >= self.training.spec.workers.min as usize
    }

    fn observed(&self, rivals: Vec<Claim>) -> Observed {
        let trained = self.trains();
        let report = Report {
            phase: if trained { Phase::Steady } else { Phase::Held },
            progress: trained.then(|| step_report(1)),
            ..Report::default()
        };
        Observed {
            training: self.training.clone(),
            pools: Pool::of(&self.training.spec.pools),
            pods: self.pods.clone(),
            names: self.pods.iter().map(|pod| pod.name.clone()).collect(),
            report: Some(report),
            rivals,
            memory: self.memory.clone(),
            ..observed()
        }
    }
}

struct World {
    random: StdRng,
    nodes: usize,
    now: Millis,
    contenders: Vec<Contender>,
}

impl World {
    fn new(seed: u64, nodes: usize, contenders: Vec<Contender>) -> Self {
        Self { random: StdRng::seed_from_u64(seed), nodes, now: 1_000_000, contenders }
    }

    /// `Err`: how many are left when the time is over.
    fn run(mut self, seconds: u64) -> Result<u64, usize> {
        for second in 0..seconds {
            if self.contenders.iter().all(|contender| contender.work == 0) {
                return Ok(second);
            }
            self.tick();
        }
        Err(self.contenders.iter().filter(|contender| contender.work > 0).count())
    }

    fn tick(&mut self) {
        self.now += SECOND;
        let mut order: Vec<usize> = (0..self.contenders.len()).collect();
        order.shuffle(&mut self.random);
        for index in order {
            // Some look later than others.
            if self.random.random_bool(0.7) {
                self.reconcile(index);
            }
        }
        self.schedule();
        for contender in &mut self.contenders {
            contender.work -= u64::from(contender.trains());
            if contender.work == 0 {
                contender.pods.clear();
                contender.claim = None;
            }
        }
    }

    fn schedule(&mut self) {
        let used: usize = self.contenders.iter().map(Contender::placed).sum();
        assert!(used <= self.nodes);
        let now = self.now;
        let mut waiting: Vec<&mut PodView> =
            self.contenders.iter_mut().flat_map(|it| &mut it.pods).filter(|pod| pod.node.is_none()).collect();
        waiting.shuffle(&mut self.random);
        for (position, pod) in waiting.into_iter().enumerate() {
            if position < self.nodes - used {
                pod.node = Some("n".to_owned());
                pod.trouble = None;
                pod.scheduled_at_ms = Some(now);
            } else if pod.trouble.is_none() {
                pod.trouble = Some(Trouble::Unschedulable { since_ms: now, message: "no node".to_owned() });
            }
        }
    }

    fn reconcile(&mut self, index: usize) {
        let now = self.now;
        let others = self.contenders.iter().enumerate().filter(|(other, _)| *other != index);
        let claims = others.filter_map(|(_, other)| other.claim.clone());
        let rivals = claims.filter(|claim| claim.state != ClaimState::Satisfied).collect();
        let contender = &mut self.contenders[index];
        if contender.work == 0 {
            return;
        }
        let plan = plan(&contender.observed(rivals), now);
        contender.memory = plan.memory;
        contender.claim = plan.claim;
        for action in plan.actions {
            match action {
                Action::CreatePod { .. } => {
                    contender.incarnation += 1;
                    let name = format!("p-{}", contender.incarnation);
                    let pool = "spot".to_owned();
                    contender.pods.push(PodView { uid: name.clone(), name, pool, ..PodView::default() });
                }
                Action::DeletePod { uid, .. } => contender.pods.retain(|pod| pod.uid != uid),
                _ => {}
            }
        }
    }
}

fn contenders(mins: &[u32], forming_timeout: &str) -> Vec<Contender> {
    mins.iter().enumerate().map(|(index, min)| Contender::new(index, *min, forming_timeout, 60)).collect()
}

#[test]
fn two_gangs_that_each_hold_a_half_are_both_trained_in_the_end() {
    for seed in 0..50 {
        let done = World::new(seed, 4, contenders(&[3, 3], "30s")).run(1_000);
        assert!(done.is_ok(), "seed {seed}: {done:?} are left");
    }
}

#[test]
fn without_the_timeout_they_would_starve_each_other() {
    let starved = |seed| World::new(seed, 4, contenders(&[3, 3], "100h")).run(1_000).is_err();
    assert!((0..50).any(starved), "the other tests prove nothing");
}

#[test]
fn ten_gangs_of_all_sizes_are_all_trained_in_the_end() {
    for seed in 0..50 {
        let mins = [4, 8, 3, 5, 6, 4, 7, 2, 8, 5];
        let done = World::new(seed, 8, contenders(&mins, "30s")).run(6_000);
        assert!(done.is_ok(), "seed {seed}: {done:?} are left");
    }
}

#[test]
fn the_oldest_that_fits_nowhere_blocks_nobody_for_ever() {
    for seed in 0..50 {
        let left = World::new(seed, 8, contenders(&[12, 5, 6, 4], "30s")).run(6_000);
        assert_eq!(left, Err(1), "seed {seed}");
    }
}
