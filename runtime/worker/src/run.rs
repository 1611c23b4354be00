//! From the command line to the end of the process.

use crate::attach::{self, Gateways, Shared};
use crate::health::{Health, explain};
use crate::http;
use crate::metrics::Metrics;
use crate::model::{Served, obtain};
use crate::models::Models;
use crate::on_request::Loader;
use crate::options::Options;
use crate::scheduler::{Command, Handle, Scheduler};
use anyhow::{Context, Result, anyhow};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tch::Device;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing_subscriber::EnvFilter;
use vicuna_model::inference::Engine;
use vicuna_protocol::auth::TokenFile;
use vicuna_protocol::inference::WorkerHello;

/// Runs the worker until SIGTERM or SIGINT. Blocks; an error is why the pod should be started anew,
/// and is left as its termination message.
pub fn run(options: Options) -> Result<()> {
    log();
    let health = Arc::new(Health::new(options.termination_log.clone()));
    let outcome = serve(options, health.clone());
    if let Err(error) = &outcome {
        let reason = explain(error);
        tracing::error!(reason, "the worker ends");
        health.leave_message(&reason);
    }
    outcome
}

fn log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let logger = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let installed = match std::env::var("VICUNA_LOG_FORMAT").as_deref() {
        Ok("json") => logger.json().try_init(),
        _ => logger.try_init(),
    };
    if let Err(error) = installed {
        eprintln!("vicuna-worker: {error}");
    }
}

fn serve(options: Options, health: Arc<Health>) -> Result<()> {
    let device = vicuna_model::device::open(None)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let outcome = runtime.block_on(async {
        let mut stop = Stop::listen()?;
        let metrics = Metrics::new()?;
        serve_http(&options, health.clone(), metrics.clone()).await?;
        let served = tokio::select! {
            served = obtain(&options, device, &health) => served?,
            () = stop.wait() => return Ok(()),
        };
        Worker::start(&options, device, served, health, metrics)?.until(stop, options.drain_timeout).await
    });
    // Loading may still hold a thread; it has nothing to finish.
    runtime.shutdown_background();
    outcome
}

async fn serve_http(options: &Options, health: Arc<Health>, metrics: Metrics) -> Result<()> {
    let listener = tokio::net::TcpListener::bind(options.metrics)
        .await
        .with_context(|| format!("listening on {} for --metrics", options.metrics))?;
    let server = axum::serve(listener, http::router(health, metrics));
    tokio::spawn(async move {
        if let Err(error) = server.await {
            tracing::error!(%error, "the metrics server ended");
        }
    });
    Ok(())
}

/// SIGTERM or SIGINT.
struct Stop {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Stop {
    fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("listening for signals");
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Before the deadline of a drain, what still runs is handed back.
const HAND_BACK: Duration = Duration::from_secs(2);

/// A worker with its models.
struct Worker {
    models: Arc<Models>,
    _loader: AbortOnDropHandle<()>,
    /// Told when a scheduler's thread ends, by panic too.
    scheduler_ended: mpsc::Receiver<()>,
    attachments: tokio::task::JoinHandle<()>,
    health: Arc<Health>,
    draining: watch::Sender<Option<u64>>,
    closing: CancellationToken,
}

impl Worker {
    fn start(
        options: &Options,
        device: Device,
        served: Vec<Served>,
        health: Arc<Health>,
        metrics: Metrics,
    ) -> Result<Self> {
        let (ended, scheduler_ended) = mpsc::channel(1);
        let (models, wanted) = Models::new();
        let models = Arc::new(models);
        let mut lanes = u32::from(!options.on_request.is_empty());
        for Served { engine, models: offered } in served {
            let name = offered.first().map_or("", |first| &first.offer.name);
            let slots = options.slots as usize;
            let (scheduler, _) = start_scheduler(name, engine, slots, metrics.clone(), ended.clone())?;
            let twice = |name| anyhow!("two models have the name {name:?}: rename one of them");
            models.enter(offered, scheduler).map_err(twice)?;
            lanes += 1;
        }
        let loader = Loader::new(options, device, metrics.clone(), models.clone(), ended)?;
        let loader = AbortOnDropHandle::new(tokio::spawn(loader.run(wanted)));
        let (draining, drain_deadline) = watch::channel(None);
        let closing = CancellationToken::new();
        let shared = Shared {
            gateways: gateways(options),
            hello: WorkerHello {
                worker: options.worker_name(),
                instance: format!("{:016x}", rand::random::<u64>()),
                node: options.node_name.clone(),
                capacity: options.capacity.name().to_owned(),
                pool: options.pool.clone(),
                slots: options.slots * lanes,
                models: Vec::new(),
            },
            models: models.clone(),
            health: health.clone(),
            tokens: metrics.tokens,
            draining: drain_deadline,
            closing: closing.clone(),
        };
        health.serving();
        let attachments = tokio::spawn(attach::run(Arc::new(shared)));
        Ok(Self { models, _loader: loader, scheduler_ended, attachments, health, draining, closing })
    }

    /// Serves until `stop`, then drains.
    async fn until(mut self, mut stop: Stop, drain_timeout: Duration) -> Result<()> {
        tokio::select! {
            () = stop.wait() => {}
            _ = self.scheduler_ended.recv() => {
                return Err(anyhow!("the scheduler ended unexpectedly; its log line says why (out of memory?)"));
            }
        }
        self.drain(drain_timeout).await;
        Ok(())
    }

    /// Lets running requests finish, hands back what has not finished in time, and leaves.
    async fn drain(self, timeout: Duration) {
        tracing::info!(timeout_seconds = timeout.as_secs(), "draining");
        self.health.draining();
        self.draining.send_replace(Some(unix_time_ms() + timeout.as_millis() as u64));
        self.tell_all(|| Command::Drain).await;
        if tokio::time::timeout(timeout.saturating_sub(HAND_BACK), self.idle()).await.is_err() {
            tracing::warn!("requests are still running at the deadline; their gateways continue them elsewhere");
            self.tell_all(|| Command::HandBack).await;
            if tokio::time::timeout(HAND_BACK, self.idle()).await.is_err() {
                tracing::warn!("a step did not end in time to hand its requests back");
            }
        }
        self.closing.cancel();
        if let Err(error) = self.attachments.await {
            tracing::warn!(%error, "the attachments did not end well");
        }
    }

    async fn tell_all(&self, command: impl Fn() -> Command) {
        for scheduler in self.models.schedulers() {
            scheduler.send(command()).await;
        }
    }

    /// Until nothing runs or waits.
    async fn idle(&self) {
        for scheduler in self.models.schedulers() {
            let mut occupancy = scheduler.occupancy();
            if occupancy.wait_for(|now| now.running + now.waiting == 0).await.is_err() {
                tracing::debug!("a scheduler has ended");
            }
        }
    }
}

/// A scheduler's thread.
pub struct Thread {
    thread: std::thread::JoinHandle<()>,
    /// Its end is no news.
    expected: Arc<AtomicBool>,
}

impl Thread {
    /// It will end because nobody needs it any more.
    pub fn is_expected(&self) {
        self.expected.store(true, Ordering::Relaxed);
    }

    /// Until it has ended, and its memory is free.
    pub async fn wait(self) {
        let joined = tokio::task::spawn_blocking(move || self.thread.join()).await;
        if !matches!(joined, Ok(Ok(()))) {
            tracing::warn!("a scheduler that was not needed any more did not end well");
        }
    }
}

/// Runs a model's batch on a thread of its own. `ended` is told when that ends without being expected to.
pub fn start_scheduler(
    model: &str,
    engine: Engine,
    slots: usize,
    metrics: Metrics,
    ended: mpsc::Sender<()>,
) -> Result<(Handle, Thread)> {
    let (scheduler, handle) = Scheduler::new(model, engine, slots, metrics);
    let expected = Arc::new(AtomicBool::new(false));
    let announce = Announce { ended, expected: expected.clone() };
    let thread = std::thread::Builder::new()
        .name("scheduler".to_owned())
        .spawn(move || {
            let _announce = announce;
            scheduler.run();
        })
        .context("starting the scheduler")?;
    Ok((handle, Thread { thread, expected }))
}

/// Says that its thread has ended, however it did.
struct Announce {
    ended: mpsc::Sender<()>,
    expected: Arc<AtomicBool>,
}

impl Drop for Announce {
    fn drop(&mut self) {
        if !self.expected.load(Ordering::Relaxed) {
            // A full channel has said it already.
            let _ = self.ended.try_send(());
        }
    }
}

fn gateways(options: &Options) -> Gateways {
    Gateways {
        url: options.gateway.clone(),
        server_name: options.gateway_server_name.clone(),
        ca: options.ca.clone(),
        token: TokenFile::new(&options.token_file),
    }
}

fn unix_time_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_millis() as u64)
}
