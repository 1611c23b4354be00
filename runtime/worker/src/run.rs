//! From the command line to the end of the process.

use crate::attach::{self, Gateways, Shared};
use crate::health::{Health, explain};
use crate::http;
use crate::metrics::Metrics;
use crate::model::{Audience, obtain, sources};
use crate::models::Models;
use crate::on_request::Loader;
use crate::options::Options;
use crate::scheduler::{Command, Handle, Scheduler};
use crate::scratch::Scratch;
use anyhow::{Context, Result, anyhow};
use std::path::Path;
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
        let scratch = Scratch::open(options.scratch.as_deref())?;
        let (worker, mut scheduler_ended) = Worker::start(&options, &scratch.folder, device, health, metrics)?;
        let loaded = tokio::select! {
            loaded = worker.load(&options, &scratch.folder) => loaded,
            () = stop.wait() => return worker.leave(options.drain_timeout).await,
            _ = scheduler_ended.recv() => return Err(scheduler_died()),
        };
        if let Err(error) = loaded {
            if let Err(error) = worker.leave(options.drain_timeout).await {
                tracing::warn!(%error, "leaving");
            }
            return Err(error);
        }
        worker.until(stop, scheduler_ended, options.drain_timeout).await
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
    device: Device,
    models: Arc<Models>,
    metrics: Metrics,
    _loader: AbortOnDropHandle<()>,
    /// Told when a scheduler's thread ends, by panic too.
    ended: mpsc::Sender<()>,
    attachments: tokio::task::JoinHandle<()>,
    health: Arc<Health>,
    draining: watch::Sender<Option<u64>>,
    closing: CancellationToken,
}

impl Worker {
    /// Dials the gateways at once: they tell those who wait how far loading is. With what is told when a scheduler
    /// ends.
    fn start(
        options: &Options,
        scratch: &Path,
        device: Device,
        health: Arc<Health>,
        metrics: Metrics,
    ) -> Result<(Self, mpsc::Receiver<()>)> {
        let (ended, scheduler_ended) = mpsc::channel(1);
        let (models, wanted) = Models::new();
        let models = Arc::new(models);
        for name in options.names() {
            if !models.announce(&name, true) {
                return Err(named_twice(&name));
            }
        }
        let loader = Loader::new(options, scratch, device, metrics.clone(), models.clone(), ended.clone())?;
        let _loader = AbortOnDropHandle::new(tokio::spawn(loader.run(wanted)));
        let lanes = options.models().len() as u32 + u32::from(!options.on_request.is_empty());
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
            tokens: metrics.tokens.clone(),
            draining: drain_deadline,
            closing: closing.clone(),
        };
        let attachments = tokio::spawn(attach::run(Arc::new(shared)));
        let worker = Self { device, models, metrics, _loader, ended, attachments, health, draining, closing };
        Ok((worker, scheduler_ended))
    }

    /// Loads one model after another; each serves as soon as it is there.
    async fn load(&self, options: &Options, scratch: &Path) -> Result<()> {
        let audience = Audience { health: &self.health, models: &self.models };
        for source in sources(options, scratch) {
            let served = obtain(&source, options, self.device, audience).await?;
            let slots = options.slots as usize;
            let (scheduler, _) =
                start_scheduler(&source.name, served.engine, slots, self.metrics.clone(), self.ended.clone())?;
            self.models.enter(served.models, scheduler).map_err(|name| named_twice(&name))?;
        }
        self.health.serving();
        Ok(())
    }

    /// Goes before all is loaded. A model that is loaded serves already, and its answers end first.
    async fn leave(self, drain_timeout: Duration) -> Result<()> {
        if !self.models.schedulers().is_empty() {
            self.drain(drain_timeout).await;
            return Ok(());
        }
        self.closing.cancel();
        self.attachments.await.context("the attachments did not end well")
    }

    /// Serves until `stop`, then drains.
    async fn until(
        self,
        mut stop: Stop,
        mut scheduler_ended: mpsc::Receiver<()>,
        drain_timeout: Duration,
    ) -> Result<()> {
        tokio::select! {
            () = stop.wait() => {}
            _ = scheduler_ended.recv() => return Err(scheduler_died()),
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

fn scheduler_died() -> anyhow::Error {
    anyhow!("the scheduler ended unexpectedly; its log line says why (out of memory?)")
}

fn named_twice(name: &str) -> anyhow::Error {
    anyhow!("two models have the name {name:?}: rename one of them")
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
