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
    pub workers: IntGauge,
    /// Choices, where requests count in `in_flight`.
    pub queued: IntGaugeVec,
    pub ejections: IntCounter,
    /// Streams that a client came back for.
    pub returns: IntCounter,
    /// Requests refused for their key's quota.
    pub over_quota: IntCounter,
}

impl Metrics {
    pub fn new() -> Result<Self, prometheus::Error> {
        let counters = |name: &str, help: &str, labels: &[&str]| IntCounterVec::new(Opts::new(name, help), labels);
        let first_token = HistogramOpts::new(
            "vicuna_gateway_time_to_first_token_seconds",
            "From the request's arrival to the first token of an answer",
        );
        let buckets = prometheus::exponential_buckets(0.01, 2.0, 14)?;
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
            time_to_first_token_seconds: HistogramVec::new(first_token.buckets(buckets), &["model"])?,
            workers: IntGauge::new("vicuna_gateway_workers", "Workers attached")?,
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
        self.registry.register(Box::new(self.queued.clone()))?;
        self.registry.register(Box::new(self.ejections.clone()))?;
        self.registry.register(Box::new(self.returns.clone()))?;
        self.registry.register(Box::new(self.over_quota.clone()))?;
        self.registry.register(Box::new(self.workers.clone()))
    }

    /// Everything in Prometheus' text format.
    pub fn render(&self) -> Result<Vec<u8>, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}
