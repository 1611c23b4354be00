//! The gateway's metrics. `model` is always one that workers have offered.

use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    /// By model and status: 499 is a client that went away.
    pub requests: IntCounterVec,
    pub in_flight: IntGaugeVec,
    pub tokens: IntCounterVec,
    pub resumes: IntCounterVec,
    pub time_to_first_token_seconds: HistogramVec,
    /// From a request's arrival to its first worker.
    pub queue_seconds: HistogramVec,
    /// The same of requests that found no worker with their model.
    pub cold_start_seconds: HistogramVec,
    /// From a lost worker's last token to the next one's first.
    pub resume_gap_seconds: HistogramVec,
    /// By policy, and by whether the worker is the one that the policy likes best for the request, whatever the load.
    pub routed: IntCounterVec,
    /// Those that have a model loaded.
    pub workers: IntGauge,
    /// Choices, where requests count in `in_flight`.
    pub queued: IntGaugeVec,
    /// The same in vLLM's words, for autoscalers that add it to what waits at the workers.
    pub waiting: IntGaugeVec,
    pub ejections: IntCounter,
    /// Streams that a client came back for.
    pub returns: IntCounter,
    /// Requests refused for their key's quota.
    pub over_quota: IntCounter,
    /// Pairs of models that were drawn.
    pub arena_battles: IntCounter,
    /// By who won, or why it does not count.
    pub arena_votes: IntCounterVec,
}

impl Metrics {
    pub fn new() -> Result<Self, prometheus::Error> {
        let counters = |name: &str, help: &str, labels: &[&str]| IntCounterVec::new(Opts::new(name, help), labels);
        let buckets = prometheus::exponential_buckets(0.01, 2.0, 16)?;
        let seconds = |name: &str, help: &str| {
            HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.clone()), &["model"])
        };
        let metrics = Self {
            registry: Registry::new(),
            requests: counters("vicuna_gateway_requests_total", "Requests ended", &["model", "code"])?,
            in_flight: IntGaugeVec::new(
                Opts::new(
                    "vicuna_gateway_requests_in_flight",
                    "Requests taken and not yet ended, queued ones included",
                ),
                &["model"],
            )?,
            tokens: counters("vicuna_gateway_tokens_total", "Tokens generated", &["model"])?,
            resumes: counters("vicuna_gateway_resumes_total", "Answers that another worker continued", &["model"])?,
            time_to_first_token_seconds: seconds(
                "vicuna_gateway_time_to_first_token_seconds",
                "From the request's arrival to the first token of an answer",
            )?,
            queue_seconds: seconds("vicuna_gateway_queue_seconds", "From the request's arrival to its first worker")?,
            cold_start_seconds: seconds(
                "vicuna_gateway_cold_start_seconds",
                "From the arrival of a request for a model that no worker had loaded to its first worker",
            )?,
            resume_gap_seconds: seconds(
                "vicuna_gateway_resume_gap_seconds",
                "From the last token of a worker that was lost to the first of the one that continued",
            )?,
            routed: counters(
                "vicuna_gateway_routed_total",
                "Answers given to a worker: the policy's favourite for them, another, or any where it has none",
                &["policy", "worker"],
            )?,
            waiting: IntGaugeVec::new(
                Opts::new("vllm:num_requests_waiting", "Answers that wait here for a worker"),
                &["model_name"],
            )?,
            workers: IntGauge::new("vicuna_gateway_workers", "Workers with a loaded model")?,
            queued: IntGaugeVec::new(Opts::new("vicuna_gateway_queued", "Answers that wait for a worker"), &["model"])?,
            ejections: IntCounter::new(
                "vicuna_gateway_ejections_total",
                "Times that a worker was left out after failures in a row",
            )?,
            returns: IntCounter::new("vicuna_gateway_returns_total", "Streams continued with Last-Event-ID")?,
            over_quota: IntCounter::new(
                "vicuna_gateway_over_quota_total",
                "Requests refused for the quota of their API key",
            )?,
            arena_battles: IntCounter::new("vicuna_gateway_arena_battles_total", "Pairs of models drawn in the arena")?,
            arena_votes: counters(
                "vicuna_gateway_arena_votes_total",
                "Votes by outcome: who won, or why one does not count",
                &["outcome"],
            )?,
        };
        metrics.register()?;
        Ok(metrics)
    }

    fn register(&self) -> Result<(), prometheus::Error> {
        self.registry.register(Box::new(self.requests.clone()))?;
        self.registry.register(Box::new(self.in_flight.clone()))?;
        self.registry.register(Box::new(self.tokens.clone()))?;
        self.registry.register(Box::new(self.resumes.clone()))?;
        self.registry.register(Box::new(self.time_to_first_token_seconds.clone()))?;
        self.registry.register(Box::new(self.queue_seconds.clone()))?;
        self.registry.register(Box::new(self.cold_start_seconds.clone()))?;
        self.registry.register(Box::new(self.resume_gap_seconds.clone()))?;
        self.registry.register(Box::new(self.routed.clone()))?;
        self.registry.register(Box::new(self.waiting.clone()))?;
        self.registry.register(Box::new(self.queued.clone()))?;
        self.registry.register(Box::new(self.ejections.clone()))?;
        self.registry.register(Box::new(self.returns.clone()))?;
        self.registry.register(Box::new(self.over_quota.clone()))?;
        self.registry.register(Box::new(self.arena_battles.clone()))?;
        self.registry.register(Box::new(self.arena_votes.clone()))?;
        self.registry.register(Box::new(self.workers.clone()))
    }

    /// Everything in Prometheus' text format.
    pub fn render(&self) -> Result<Vec<u8>, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}
