//! The life of the process: wait for the lease, then run everything until it is lost.

use crate::config::{Config, LEADER_LABEL};
use crate::context::Context;
use crate::coordinator::registry::Clock;
use crate::coordinator::{feed, service};
use crate::http::{self, Readiness};
use crate::leader::{Elector, Leadership};
use crate::metrics::Metrics;
use crate::pki;
use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams, Patch, PatchParams};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Streams may end in this time when the process is told to.
const WIND_DOWN: Duration = Duration::from_secs(3);

/// Runs until SIGTERM or SIGINT (`Ok`), or until the lease is lost (`Err`: the kubelet starts us again,
/// as a follower that knows nothing).
pub async fn run(config: Config) -> anyhow::Result<()> {
    // A second provider anywhere in the process is a programming error; the first one stays.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let stop = stop_on_signal()?;
    let config = Arc::new(config);
    let client = kube::Client::try_default()
        .await
        .context("no way to the API server: is there a service account or a kubeconfig?")?;
    let metrics = Arc::new(Metrics::new()?);
    let readiness = Readiness::default();
    let listener = TcpListener::bind(config.metrics_listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.metrics_listen))?;
    let web = tokio::spawn(http::serve(listener, metrics.clone(), readiness.clone(), stop.clone()));
    let version = client.apiserver_version().await.context("the API server does not answer")?;
    tracing::info!(version = version.git_version, "reached the API server");
    mark_leader(&client, &config, false).await;
    readiness.set(true);
    let (elector, leadership) = Elector::new(client.clone(), &config, &instance());
    let election_stop = CancellationToken::new();
    let election = tokio::spawn(elector.run(election_stop.clone()));
    let result = tokio::select! {
        result = lead(client, config, metrics, leadership, stop.clone()) => result,
        () = stop.cancelled() => Ok(()),
    };
    readiness.set(false);
    stop.cancel();
    election_stop.cancel();
    election.await?;
    web.await??;
    result
}

/// Two lives of one pod must not take each other for the holder.
fn instance() -> String {
    format!("{:08x}", rand::random::<u32>())
}

fn stop_on_signal() -> anyhow::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let token = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("told to stop");
        token.cancel();
    });
    Ok(stop)
}

/// Everything that only the leader does.
async fn lead(
    client: kube::Client,
    config: Arc<Config>,
    metrics: Arc<Metrics>,
    leadership: Leadership,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    tracing::info!(lease = config.lease, "waits for the lease");
    leadership.acquired().await;
    tracing::info!(lease = config.lease, "leads");
    let wall_clock = Arc::new(time::OffsetDateTime::now_utc);
    let (context, told) = Context::start(client, config, metrics, leadership, Clock::start(), wall_clock).await?;
    let context = Arc::new(context);
    context.watches.ready().await.context("the caches cannot be filled")?;
    let listener = pki::bind(context.config.coordinator_listen)
        .with_context(|| format!("cannot listen on {}", context.config.coordinator_listen))?;
    let connections = context.trust.listen(listener)?;
    mark_leader(&context.client, &context.config, true).await;
    unmark_others(&context.client, &context.config).await;
    let calls = service::serve(context.clone(), connections, stop);
    tokio::select! {
        () = context.leadership.lost() => bail!("the lease is lost"),
        () = context.trust.clone().keep_fresh() => bail!("trust is not kept fresh any more"),
        () = feed::run(context.clone()) => bail!("the caches' changes ended"),
        () = crate::training::run(context.clone(), told) => bail!("the training controller ended"),
        () = crate::serving::run(context.clone()) => bail!("the serving controller ended"),
        result = calls => {
            result?;
            tokio::time::sleep(WIND_DOWN).await;
            Ok(())
        }
    }
}

/// The coordinator's Service selects the leader by a label on its pod. Outside of a pod there is none.
async fn mark_leader(client: &kube::Client, config: &Config, leads: bool) {
    let pods: Api<Pod> = Api::namespaced(client.clone(), &config.namespace);
    let value = leads.then_some("true");
    let patch = json!({"metadata": {"labels": {LEADER_LABEL: value}}});
    if let Err(error) = pods.patch(&config.pod_name, &PatchParams::default(), &Patch::Merge(&patch)).await {
        tracing::warn!(%error, pod = config.pod_name, "the pod's leader label cannot be set");
    }
}

/// A leader that lost its network could not take its own mark away, and would go on getting every second call.
async fn unmark_others(client: &kube::Client, config: &Config) {
    let pods: Api<Pod> = Api::namespaced(client.clone(), &config.namespace);
    let marked = ListParams::default().labels(&format!("{LEADER_LABEL}=true"));
    let marked = match pods.list(&marked).await {
        Ok(marked) => marked,
        Err(error) => return tracing::warn!(%error, "former leaders cannot be looked for"),
    };
    for name in marked.into_iter().filter_map(|pod| pod.metadata.name).filter(|name| *name != config.pod_name) {
        let patch = json!({"metadata": {"labels": {LEADER_LABEL: serde_json::Value::Null}}});
        match pods.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await {
            Ok(_) => tracing::info!(pod = name, "a former leader is no longer called"),
            Err(error) => tracing::warn!(%error, pod = name, "a former leader's label cannot be taken away"),
        }
    }
}
