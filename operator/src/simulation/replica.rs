//! One of the operator's processes: it strives for the lease, leads, dies, and is started again.

use super::network::{Life, Link, Network};
use super::watchdog::Watchdog;
use super::{NAMESPACE, Random};
use crate::config::Config;
use crate::context::Context;
use crate::coordinator::feed;
use crate::coordinator::registry::Clock;
use crate::coordinator::service::Service;
use crate::leader::{Elector, Leadership};
use crate::metrics::Metrics;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use vicuna_tests::api_server::ApiServer;

/// Where ranks call while the process leads.
type Door = Arc<Mutex<Option<Service>>>;

pub struct Replica {
    index: usize,
    lives: u64,
    /// How far its clock is ahead.
    skew_ms: u64,
    running: Option<Running>,
    starts_at: Instant,
}

struct Running {
    life: Life,
    door: Door,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Replica {
    pub fn new(index: usize, skew_ms: u64) -> Self {
        Self { index, lives: 0, skew_ms, running: None, starts_at: Instant::now() }
    }

    /// Starts it when it is time to; clears away what has ended. Whether it has.
    pub fn tend(&mut self, server: &ApiServer, network: &Network, watchdog: &Watchdog, random: &mut Random) -> bool {
        let ended = self.running.as_ref().is_some_and(|it| it.life.is_over() || it.task.is_finished());
        if ended {
            self.kill(Duration::from_millis(random.between(500, 8_000)));
        }
        if self.running.is_none() && Instant::now() >= self.starts_at {
            self.start(server, network, watchdog);
        }
        ended
    }

    pub fn kill(&mut self, down_for: Duration) {
        if let Some(running) = self.running.take() {
            running.life.end();
            running.task.abort();
            self.starts_at = Instant::now() + down_for;
        }
    }

    /// Tells it to stop, as a rollout does: it gives its lease back.
    pub fn retire(&self) {
        if let Some(running) = &self.running {
            running.stop.cancel();
        }
    }

    pub fn cut_off(&self, lasts: Duration) {
        if let Some(running) = &self.running {
            running.life.cut_off(Instant::now() + lasts);
        }
    }

    /// Where ranks call, and in which life.
    pub fn door(&self) -> Option<(Service, Life)> {
        let running = self.running.as_ref().filter(|running| !running.life.is_over())?;
        let service = running.door.lock().clone()?;
        Some((service, running.life.clone()))
    }

    fn start(&mut self, server: &ApiServer, network: &Network, watchdog: &Watchdog) {
        self.lives += 1;
        let config = Arc::new(Config {
            pod_name: format!("operator-{}", self.index),
            pod_uid: Some(format!("uid-operator-{}", self.index)),
            namespace: NAMESPACE.to_owned(),
            ..crate::config::tests::sample()
        });
        let instance = format!("{:08x}", self.lives);
        let holder = format!("{}_{}_{instance}", config.pod_name, config.pod_uid.as_deref().unwrap_or_default());
        let life = Life::new(holder);
        let link =
            Link { server: server.clone(), network: network.clone(), life: life.clone(), watchdog: watchdog.clone() };
        let clock = Clock::starting_at(server.store().now_ms() + self.skew_ms);
        let (door, stop) = (Door::default(), CancellationToken::new());
        let process = run(link.client(), config, instance, clock, door.clone(), stop.clone());
        let task = tokio::spawn(process);
        self.running = Some(Running { life, door, stop, task });
    }
}

/// What `run::run` does, without sockets.
async fn run(
    client: kube::Client,
    config: Arc<Config>,
    instance: String,
    clock: Clock,
    door: Door,
    stop: CancellationToken,
) {
    let (elector, leadership) = Elector::new(client.clone(), &config, &instance);
    let leads = async {
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = lead(client, config, leadership, clock, &door) => {}
        }
        door.lock().take();
        stop.cancel();
    };
    tokio::join!(biased; elector.run(stop.clone()), leads);
}

/// Until the lease is lost, or something is wrong.
async fn lead(client: kube::Client, config: Arc<Config>, leadership: Leadership, clock: Clock, door: &Door) {
    leadership.acquired().await;
    let Ok(metrics) = Metrics::new() else { return };
    let wall_clock = Arc::new(move || {
        let seconds = i64::try_from(clock.now_ms() / 1000).unwrap_or_default();
        OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH)
    });
    let started = Context::start(client, config, Arc::new(metrics), leadership, clock, wall_clock).await;
    let Ok((context, told)) = started else { return };
    let context = Arc::new(context);
    if context.watches.ready().await.is_err() {
        return;
    }
    *door.lock() = Some(Service::new(context.clone()));
    tokio::select! {
        biased;
        () = context.leadership.lost() => {}
        () = context.trust.clone().keep_fresh() => {}
        () = feed::run(context.clone()) => {}
        () = crate::training::run(context.clone(), told) => {}
    }
}
