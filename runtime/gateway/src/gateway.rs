//! The gateway's parts put together, its listeners, and its end.

use crate::api::{self, error::ApiError};
use crate::config::{Config, Limits};
use crate::loads::Loads;
use crate::metrics::Metrics;
use crate::report::{Operator, Reporter};
use crate::routing::least_loaded::LeastLoaded;
use crate::workers::Registry;
use crate::workers::registry::Model;
use crate::workers::service::WorkerService;
use crate::workers::trust::Trust;
use anyhow::{Context, Result};
use axum::Router;
use axum::serve::ListenerExt;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use vicuna_protocol::auth::TokenFile;
use vicuna_protocol::inference::workers_server::WorkersServer;

const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// What the handlers share.
pub struct Gateway {
    pub limits: Limits,
    pub registry: Arc<Registry>,
    pub loads: Arc<Loads>,
    pub metrics: Metrics,
    /// No new requests.
    pub draining: CancellationToken,
    /// The streams that are left end now.
    pub stopped: CancellationToken,
}

impl Gateway {
    /// A model that is served here, or was until a moment ago.
    pub fn model(&self, name: &str) -> Result<Model, ApiError> {
        self.registry.model(name).ok_or_else(|| {
            let models = self.registry.models().into_iter().map(|model| model.name);
            ApiError::model_not_found(name, &models.collect::<Vec<_>>())
        })
    }
}

/// A gateway that listens.
pub struct Running {
    pub gateway: Arc<Gateway>,
    pub http: SocketAddr,
    pub workers: SocketAddr,
    pub metrics: SocketAddr,
    /// Ends when the last client's connection has.
    http_task: tokio::task::JoinHandle<()>,
    /// Everything else, ended with this.
    tasks: JoinSet<()>,
}

/// Opens the listeners and begins to serve.
pub async fn start(config: &Config) -> Result<Running> {
    let metrics = Metrics::new()?;
    let gateway = Arc::new(Gateway {
        limits: config.limits.clone(),
        registry: Registry::new(Box::new(LeastLoaded), metrics.clone()),
        loads: Loads::new(metrics.clone()),
        metrics,
        draining: CancellationToken::new(),
        stopped: CancellationToken::new(),
    });
    let mut tasks = JoinSet::new();
    let workers = serve_workers(config, &gateway, &mut tasks).await?;
    let (metrics, observation) = serve_http(config.metrics, api::observation_router(gateway.clone()), None).await?;
    tasks.spawn(observation);
    let graceful = Some(gateway.draining.clone());
    let (http, serving) = serve_http(config.listen, api::router(gateway.clone()), graceful).await?;
    tasks.spawn(watch_workers(gateway.clone()));
    report_load(config, &gateway, &mut tasks);
    tracing::info!(%http, %workers, %metrics, "gateway listens");
    Ok(Running { gateway, http, workers, metrics, http_task: tokio::spawn(serving), tasks })
}

impl Running {
    /// Takes no new requests, gives streams their time, then ends.
    pub async fn stop(mut self) {
        let timeout = self.gateway.limits.drain_timeout;
        tracing::info!(?timeout, "draining");
        self.gateway.draining.cancel();
        if tokio::time::timeout(timeout, &mut self.http_task).await.is_err() {
            tracing::warn!(unfinished = self.gateway.loads.unfinished(), "streams end unfinished");
            self.gateway.stopped.cancel();
            // For the last event to go out.
            let _ = tokio::time::timeout(Duration::from_secs(1), &mut self.http_task).await;
            self.http_task.abort();
        }
        self.tasks.shutdown().await;
    }
}

async fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

async fn serve_http(
    address: SocketAddr,
    router: Router,
    graceful: Option<CancellationToken>,
) -> Result<(SocketAddr, impl Future<Output = ()>)> {
    let listener = listen(address).await?;
    let address = listener.local_addr()?;
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot switch Nagle's algorithm off");
        }
    });
    let graceful = graceful.unwrap_or_default();
    let serving = async move {
        let server = axum::serve(listener, router).with_graceful_shutdown(graceful.cancelled_owned());
        if let Err(error) = server.await {
            tracing::error!(%error, "the HTTP server ended");
        }
    };
    Ok((address, serving))
}

async fn serve_workers(config: &Config, gateway: &Arc<Gateway>, tasks: &mut JoinSet<()>) -> Result<SocketAddr> {
    let identity = Identity::from_pem(read(&config.tls_cert)?, read(&config.tls_key)?);
    let listener = listen(config.workers_listen).await?;
    let address = listener.local_addr()?;
    let service = WorkerService {
        gateway: config.name.clone(),
        registry: gateway.registry.clone(),
        trust: Trust::new(&config.trust_dir),
        metrics: gateway.metrics.clone(),
    };
    let server = Server::builder()
        .tls_config(ServerTlsConfig::new().identity(identity))
        .with_context(|| format!("cannot use the key pair {}", config.tls_cert.display()))?
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .tcp_nodelay(true)
        .add_service(WorkersServer::new(service));
    tasks.spawn(async move {
        if let Err(error) = server.serve_with_incoming(TcpListenerStream::new(listener)).await {
            tracing::error!(%error, "the workers' server ended");
        }
    });
    Ok(address)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}; is the certificate's Secret mounted?", path.display()))
}

async fn watch_workers(gateway: Arc<Gateway>) {
    let timeout = gateway.limits.worker_timeout;
    let mut ticks = tokio::time::interval(timeout / 10);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        gateway.registry.detach_silent(timeout);
    }
}

fn report_load(config: &Config, gateway: &Arc<Gateway>, tasks: &mut JoinSet<()>) {
    let (Some(url), Some(token)) = (&config.operator, &config.operator_token_file) else {
        return;
    };
    let operator =
        Operator { url: url.clone(), ca_file: config.trust_dir.join("ca.crt"), token: TokenFile::new(token) };
    let reporter = Reporter {
        gateway: config.name.clone(),
        registry: gateway.registry.clone(),
        loads: gateway.loads.clone(),
        metrics: gateway.metrics.clone(),
    };
    tasks.spawn(async move { reporter.run(&operator).await });
}
