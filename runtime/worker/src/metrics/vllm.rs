//! The same in vLLM's words, by model: dashboards, autoscalers and endpoint pickers that know vLLM ask for these.

use crate::scheduler::Took;
use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};

const MODEL: &str = "model_name";
const FIRST_TOKEN_BUCKETS: [f64; 14] =
    [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0];
const TOKEN_BUCKETS: [f64; 13] = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0, 40.0];
const REQUEST_BUCKETS: [f64; 13] = [0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0];
const COUNT_BUCKETS: [f64; 17] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5];

/// All models' metrics.
#[derive(Clone, Debug)]
pub struct Families {
    requests_running: IntGaugeVec,
    requests_waiting: IntGaugeVec,
    cache_usage: GaugeVec,
    prompt_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    preemptions: IntCounterVec,
    cache_queries: IntCounterVec,
    cache_hits: IntCounterVec,
    requests: IntCounterVec,
    first_token_seconds: HistogramVec,
    inter_token_seconds: HistogramVec,
    output_token_seconds: HistogramVec,
    request_seconds: HistogramVec,
    queue_seconds: HistogramVec,
    inference_seconds: HistogramVec,
    prefill_seconds: HistogramVec,
    decode_seconds: HistogramVec,
    request_prompt_tokens: HistogramVec,
    request_generation_tokens: HistogramVec,
    step_tokens: HistogramVec,
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
    pub inter_token_seconds: Histogram,
    /// Of all sequences together.
    pub step_tokens: Histogram,
    families: Families,
    model: String,
}

impl Families {
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let new = Making(registry);
        Ok(Self {
            requests_running: new.gauges("vllm:num_requests_running", "Sequences in the batch.")?,
            requests_waiting: new.gauges("vllm:num_requests_waiting", "Requests that wait for a slot.")?,
            cache_usage: new
                .shares("vllm:kv_cache_usage_perc", "Share of the room for keys and values that is taken; 1 is all.")?,
            prompt_tokens: new.counters("vllm:prompt_tokens_total", "Tokens of prompts read, reused ones too.")?,
            generation_tokens: new.counters("vllm:generation_tokens_total", "Tokens generated.")?,
            preemptions: new.counters("vllm:num_preemptions_total", "Sequences that gave their blocks back.")?,
            cache_queries: new.counters(
                "vllm:prefix_cache_queries_total",
                "Tokens of prompts that were looked for among what is computed already.",
            )?,
            cache_hits: new.counters("vllm:prefix_cache_hits_total", "Those of them that were found.")?,
            requests: new.counters_by(
                "vllm:request_success_total",
                "Requests that came to their end, by how: stop, length, or abort where the client or its gateway went.",
                &[MODEL, "finished_reason"],
            )?,
            first_token_seconds: new.histograms(
                "vllm:time_to_first_token_seconds",
                "From a request's arrival at this worker to its first token.",
                &FIRST_TOKEN_BUCKETS,
            )?,
            inter_token_seconds: new.histograms(
                "vllm:inter_token_latency_seconds",
                "From one token of an answer to its next.",
                &TOKEN_BUCKETS,
            )?,
            output_token_seconds: new.histograms(
                "vllm:request_time_per_output_token_seconds",
                "Time for a token after the first, by answer.",
                &TOKEN_BUCKETS,
            )?,
            request_seconds: new.histograms(
                "vllm:e2e_request_latency_seconds",
                "From a request's arrival at this worker to its end.",
                &REQUEST_BUCKETS,
            )?,
            queue_seconds: new.histograms(
                "vllm:request_queue_time_seconds",
                "From a request's arrival to its place in the batch.",
                &REQUEST_BUCKETS,
            )?,
            inference_seconds: new.histograms(
                "vllm:request_inference_time_seconds",
                "From a request's place in the batch to its last token.",
                &REQUEST_BUCKETS,
            )?,
            prefill_seconds: new.histograms(
                "vllm:request_prefill_time_seconds",
                "From a request's place in the batch to its first token.",
                &REQUEST_BUCKETS,
            )?,
            decode_seconds: new.histograms(
                "vllm:request_decode_time_seconds",
                "From a request's first token to its last.",
                &REQUEST_BUCKETS,
            )?,
            request_prompt_tokens: new.histograms(
                "vllm:request_prompt_tokens",
                "Tokens of a request's prompt.",
                &COUNT_BUCKETS,
            )?,
            request_generation_tokens: new.histograms(
                "vllm:request_generation_tokens",
                "Tokens of a request's answer.",
                &COUNT_BUCKETS,
            )?,
            step_tokens: new.histograms(
                "vllm:iteration_tokens_total",
                "Tokens that one step computes.",
                &COUNT_BUCKETS,
            )?,
        })
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
            inter_token_seconds: self.inter_token_seconds.with_label_values(&labels),
            step_tokens: self.step_tokens.with_label_values(&labels),
            families: self.clone(),
            model: model.to_owned(),
        }
    }
}

/// Makes metrics and enters them.
struct Making<'a>(&'a Registry);

impl Making<'_> {
    fn entered<M: Collector + Clone + 'static>(&self, metric: M) -> Result<M, prometheus::Error> {
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn gauges(&self, name: &str, help: &str) -> Result<IntGaugeVec, prometheus::Error> {
        self.entered(IntGaugeVec::new(Opts::new(name, help), &[MODEL])?)
    }

    fn shares(&self, name: &str, help: &str) -> Result<GaugeVec, prometheus::Error> {
        self.entered(GaugeVec::new(Opts::new(name, help), &[MODEL])?)
    }

    fn counters(&self, name: &str, help: &str) -> Result<IntCounterVec, prometheus::Error> {
        self.counters_by(name, help, &[MODEL])
    }

    fn counters_by(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
        self.entered(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    fn histograms(&self, name: &str, help: &str, buckets: &[f64]) -> Result<HistogramVec, prometheus::Error> {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.entered(HistogramVec::new(options, &[MODEL])?)
    }
}

impl Vllm {
    /// An answer came to its end; `reason` is OpenAI's word for how.
    pub fn answered(&self, reason: &str, took: &Took, prompt_tokens: u32) {
        let families = &self.families;
        self.ended(reason);
        for (histograms, duration) in [
            (&families.request_seconds, took.all),
            (&families.queue_seconds, took.queue),
            (&families.prefill_seconds, took.prefill),
            (&families.decode_seconds, took.decode),
            (&families.inference_seconds, took.prefill + took.decode),
        ] {
            self.observe(histograms, duration.as_secs_f64());
        }
        self.observe(&families.request_prompt_tokens, f64::from(prompt_tokens));
        self.observe(&families.request_generation_tokens, took.tokens as f64);
        if took.tokens > 1 {
            self.observe(&families.output_token_seconds, took.decode.as_secs_f64() / (took.tokens - 1) as f64);
        }
    }

    /// Nobody waits for the answer any more.
    pub fn aborted(&self) {
        self.ended("abort");
    }

    /// So many tokens of a prompt were looked for, and found.
    pub fn looked_up(&self, tokens: usize, found: usize) {
        let labels = [self.model.as_str()];
        self.families.cache_queries.with_label_values(&labels).inc_by(tokens as u64);
        self.families.cache_hits.with_label_values(&labels).inc_by(found as u64);
    }

    fn ended(&self, reason: &str) {
        self.families.requests.with_label_values(&[self.model.as_str(), reason]).inc();
    }

    fn observe(&self, histograms: &HistogramVec, value: f64) {
        histograms.with_label_values(&[self.model.as_str()]).observe(value);
    }
}
