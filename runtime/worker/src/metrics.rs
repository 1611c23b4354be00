//! What Prometheus sees of a worker.

mod vllm;

use prometheus::{Encoder, Histogram, HistogramOpts, IntCounter, IntGauge, Registry, TextEncoder};

pub use vllm::Vllm;

/// From a fast GPU's step to a slow CPU's.
const DECODE_BUCKETS: [f64; 12] = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];

#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    models: vllm::Families,
    pub running: IntGauge,
    pub waiting: IntGauge,
    pub tokens: IntCounter,
    pub prompt_tokens: IntCounter,
    pub cached_tokens: IntCounter,
    pub preemptions: IntCounter,
    pub free_tokens: IntGauge,
    pub decode_seconds: Histogram,
}

impl Metrics {
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let decode = HistogramOpts::new("vicuna_worker_decode_seconds", "Time of one step in which answers grew.")
            .buckets(DECODE_BUCKETS.to_vec());
        let metrics = Self {
            running: IntGauge::new("vicuna_worker_running", "Sequences in the batch.")?,
            waiting: IntGauge::new("vicuna_worker_waiting", "Requests that wait for a slot.")?,
            tokens: IntCounter::new("vicuna_worker_tokens_total", "Tokens generated.")?,
            prompt_tokens: IntCounter::new("vicuna_worker_prompt_tokens_total", "Prompt tokens computed.")?,
            cached_tokens: IntCounter::new("vicuna_worker_cached_tokens_total", "Prompt tokens reused.")?,
            preemptions: IntCounter::new(
                "vicuna_worker_preemptions_total",
                "Sequences that gave their blocks back because the cache was full.",
            )?,
            free_tokens: IntGauge::new("vicuna_worker_kv_free_tokens", "Room for keys and values.")?,
            decode_seconds: Histogram::with_opts(decode)?,
            models: vllm::Families::register(&registry)?,
            registry,
        };
        let counters = [&metrics.tokens, &metrics.prompt_tokens, &metrics.cached_tokens, &metrics.preemptions];
        for counter in counters {
            metrics.registry.register(Box::new(counter.clone()))?;
        }
        for gauge in [&metrics.running, &metrics.waiting, &metrics.free_tokens] {
            metrics.registry.register(Box::new(gauge.clone()))?;
        }
        metrics.registry.register(Box::new(metrics.decode_seconds.clone()))?;
        Ok(metrics)
    }

    /// What one model counts besides, under vLLM's names.
    pub fn of(&self, model: &str) -> Vllm {
        self.models.of(model)
    }

    /// In Prometheus' text format.
    pub fn text(&self) -> Result<Vec<u8>, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}
