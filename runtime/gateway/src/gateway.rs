//! The gateway's parts put together, its listeners, and its end.

use crate::api::live::MAX_READERS;
use crate::api::{self, error::ApiError, takeover::Takeovers};
use crate::arena::{Arena, ticket::Seal, voters::Voters, votes::Votes};
use crate::config::{Config, Limits};
use crate::keys::{Client, Keys, Reserved};
use crate::loads::Loads;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::parked::Parked;
use crate::report::{Operator, Reporter};
use crate::serve::certificates::Certificates;
use crate::serve::{self, Terms};
use crate::workers::Registry;
use crate::workers::registry::Model;
use crate::workers::relay::Peers;
use crate::workers::service::WorkerService;
use crate::workers::trust::Trust;
use anyhow::{Context, Result};
use axum::Router;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use vicuna_protocol::auth::TokenFile;
use vicuna_protocol::inference::ModelOffer;
use vicuna_protocol::inference::workers_server::WorkersServer;

/// Between two signs of life on a worker's connection, and on a client's.
const WORKER_KEEP_ALIVE: Duration = Duration::from_secs(5);
const CLIENT_KEEP_ALIVE: Duration = Duration::from_secs(20);
/// Between two looks at files that may have been replaced.
const RELOAD_INTERVAL: Duration = Duration::from_secs(5);
const MAX_WORKERS: usize = 4096;
const MAX_OBSERVERS: usize = 64;
/// Of a worker's message: log probabilities of a long prompt, or a transcript.
const MAX_MESSAGE_BYTES: usize = 32 << 20;

/// What the handlers share.
pub struct Gateway {
    pub name: String,
    pub limits: Limits,
    pub keys: Arc<Keys>,
    pub registry: Arc<Registry>,
    pub loads: Arc<Loads>,
    pub parked: Parked,
    pub takeovers: Arc<Takeovers>,
    pub memory: Arc<Memory>,
    pub metrics: Metrics,
    pub arena: Arc<Arena>,
    /// Places of those who watch.
    pub watchers: Arc<Semaphore>,
    /// No new requests.
    pub draining: CancellationToken,
    /// The streams that are left end now.
    pub stopped: CancellationToken,
}

impl Gateway {
    /// A model that is served here, or was until a moment ago, and that this client may use. For
    /// others it does not exist.
    pub fn model_for(&self, client: &Client, name: &str) -> Result<Model, ApiError> {
        let model = self.registry.model(name).filter(|_| client.may_use(name));
        model.ok_or_else(|| self.not_found(client, name))
    }

    /// What the newest worker of such a model offers, if it has had one.
    pub fn offer_for(&self, client: &Client, name: &str) -> Result<Option<Arc<ModelOffer>>, ApiError> {
        let offer = self.registry.offer(name).filter(|_| client.may_use(name));
        offer.ok_or_else(|| self.not_found(client, name))
    }

    fn not_found(&self, client: &Client, name: &str) -> ApiError {
        let models = self.registry.models().into_iter().map(|model| model.name);
        let visible = models.filter(|model| client.may_use(model));
        ApiError::model_not_found(name, &visible.collect::<Vec<_>>())
    }

    /// Whether one more request, which may use so many tokens, is within the bounds of this gateway and of the client's key.
    pub fn admit(&self, client: &Client, tokens: u32) -> Result<Reserved, ApiError> {
        if self.loads.unfinished() >= self.limits.max_in_flight {
            return Err(ApiError::too_many_requests());
        }
        client.admit(tokens).inspect_err(|_| self.metrics.over_quota.inc())
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
    let gateway = Arc::new(gateway(config)?);
    let mut tasks = JoinSet::new();
    tasks.spawn(gateway.keys.clone().watch(RELOAD_INTERVAL));

    let (listener, workers) = listen(config.workers_listen).await?;
    let tls = certificates(&config.tls_cert, &config.tls_key, &["h2"], &mut tasks)?;
    let terms = terms(config, Some(tls), MAX_WORKERS, WORKER_KEEP_ALIVE);
    tasks.spawn(serve::serve(listener, workers_router(config, &gateway), terms, CancellationToken::new()));

    let (listener, metrics) = listen(config.metrics).await?;
    let router = api::observation_router(gateway.clone());
    let terms = self::terms(config, None, MAX_OBSERVERS, CLIENT_KEEP_ALIVE);
    tasks.spawn(serve::serve(listener, router, terms, CancellationToken::new()));

    let (listener, http) = listen(config.listen).await?;
    let tls = match (&config.https_cert, &config.https_key) {
        (Some(chain), Some(key)) => Some(certificates(chain, key, &["h2", "http/1.1"], &mut tasks)?),
        _ => None,
    };
    let terms = self::terms(config, tls, config.limits.max_connections, CLIENT_KEEP_ALIVE);
    let serving = serve::serve(listener, api::router(gateway.clone()), terms, gateway.draining.clone());

    tasks.spawn(watch_workers(gateway.clone()));
    report_load(config, &gateway, &mut tasks);
    tracing::info!(%http, %workers, %metrics, routing = ?config.routing, "gateway listens");
    Ok(Running { gateway, http, workers, metrics, http_task: tokio::spawn(serving), tasks })
}

fn gateway(config: &Config) -> Result<Gateway> {
    let metrics = Metrics::new()?;
    Ok(Gateway {
        name: config.name.clone(),
        arena: Arc::new(arena(config)?),
        watchers: Arc::new(Semaphore::new(MAX_READERS)),
        limits: config.limits.clone(),
        keys: Keys::load(config.api_keys_file.as_deref())?,
        registry: Registry::new(config.routing.policy(), metrics.clone()),
        loads: Loads::new(metrics.clone()),
        parked: Parked::new(config.limits.return_timeout),
        takeovers: Arc::default(),
        memory: Memory::new(config.limits.max_request_memory_mib << 20),
        metrics,
        draining: CancellationToken::new(),
        stopped: CancellationToken::new(),
    })
}

fn arena(config: &Config) -> Result<Arena> {
    let votes = match &config.arena_votes_folder {
        Some(folder) => Votes::in_folder(folder, &config.name, config.arena_votes_mib << 20)?,
        None => Votes::in_memory(),
    };
    let voters = Voters::new(config.arena_votes_per_minute);
    Ok(Arena { seal: Seal::new(&config.tls_key), votes, voters })
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

async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr)> {
    let failed = || format!("cannot listen on {address}");
    let listener = TcpListener::bind(address).await.with_context(failed)?;
    let address = listener.local_addr().with_context(failed)?;
    Ok((listener, address))
}

fn certificates(
    chain: &Path,
    key: &Path,
    protocols: &[&str],
    tasks: &mut JoinSet<()>,
) -> Result<Arc<rustls::ServerConfig>> {
    let failed = || format!("cannot use the key pair {}", chain.display());
    let certificates = Certificates::load(chain, key).with_context(failed)?;
    let server = certificates.server(protocols).with_context(failed)?;
    tasks.spawn(certificates.watch(RELOAD_INTERVAL));
    Ok(server)
}

fn terms(
    config: &Config,
    tls: Option<Arc<rustls::ServerConfig>>,
    max_connections: usize,
    keep_alive: Duration,
) -> Terms {
    let limits = &config.limits;
    Terms {
        tls,
        max_connections,
        header_timeout: limits.header_timeout,
        write_timeout: limits.write_timeout,
        keep_alive,
    }
}

fn workers_router(config: &Config, gateway: &Arc<Gateway>) -> Router {
    let peers = config.peers.as_ref().map(|peers| Peers {
        host: peers.host.clone(),
        port: peers.port,
        ca_file: config.trust_dir.join("ca.crt"),
        name: config.name.clone(),
    });
    let service = WorkerService {
        peers,
        gateway: config.name.clone(),
        registry: gateway.registry.clone(),
        trust: Trust::new(&config.trust_dir),
        metrics: gateway.metrics.clone(),
    };
    let service = WorkersServer::new(service).max_decoding_message_size(MAX_MESSAGE_BYTES);
    Routes::new(service).prepare().into_axum_router()
}

async fn watch_workers(gateway: Arc<Gateway>) {
    let timeout = gateway.limits.worker_timeout;
    let mut ticks = tokio::time::interval(timeout / 10);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        gateway.registry.detach_silent(timeout);
        gateway.parked.forget_old(Instant::now());
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
