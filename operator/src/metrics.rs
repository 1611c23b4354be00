//! The operator's metrics: one inventory, base units, labels bounded by the number of objects.

use prometheus::{GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder};
use std::time::Duration;

/// Training and serving objects are told apart by these.
const OBJECT: [&str; 2] = ["namespace", "name"];
const PHASE: [&str; 3] = ["namespace", "name", "phase"];
const SERVING: [&str; 3] = ["namespace", "name", "state"];
const CONTROLLER: [&str; 1] = ["controller"];

/// Clone of handles: all write to one registry.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    pub training_step: IntGaugeVec,
    pub training_steps: IntGaugeVec,
    pub training_loss: GaugeVec,
    pub training_tokens_per_second: GaugeVec,
    pub training_ranks: IntGaugeVec,
    pub training_generation: IntGaugeVec,
    pub notices: IntCounterVec,
    pub reclaims: IntCounterVec,
    pub lost_steps: IntCounterVec,
    pub recovery_seconds: HistogramVec,
    /// Of the last recovery; `phase` is `detect`, `agree`, `restore` or `step`.
    pub recovery_phase_seconds: GaugeVec,
    /// `state` is `desired` or `ready`.
    pub serving_replicas: IntGaugeVec,
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
            training_tokens_per_second: gauge(
                "training_tokens_per_second",
                "Tokens of the last step by the time that it took",
                &OBJECT,
            )?,
            training_ranks: int_gauge("training_ranks", "Ranks that train", &OBJECT)?,
            training_generation: int_gauge("training_generation", "Number of the set of ranks that trains", &OBJECT)?,
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
            training_tokens_per_second,
            training_ranks,
            training_generation,
            notices,
            reclaims,
            lost_steps,
            recovery_seconds,
            recovery_phase_seconds,
            serving_replicas,
            reconciles,
            errors,
            reconcile_seconds,
        } = self;
        for gauge in [training_step, training_steps, training_ranks, training_generation, serving_replicas] {
            registry.register(Box::new(gauge.clone()))?;
        }
        for gauge in [training_loss, training_tokens_per_second, recovery_phase_seconds] {
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

    /// A training is gone: drops its series. Absent series are no error.
    pub fn forget_training(&self, namespace: &str, name: &str) {
        let object = [namespace, name];
        for gauge in [&self.training_step, &self.training_steps, &self.training_ranks, &self.training_generation] {
            let _ = gauge.remove_label_values(&object);
        }
        for gauge in [&self.training_loss, &self.training_tokens_per_second] {
            let _ = gauge.remove_label_values(&object);
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
        metrics.recovery_seconds.with_label_values(&["ns", "a"]).observe(3.0);
        let text = metrics.render().unwrap();
        assert!(text.contains(r#"vicuna_operator_training_step{name="a",namespace="ns"} 7"#), "{text}");
        assert!(text.contains("vicuna_operator_recovery_seconds_count"));
        metrics.forget_training("ns", "a");
        assert!(!metrics.render().unwrap().contains(r#"name="a""#));
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
