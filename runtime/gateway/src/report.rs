//! Tells the operator's leader each second what is asked of each model, so that it can scale.
//!
//! The gateway serves without an operator: it only tries again, with jitter.

use crate::loads::Loads;
use crate::metrics::Metrics;
use crate::workers::Registry;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;
use vicuna_protocol::auth::TokenFile;
use vicuna_protocol::coordinator::load_reports_client::LoadReportsClient;
use vicuna_protocol::coordinator::{LoadReport, ModelLoad};
use vicuna_protocol::tls;

const INTERVAL: Duration = Duration::from_secs(1);
const OPERATOR_NAME: &str = "vicuna-operator";

/// Where to report.
#[derive(Clone, Debug)]
pub struct Operator {
    pub url: String,
    pub ca_file: PathBuf,
    pub token: TokenFile,
}

pub struct Reporter {
    pub gateway: String,
    pub registry: Arc<Registry>,
    pub loads: Arc<Loads>,
    pub metrics: Metrics,
}

impl Reporter {
    /// Reports until it is dropped.
    pub async fn run(&self, operator: &Operator) {
        let mut failures = 0u32;
        loop {
            let started = tokio::time::Instant::now();
            let ended = self.report(operator).await;
            failures = match started.elapsed() > 10 * INTERVAL {
                true => 0,
                false => failures + 1,
            };
            // A replica that is not the leader refuses, so this is no news every time.
            match ended {
                Err(error) if failures <= 1 => tracing::warn!(%error, "cannot report load to the operator; trying on"),
                ended => tracing::debug!(?ended, failures, "load reports interrupted"),
            }
            tokio::time::sleep(pause(failures)).await;
        }
    }

    async fn report(&self, operator: &Operator) -> anyhow::Result<()> {
        let channel = tls::channel(&operator.url, &operator.ca_file, OPERATOR_NAME)?;
        let (reports, outbound) = mpsc::channel(1);
        let request = operator.token.sign(Request::new(ReceiverStream::new(outbound)))?;
        let mut client = LoadReportsClient::new(channel);
        let exchange = async {
            let mut answers = client.report(request).await?.into_inner();
            while let Some(ack) = answers.message().await? {
                self.registry.expect(&ack.models);
            }
            anyhow::Ok(())
        };
        tokio::select! {
            ended = exchange => ended,
            () = self.feed(reports) => Ok(()),
        }
    }

    async fn feed(&self, reports: mpsc::Sender<LoadReport>) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut tokens = HashMap::new();
        let mut last = ticks.tick().await;
        loop {
            let seconds = last.elapsed().as_secs_f64();
            last = tokio::time::Instant::now();
            if reports.send(self.load(&mut tokens, seconds)).await.is_err() {
                return;
            }
            ticks.tick().await;
        }
    }

    /// `tokens` holds the counters of the last report, `seconds` ago.
    fn load(&self, tokens: &mut HashMap<String, u64>, seconds: f64) -> LoadReport {
        let models = self.registry.models().into_iter().map(|model| {
            let labels = [model.name.as_str()];
            let now = self.metrics.tokens.with_label_values(&labels).get();
            let before = tokens.insert(model.name.clone(), now).unwrap_or(now);
            let demand = self.loads.demand(&model.name);
            ModelLoad {
                unfinished: demand.unfinished,
                queued: demand.queued,
                workers: model.workers,
                tokens_per_second: (now - before) as f64 / seconds.max(0.001),
                resumes: self.metrics.resumes.with_label_values(&labels).get(),
                model: model.name,
            }
        });
        LoadReport { gateway: self.gateway.clone(), models: models.collect() }
    }
}

/// Half a second to five, growing, with jitter.
fn pause(failures: u32) -> Duration {
    let longest = 0.5 * f64::from(1 << failures.min(4));
    Duration::from_secs_f64(longest.min(5.0) * rand::random_range(0.5..1.0))
}
