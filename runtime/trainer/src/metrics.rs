//! The rank's metrics, in Prometheus' words.

use crate::checkpoint::Published;
use crate::evaluation::Evaluation;
use crate::step::StepReport;
use prometheus::{Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntGauge, Registry, TextEncoder};

/// All metrics of a trainer.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    step: IntGauge,
    loss: Gauge,
    tokens: IntCounter,
    tokens_per_second: Gauge,
    step_seconds: Histogram,
    communication_seconds: Histogram,
    skipped_steps: IntCounter,
    evaluation_loss: Gauge,
    evaluation_seconds: Histogram,
    pub generation: IntGauge,
    pub notices: IntCounter,
    checkpoint_stall_seconds: Histogram,
    checkpoint_upload_seconds: Histogram,
    checkpoint_step: IntGauge,
}

impl Metrics {
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let seconds = |name: &str, help: &str, start: f64| -> prometheus::Result<Histogram> {
            let buckets = prometheus::exponential_buckets(start, 2.0, 16)?;
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?;
            registry.register(Box::new(histogram.clone()))?;
            Ok(histogram)
        };
        let gauge = |name: &str, help: &str| -> prometheus::Result<IntGauge> {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let real = |name: &str, help: &str| -> prometheus::Result<Gauge> {
            let gauge = Gauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let counter = |name: &str, help: &str| -> prometheus::Result<IntCounter> {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        Ok(Self {
            step: gauge("vicuna_training_step", "Last step applied")?,
            loss: real("vicuna_training_loss", "Mean loss per trained token of the last step")?,
            tokens: counter("vicuna_training_tokens_total", "Tokens of all steps that this rank took part in")?,
            tokens_per_second: real("vicuna_training_tokens_per_second", "Tokens of the last step by its duration")?,
            step_seconds: seconds("vicuna_training_step_seconds", "Duration of a step", 0.01)?,
            communication_seconds: seconds(
                "vicuna_training_communication_seconds",
                "Part of a step spent sending and waiting for peers",
                0.001,
            )?,
            skipped_steps: counter(
                "vicuna_training_skipped_steps_total",
                "Steps that changed nothing: no trained token, or loss or gradient not finite",
            )?,
            evaluation_loss: real("vicuna_training_evaluation_loss", "Mean loss per token of the held-out data")?,
            evaluation_seconds: seconds("vicuna_training_evaluation_seconds", "Duration of an evaluation", 0.01)?,
            notices: counter(
                "vicuna_training_notices_heard_total",
                "Notices to ranks of the training that this one heard of",
            )?,
            generation: gauge("vicuna_training_generation", "Generation that this rank is in")?,
            checkpoint_stall_seconds: seconds(
                "vicuna_checkpoint_stall_seconds",
                "How long a checkpoint held up the training",
                0.001,
            )?,
            checkpoint_upload_seconds: seconds(
                "vicuna_checkpoint_upload_seconds",
                "From a checkpoint's copy to its manifest",
                0.01,
            )?,
            checkpoint_step: gauge("vicuna_checkpoint_step", "Step of the newest complete checkpoint")?,
            registry,
        })
    }

    pub fn stepped(&self, report: &StepReport) {
        self.step.set(report.step as i64);
        self.loss.set(report.loss);
        self.tokens.inc_by(report.tokens);
        self.tokens_per_second.set(report.tokens as f64 / report.duration.as_secs_f64().max(1e-9));
        self.step_seconds.observe(report.duration.as_secs_f64());
        self.communication_seconds.observe(report.communication.as_secs_f64());
        self.skipped_steps.inc_by(u64::from(!report.updated));
    }

    pub fn evaluated(&self, evaluation: &Evaluation) {
        self.evaluation_loss.set(evaluation.loss);
        self.evaluation_seconds.observe(evaluation.duration.as_secs_f64());
    }

    pub fn checkpointed(&self, published: &Published) {
        self.checkpoint_stall_seconds.observe(published.stall.as_secs_f64());
        self.checkpoint_upload_seconds.observe(published.upload.as_secs_f64());
        self.checkpoint_step.set(published.manifest.step as i64);
    }

    /// The text exposition format.
    pub fn render(&self) -> prometheus::Result<String> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}
