//! The same in vLLM's words, by model: dashboards, autoscalers and endpoint pickers that know vLLM ask for these.

use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};

const MODEL: &str = "model_name";
const FIRST_TOKEN_BUCKETS: [f64; 14] =
    [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0];
const REQUEST_BUCKETS: [f64; 13] = [0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0];

/// All models' metrics.
#[derive(Clone, Debug)]
pub struct Families {
    requests_running: IntGaugeVec,
    requests_waiting: IntGaugeVec,
    cache_usage: GaugeVec,
    prompt_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    preemptions: IntCounterVec,
    requests: IntCounterVec,
    first_token_seconds: HistogramVec,
    request_seconds: HistogramVec,
}

/// Those of one model; its adapters count as the model.
#[derive(Clone, Debug)]
pub struct Vllm {
    pub requests_running: IntGauge,
    pub requests_waiting: IntGauge,
    /// Share of the cache that is taken, from 0 to 1.
    pub cache_usage: Gauge,
    pub prompt_tokens: IntCounter,
    pub generation_tokens: IntCounter,
    pub preemptions: IntCounter,
    pub first_token_seconds: Histogram,
    pub request_seconds: Histogram,
    requests: IntCounterVec,
    model: String,
}

impl Families {
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let gauges = |name: &str, help: &str| IntGaugeVec::new(Opts::new(name, help), &[MODEL]);
        let counters = |name: &str, help: &str| IntCounterVec::new(Opts::new(name, help), &[MODEL]);
        let histograms = |name: &str, help: &str, buckets: &[f64]| {
            HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), &[MODEL])
        };
        let families = Self {
            requests_running: gauges("vllm:num_requests_running", "Sequences in the batch.")?,
            requests_waiting: gauges("vllm:num_requests_waiting", "Requests that wait for a slot.")?,
            cache_usage: GaugeVec::new(
                Opts::new("vllm:kv_cache_usage_perc", "Share of the room for keys and values that is taken; 1 is all."),
                &[MODEL],
            )?,
            prompt_tokens: counters("vllm:prompt_tokens_total", "Tokens of prompts read, reused ones too.")?,
            generation_tokens: counters("vllm:generation_tokens_total", "Tokens generated.")?,
            preemptions: counters("vllm:num_preemptions_total", "Sequences that gave their blocks back.")?,
            requests: IntCounterVec::new(
                Opts::new("vllm:request_success_total", "Requests answered to their end."),
                &[MODEL, "finished_reason"],
            )?,
            first_token_seconds: histograms(
                "vllm:time_to_first_token_seconds",
                "From a request's arrival at this worker to its first token.",
                &FIRST_TOKEN_BUCKETS,
            )?,
            request_seconds: histograms(
                "vllm:e2e_request_latency_seconds",
                "From a request's arrival at this worker to its end.",
                &REQUEST_BUCKETS,
            )?,
        };
        families.add_to(registry)?;
        Ok(families)
    }

    fn add_to(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        for gauges in [&self.requests_running, &self.requests_waiting] {
            registry.register(Box::new(gauges.clone()))?;
        }
        for counters in [&self.prompt_tokens, &self.generation_tokens, &self.preemptions, &self.requests] {
            registry.register(Box::new(counters.clone()))?;
        }
        for histograms in [&self.first_token_seconds, &self.request_seconds] {
            registry.register(Box::new(histograms.clone()))?;
        }
        registry.register(Box::new(self.cache_usage.clone()))
    }

    pub fn of(&self, model: &str) -> Vllm {
        let labels = [model];
        Vllm {
            requests_running: self.requests_running.with_label_values(&labels),
            requests_waiting: self.requests_waiting.with_label_values(&labels),
            cache_usage: self.cache_usage.with_label_values(&labels),
            prompt_tokens: self.prompt_tokens.with_label_values(&labels),
            generation_tokens: self.generation_tokens.with_label_values(&labels),
            preemptions: self.preemptions.with_label_values(&labels),
            first_token_seconds: self.first_token_seconds.with_label_values(&labels),
            request_seconds: self.request_seconds.with_label_values(&labels),
            requests: self.requests.clone(),
            model: model.to_owned(),
        }
    }
}

impl Vllm {
    /// An answer came to its end after `seconds`; `reason` is OpenAI's word for how.
    pub fn answered(&self, reason: &str, seconds: f64) {
        self.requests.with_label_values(&[self.model.as_str(), reason]).inc();
        self.request_seconds.observe(seconds);
    }
}
