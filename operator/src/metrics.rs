//! The operator's metrics: one inventory, base units, labels bounded by the number of objects.

use prometheus::core::Collector;
use prometheus::{GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder};
use std::time::Duration;
use vicuna_crds::training::VicunaTrainingStatus;

/// Training and serving objects are told apart by these.
const OBJECT: [&str; 2] = ["namespace", "name"];
const PHASE: [&str; 3] = ["namespace", "name", "phase"];
const SERVING: [&str; 3] = ["namespace", "name", "state"];
const CONTROLLER: [&str; 1] = ["controller"];
/// Pools of one object are at most 16.
const POOL: [&str; 3] = ["namespace", "name", "pool"];
/// `application`, `infrastructure`, `outOfMemory`, `hang` or `storage`.
const CAUSE: [&str; 3] = ["namespace", "name", "cause"];

/// Clone of handles: all write to one registry.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    pub training_step: IntGaugeVec,
    pub training_steps: IntGaugeVec,
    pub training_loss: GaugeVec,
    pub training_evaluation_loss: GaugeVec,
    pub training_checkpoint_stall_seconds: GaugeVec,
    pub training_tokens_per_second: GaugeVec,
    pub training_ranks: IntGaugeVec,
    pub training_generation: IntGaugeVec,
    pub training_goodput: GaugeVec,
    pub training_held_seconds: GaugeVec,
    pub training_advanced_seconds: GaugeVec,
    pub training_remaining_seconds: GaugeVec,
    pub training_cost: GaugeVec,
    pub training_on_demand_cost: GaugeVec,
    pub training_pool_ranks: IntGaugeVec,
    pub training_restarts: IntGaugeVec,
    pub notices: IntCounterVec,
    pub reclaims: IntCounterVec,
    pub lost_steps: IntCounterVec,
    pub recovery_seconds: HistogramVec,
    /// Of the last recovery; `phase` is `detect`, `agree`, `restore` or `step`.
    pub recovery_phase_seconds: GaugeVec,
    /// `state` is `desired` or `ready`.
    pub serving_replicas: IntGaugeVec,
    pub serving_hourly_price: GaugeVec,
    pub reconciles: IntCounterVec,
    pub errors: IntCounterVec,
    pub reconcile_seconds: HistogramVec,
}

impl Metrics {
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let made = Self {
            training_step: int_gauge("training_step", "Last step that was applied", &OBJECT)?,
            training_steps: int_gauge("training_steps", "Steps in the whole run", &OBJECT)?,
            training_loss: gauge("training_loss", "Mean loss per trained token of the last step", &OBJECT)?,
            training_evaluation_loss: gauge(
                "training_evaluation_loss",
                "Mean loss per token of the held-out conversations at the last evaluation",
                &OBJECT,
            )?,
            training_checkpoint_stall_seconds: gauge(
                "training_checkpoint_stall_seconds",
                "For how long the last checkpoint held up the training",
                &OBJECT,
            )?,
            training_tokens_per_second: gauge(
                "training_tokens_per_second",
                "Tokens of the last step by the time that it took",
                &OBJECT,
            )?,
            training_ranks: int_gauge("training_ranks", "Ranks that train", &OBJECT)?,
            training_generation: int_gauge("training_generation", "Number of the set of ranks that trains", &OBJECT)?,
            training_goodput: gauge(
                "training_goodput_ratio",
                "Share of the time for which pods held nodes that advanced the model",
                &OBJECT,
            )?,
            training_held_seconds: gauge(
                "training_held_seconds",
                "Time for which pods held nodes, summed over pods",
                &OBJECT,
            )?,
            training_advanced_seconds: gauge(
                "training_advanced_seconds",
                "Part of the held time that was spent in steps that count",
                &OBJECT,
            )?,
            training_remaining_seconds: gauge(
                "training_remaining_seconds",
                "Time that the steps to come take at the present speed",
                &OBJECT,
            )?,
            training_cost: gauge(
                "training_cost",
                "Declared price by share of the node by held time, in the pools' currency",
                &POOL,
            )?,
            training_on_demand_cost: gauge(
                "training_on_demand_equivalent_cost",
                "What the same time would have cost on demand, in the pools' currency",
                &OBJECT,
            )?,
            training_pool_ranks: int_gauge("training_pool_ranks", "Ranks that train, by pool", &POOL)?,
            training_restarts: int_gauge("training_restarts", "Failures by cause; reclaims are none", &CAUSE)?,
            notices: counter("notices_total", "Warnings that a rank's node would go", &OBJECT)?,
            reclaims: counter("reclaims_total", "Ranks that went with their node", &OBJECT)?,
            lost_steps: counter("lost_steps_total", "Steps that had to be made again", &OBJECT)?,
            recovery_seconds: histogram(
                "recovery_seconds",
                "Time from the last step before a disruption to the first after it",
                &OBJECT,
                &[1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0],
            )?,
            recovery_phase_seconds: gauge(
                "recovery_phase_seconds",
                "Where the time of the last recovery went: noticing, agreeing, moving state, the first step",
                &PHASE,
            )?,
            serving_replicas: int_gauge("serving_replicas", "Workers of a serving", &SERVING)?,
            serving_hourly_price: gauge(
                "serving_hourly_price",
                "Declared price of an hour of the nodes of a serving's workers, as if each had a node of its own",
                &OBJECT,
            )?,
            reconciles: counter("reconcile_total", "Reconciliations", &CONTROLLER)?,
            errors: counter("errors_total", "Reconciliations that failed", &CONTROLLER)?,
            reconcile_seconds: histogram(
                "seconds",
                "Time that a reconciliation took",
                &CONTROLLER,
                &[0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0],
            )?,
            registry,
        };
        made.register()?;
        Ok(made)
    }

    fn register(&self) -> Result<(), prometheus::Error> {
        let Self {
            registry,
            training_step,
            training_steps,
            training_loss,
            training_evaluation_loss,
            training_checkpoint_stall_seconds,
            training_tokens_per_second,
            training_ranks,
            training_generation,
            training_goodput,
            training_held_seconds,
            training_advanced_seconds,
            training_remaining_seconds,
            training_cost,
            training_on_demand_cost,
            training_pool_ranks,
            training_restarts,
            notices,
            reclaims,
            lost_steps,
            recovery_seconds,
            recovery_phase_seconds,
            serving_replicas,
            serving_hourly_price,
            reconciles,
            errors,
            reconcile_seconds,
        } = self;
        for gauge in [
            training_step,
            training_steps,
            training_ranks,
            training_generation,
            training_pool_ranks,
            training_restarts,
            serving_replicas,
        ] {
            registry.register(Box::new(gauge.clone()))?;
        }
        for gauge in [
            training_loss,
            training_evaluation_loss,
            training_checkpoint_stall_seconds,
            training_tokens_per_second,
            training_goodput,
            training_held_seconds,
            training_advanced_seconds,
            training_remaining_seconds,
            training_cost,
            training_on_demand_cost,
            serving_hourly_price,
            recovery_phase_seconds,
        ] {
            registry.register(Box::new(gauge.clone()))?;
        }
        for counter in [notices, reclaims, lost_steps, reconciles, errors] {
            registry.register(Box::new(counter.clone()))?;
        }
        for histogram in [recovery_seconds, reconcile_seconds] {
            registry.register(Box::new(histogram.clone()))?;
        }
        Ok(())
    }

    /// All metrics in Prometheus' text format.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    /// Measures one reconciliation of `controller` (`training` or `serving`).
    pub fn reconciled(&self, controller: &str, took: Duration, failed: bool) {
        self.reconciles.with_label_values(&[controller]).inc();
        self.reconcile_seconds.with_label_values(&[controller]).observe(took.as_secs_f64());
        if failed {
            self.errors.with_label_values(&[controller]).inc();
        }
    }

    /// What a training's status says in numbers; `before` is what it said last.
    pub fn training(
        &self,
        namespace: &str,
        name: &str,
        before: Option<&VicunaTrainingStatus>,
        status: &VicunaTrainingStatus,
    ) {
        let object = [namespace, name];
        let set = |gauge: &GaugeVec, value: Option<f64>| {
            if let Some(value) = value {
                gauge.with_label_values(&object).set(value);
            }
        };
        set(&self.training_goodput, status.goodput);
        let time = status.worker_time.as_ref();
        set(&self.training_held_seconds, time.map(|time| time.held_seconds as f64));
        set(&self.training_advanced_seconds, time.map(|time| time.advanced_seconds as f64));
        let remaining = status.progress.as_ref().and_then(|progress| progress.remaining);
        set(&self.training_remaining_seconds, remaining.map(|remaining| remaining.get().as_secs_f64()));
        if let Some(cost) = &status.cost {
            set(&self.training_on_demand_cost, cost.on_demand_equivalent);
            for (pool, amount) in &cost.pools {
                self.training_cost.with_label_values(&[namespace, name, pool]).set(*amount);
            }
        }
        if let Some(restarts) = &status.restarts {
            let causes = [
                ("application", restarts.application),
                ("infrastructure", restarts.infrastructure),
                ("outOfMemory", restarts.out_of_memory),
                ("hang", restarts.hang),
                ("storage", restarts.storage),
            ];
            for (cause, times) in causes {
                self.training_restarts.with_label_values(&[namespace, name, cause]).set(times.into());
            }
        }
        if let Some(membership) = &status.membership {
            let old = before.and_then(|before| before.membership.as_ref()).map(|old| &old.pools);
            for pool in
                old.into_iter().flatten().map(|(pool, _)| pool).filter(|pool| !membership.pools.contains_key(*pool))
            {
                // A pool that is left must not keep its last number.
                let _ = self.training_pool_ranks.remove_label_values(&[namespace, name, pool]);
            }
            for (pool, ranks) in &membership.pools {
                self.training_pool_ranks.with_label_values(&[namespace, name, pool]).set((*ranks).into());
            }
        }
    }

    /// A training is gone: drops its series. Absent series are no error.
    pub fn forget_training(&self, namespace: &str, name: &str) {
        let object = [namespace, name];
        for gauge in [&self.training_step, &self.training_steps, &self.training_ranks, &self.training_generation] {
            let _ = gauge.remove_label_values(&object);
        }
        for gauge in [
            &self.training_loss,
            &self.training_evaluation_loss,
            &self.training_checkpoint_stall_seconds,
            &self.training_tokens_per_second,
            &self.training_goodput,
            &self.training_held_seconds,
            &self.training_advanced_seconds,
            &self.training_remaining_seconds,
            &self.training_on_demand_cost,
        ] {
            let _ = gauge.remove_label_values(&object);
        }
        forget(&self.training_cost, namespace, name, |labels| drop(self.training_cost.remove_label_values(labels)));
        for gauge in [&self.training_pool_ranks, &self.training_restarts] {
            forget(gauge, namespace, name, |labels| drop(gauge.remove_label_values(labels)));
        }
        for counter in [&self.notices, &self.reclaims, &self.lost_steps] {
            let _ = counter.remove_label_values(&object);
        }
        let _ = self.recovery_seconds.remove_label_values(&object);
        for phase in ["detect", "agree", "restore", "step"] {
            let _ = self.recovery_phase_seconds.remove_label_values(&[namespace, name, phase]);
        }
    }

    /// A serving is gone: drops its series.
    pub fn forget_serving(&self, namespace: &str, name: &str) {
        for state in ["desired", "ready"] {
            let _ = self.serving_replicas.remove_label_values(&[namespace, name, state]);
        }
        let _ = self.serving_hourly_price.remove_label_values(&[namespace, name]);
    }
}

/// Removes all series of one object, whatever the third label is.
fn forget(metric: &impl Collector, namespace: &str, name: &str, remove: impl Fn(&[&str])) {
    for family in metric.collect() {
        for series in family.get_metric() {
            let value = |label: &str| {
                series.get_label().iter().find(|pair| pair.name() == label).map_or("", |pair| pair.value())
            };
            if value("namespace") != namespace || value("name") != name {
                continue;
            }
            let third = series.get_label().iter().find(|pair| !["namespace", "name"].contains(&pair.name()));
            remove(&[namespace, name, third.map_or("", |pair| pair.value())]);
        }
    }
}

fn named(name: &str, help: &str) -> Opts {
    Opts::new(format!("vicuna_operator_{name}"), help)
}

fn int_gauge(name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
    IntGaugeVec::new(named(name, help), labels)
}

fn gauge(name: &str, help: &str, labels: &[&str]) -> Result<GaugeVec, prometheus::Error> {
    GaugeVec::new(named(name, help), labels)
}

fn counter(name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
    IntCounterVec::new(named(name, help), labels)
}

fn histogram(name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> Result<HistogramVec, prometheus::Error> {
    let options = HistogramOpts::from(named(name, help)).buckets(buckets.to_vec());
    HistogramVec::new(options, labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_training_that_is_gone_leaves_no_series() {
        let metrics = Metrics::new().unwrap();
        metrics.training_step.with_label_values(&["ns", "a"]).set(7);
        metrics.training("ns", "a", None, &full_status());
        metrics.training("ns", "b", None, &full_status());
        metrics.recovery_seconds.with_label_values(&["ns", "a"]).observe(3.0);
        let text = metrics.render().unwrap();
        assert!(text.contains(r#"vicuna_operator_training_step{name="a",namespace="ns"} 7"#), "{text}");
        assert!(text.contains("vicuna_operator_recovery_seconds_count"));
        metrics.forget_training("ns", "a");
        let text = metrics.render().unwrap();
        assert!(!text.contains(r#"name="a""#), "{text}");
        assert!(text.contains(r#"training_cost{name="b",namespace="ns",pool="spot"} 1.5"#), "{text}");
    }

    fn full_status() -> VicunaTrainingStatus {
        serde_json::from_value(serde_json::json!({
            "goodput": 0.9,
            "workerTime": {"heldSeconds": 100, "advancedSeconds": 90},
            "progress": {"step": 1, "steps": 2, "remaining": "10s"},
            "cost": {"estimated": 1.5, "onDemandEquivalent": 3.0, "pools": {"spot": 1.5}},
            "restarts": {"application": 1},
            "membership": {"pools": {"spot": 2}},
        }))
        .unwrap()
    }

    #[test]
    fn a_pool_that_a_training_has_left_shows_no_ranks() {
        let metrics = Metrics::new().unwrap();
        let before = full_status();
        metrics.training("ns", "a", None, &before);
        let mut status = before.clone();
        status.membership.as_mut().unwrap().pools = [("on-prem".to_owned(), 1)].into();
        metrics.training("ns", "a", Some(&before), &status);
        let text = metrics.render().unwrap();
        assert!(text.contains(r#"training_pool_ranks{name="a",namespace="ns",pool="on-prem"} 1"#), "{text}");
        assert!(!text.contains(r#"training_pool_ranks{name="a",namespace="ns",pool="spot"}"#), "{text}");
        assert!(text.contains(r#"training_restarts{cause="application",name="a",namespace="ns"} 1"#), "{text}");
    }

    #[test]
    fn reconciliations_are_counted_by_controller() {
        let metrics = Metrics::new().unwrap();
        metrics.reconciled("training", Duration::from_millis(3), true);
        let text = metrics.render().unwrap();
        assert!(text.contains(r#"vicuna_operator_reconcile_total{controller="training"} 1"#));
        assert!(text.contains(r#"vicuna_operator_errors_total{controller="training"} 1"#));
    }
}
