//! One fault alone, with capacity left and the store up: what design.md promises of the time that it costs and of the steps.
//! How long things take that are simulated is in `ranks`: who is gone without a word is missed within keep-alives.

use super::ranks::{Made, STEP_MS};
use super::*;
use serde_json::Value;

/// Beyond the step's own length, from the last step before a fault to the first after it.
const BOUND_WITH_NOTICE_MS: u64 = 3_000;
const BOUND_WITHOUT_MS: u64 = 8_000;
const NOTICED_WITHIN_MS: u64 = 2_000;
const NOTICE_MS: u64 = 12_000;
const NOTICE_TEXT: &str = "12s";
const HOUR_MS: u64 = 3_600_000;

impl World {
    async fn tick(&mut self) {
        self.tend(false);
        if let Some(violation) = self.watchdog.violation() {
            self.fail(&violation);
        }
        tokio::time::sleep(TICK).await;
    }

    fn now(&self) -> u64 {
        self.server.store().now_ms()
    }

    async fn until(&mut self, what: &str, within_ms: u64, reached: impl Fn(&Self) -> bool) {
        let limit = self.now() + within_ms;
        while !reached(self) {
            if self.now() >= limit {
                self.fail(&format!("not within {within_ms} ms: {what}"));
            }
            self.tick().await;
        }
    }

    /// All workers that there may be train, and have for some steps.
    async fn until_all_train(&mut self) {
        let all = |world: &Self| world.ranks.nodes_that_train().len() == WORKERS_MAX;
        self.until("all workers train", 300_000, all).await;
        let steps = self.ranks.made.len() + 8;
        self.until("steps are made", 60_000, |world| world.ranks.made.len() >= steps).await;
        // At any moment of a step.
        let moment = self.random.between(0, STEP_MS);
        self.pass(moment).await;
    }

    async fn pass(&mut self, ms: u64) {
        let end = self.now() + ms;
        while self.now() < end {
            self.tick().await;
        }
    }

    /// A node whose rank trains.
    fn any_node(&mut self) -> String {
        let nodes = self.ranks.nodes_that_train();
        self.random.pick(&nodes).cloned().expect("ranks train")
    }

    fn events(&self, reason: &str) -> usize {
        self.server.store().objects("Event").filter(|(_, event)| event["reason"] == reason).count()
    }

    fn status(&self, path: &str) -> Value {
        let store = self.server.store();
        let training = store.find("VicunaTraining", NAMESPACE, NAME);
        training.and_then(|training| training["status"].pointer(path).cloned()).unwrap_or_default()
    }

    /// From the last step of the present generation to the first of the next that makes one.
    async fn gap_after(&mut self) -> u64 {
        let generation = self.ranks.made.last().map_or(0, |made| made.generation);
        let goes_on = |world: &Self| world.ranks.made.last().is_some_and(|made| made.generation > generation);
        self.until("another generation makes a step", 120_000, goes_on).await;
        let (before, after): (Vec<Made>, Vec<Made>) =
            self.ranks.made.iter().partition(|it| it.generation <= generation);
        assert_eq!(after[0].step, before[before.len() - 1].step + 1, "no step is lost");
        after[0].at - before[before.len() - 1].at
    }
}

/// Worlds in which nothing goes wrong by itself, one for each seed.
fn play(usual: u64, scene: impl AsyncFn(&mut World)) {
    for seed in seeds(usual).take(usual as usize) {
        let _reproduce = Reproduce(format!("seed {seed}"), seed);
        fastrand::seed(seed);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.expect("a runtime without I/O needs nothing").block_on(async {
            let mut world = World::new(seed);
            world.network.set_trouble(false);
            // Notices end well before the training does.
            let mut pools = market::pools();
            pools[0]["notice"] = json!(NOTICE_TEXT);
            world.ask_for(false, WORKERS_MIN as u64, WORKERS_MAX as u64, &pools);
            scene(&mut world).await;
        });
    }
}

/// What the worst of some seeds took beyond a step's length, which each keeps below `bound_ms`.
fn recover(what: &str, bound_ms: u64, fault: impl Fn(&mut World, &str)) {
    let worst = std::cell::Cell::new(0);
    play(40, async |world| {
        world.until_all_train().await;
        let node = world.any_node();
        fault(world, &node);
        let beyond = world.gap_after().await.saturating_sub(STEP_MS);
        if beyond > bound_ms {
            world.fail(&format!("{what}: {beyond} ms beyond the step's length"));
        }
        worst.set(worst.get().max(beyond));
        let told = world.status("/disruptions/lostSteps");
        assert!(told.as_u64().unwrap_or_default() == 0, "{told} steps are said to be lost");
    });
    println!("{what}: at worst {} ms beyond the step's length", worst.get());
}

#[test]
fn with_notice_the_next_step_comes_within_three_seconds_of_its_time() {
    recover("a node that is noticed to go", BOUND_WITH_NOTICE_MS, |world, node| {
        world.market.notice(&mut world.server.store(), node, NOTICE_MS, None);
    });
}

#[test]
fn without_a_word_the_next_step_comes_within_eight_seconds_of_its_time() {
    recover("a machine that is gone", BOUND_WITHOUT_MS, |world, node| {
        let now = world.now();
        world.market.die(node, now, 40_000);
    });
    recover("a process that crashes", BOUND_WITHOUT_MS, |world, node| {
        world.ranks.crash_on(node, &world.watchdog);
    });
    recover("a rank that hangs with its stream open", BOUND_WITHOUT_MS, |world, node| world.ranks.hang_on(node));
}

#[test]
fn every_rank_hears_of_a_notice_within_two_seconds_of_the_taint() {
    play(40, async |world| {
        world.until_all_train().await;
        let node = world.any_node();
        let tainted = world.now();
        world.market.notice(&mut world.server.store(), &node, NOTICE_MS, None);
        world.pass(NOTICED_WITHIN_MS).await;
        let heard = world.ranks.heard_of_notice(&node);
        assert_eq!(heard.len(), WORKERS_MAX);
        let in_time = |at: &Option<u64>| at.is_some_and(|at| at <= tainted + NOTICED_WITHIN_MS);
        assert!(heard.iter().all(in_time), "{heard:?} after the taint at {tainted}");
    });
}

#[test]
fn two_machines_at_once_cost_no_more_steps_than_the_last_checkpoint_is_old() {
    let lost = std::cell::Cell::new(0);
    play(30, async |world| {
        world.until_all_train().await;
        let nodes: Vec<String> = world.ranks.nodes_that_train().into_iter().take(2).collect();
        let now = world.now();
        let before = world.ranks.made.last().map_or(0, |made| made.step);
        let age = before - world.bucket.newest_first().first().map_or(0, |manifest| manifest.step);
        nodes.iter().for_each(|node| world.market.die(node, now, 40_000));
        let generation = world.ranks.made.last().map_or(0, |made| made.generation);
        let goes_on = |world: &World| world.ranks.made.last().is_some_and(|made| made.generation > generation);
        world.until("the others go on", 120_000, goes_on).await;
        let again = world.ranks.made.last().map_or(0, |made| (before + 1).saturating_sub(made.step));
        assert!(again <= age, "{again} steps are made again, and the checkpoint was {age} old");
        lost.set(lost.get() + again);
    });
    assert!(lost.get() > 0, "owner and twin were never lost together");
}

#[test]
fn a_store_that_is_away_for_an_hour_costs_the_checkpoints_freshness_alone() {
    play(1, async |world| {
        world.ranks.step_ms = HOUR_MS / 30;
        let checkpointed = |world: &World| !world.bucket.newest_first().is_empty();
        world.until("a first checkpoint", 2 * HOUR_MS, checkpointed).await;
        let (now, before) = (world.now(), world.ranks.made.len());
        world.bucket.goes_away(now + HOUR_MS);
        world.pass(HOUR_MS).await;
        let made = world.ranks.made.len() - before;
        assert!(made >= 28, "only {made} steps in an hour of 30");
        assert_eq!(world.events("CheckpointHeldUp"), 1);
        let state = |world: &World| {
            let store = world.server.store();
            let training = store.find("VicunaTraining", NAMESPACE, NAME).cloned().unwrap_or_default();
            condition(&training["status"], "Checkpointed").map(str::to_owned)
        };
        assert_eq!(state(world).as_deref(), Some("False"));
        world.until("a checkpoint again", 600_000, |world| state(world).as_deref() == Some("True")).await;
        world.until("the end", 2 * HOUR_MS, World::is_over).await;
        assert_eq!(world.ranks.made.len() as u64, STEPS, "each step is made once");
    });
}
