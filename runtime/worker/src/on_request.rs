//! Loads models that gateways ask for, one after another, into bounded memory: the one used longest ago goes when
//! another needs the room and nothing runs in it. Where something runs in all of them, one after a while takes no more,
//! and goes once what runs has ended: so that a model that is always busy does not keep out one that is waited for.

use crate::health::explain;
use crate::metrics::Metrics;
use crate::model::{Source, attempt};
use crate::models::Models;
use crate::options::Options;
use crate::run::{Thread, start_scheduler};
use crate::scheduler::Handle;
use anyhow::{Result, anyhow};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::Device;
use tokio::sync::mpsc;

const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long a model has to itself before it must make room although requests run in it.
const TURN: Duration = Duration::from_secs(10);
/// After one could not be loaded.
const PAUSE: Duration = Duration::from_secs(15);

pub struct Loader {
    pub options: Options,
    pub device: Device,
    pub metrics: Metrics,
    pub models: Arc<Models>,
    pub ended: mpsc::Sender<()>,
    sources: HashMap<String, Source>,
    loaded: Vec<Loaded>,
    /// Until when one that could not be loaded is left alone.
    failed: HashMap<String, Instant>,
}

/// A model with its thread.
struct Loaded {
    name: String,
    bytes: u64,
    scheduler: Handle,
    thread: Thread,
    /// It takes nothing new.
    withdrawn: bool,
    since: Instant,
}

impl Loader {
    /// Offers the models that the options name. `scratch`: the folder for models' files.
    pub fn new(
        options: &Options,
        scratch: &Path,
        device: Device,
        metrics: Metrics,
        models: Arc<Models>,
        ended: mpsc::Sender<()>,
    ) -> Result<Self> {
        let mut sources = HashMap::new();
        for (index, (name, uri)) in options.on_request.iter().enumerate() {
            if !models.announce(name, false) {
                return Err(anyhow!("two models have the name {name:?}: rename one of them"));
            }
            let folder = scratch.join(format!("on-request-{index}"));
            sources.insert(name.clone(), Source { name: name.clone(), uri: uri.clone(), folder, adapters: Vec::new() });
        }
        let options = options.clone();
        Ok(Self { options, device, metrics, models, ended, sources, loaded: Vec::new(), failed: HashMap::new() })
    }

    pub async fn run(mut self, mut wanted: mpsc::Receiver<String>) {
        while let Some(name) = wanted.recv().await {
            let resting = self.failed.get(&name).is_some_and(|until| *until > Instant::now());
            if resting || self.models.lane(&name).is_ok() {
                continue;
            }
            if let Err(error) = self.load(&name).await {
                let reason = explain(&error);
                tracing::warn!(model = name, reason, "the model cannot be loaded");
                self.models.tell(&name, format!("cannot be loaded: {reason}"));
                self.failed.insert(name, Instant::now() + PAUSE);
            }
        }
    }

    async fn load(&mut self, name: &str) -> Result<()> {
        // What is loaded at the start is under way already.
        let Some(source) = self.sources.get(name).cloned() else { return Ok(()) };
        self.models.tell(name, "loading: looking at its size".to_owned());
        let bytes = self.bytes(&source.uri).await?;
        self.make_room(name, bytes).await?;
        let tell = |progress: String| self.models.tell(name, format!("loading: {progress}"));
        let served = attempt(&source, &self.options, self.device, &tell).await?;
        let slots = self.options.slots as usize;
        let (scheduler, thread) =
            start_scheduler(name, served.engine, slots, self.metrics.clone(), self.ended.clone())?;
        self.models.enter(served.models, scheduler.clone()).map_err(|name| anyhow!("{name} is there already"))?;
        let (name, since) = (name.to_owned(), Instant::now());
        self.loaded.push(Loaded { name, bytes, scheduler, thread, withdrawn: false, since });
        Ok(())
    }

    /// What a model takes in memory, about: its files as they are, and room for keys and values.
    async fn bytes(&self, uri: &str) -> Result<u64> {
        let files: u64 = vicuna_checkpoint::sizes(uri).await?.iter().map(|(_, bytes)| bytes).sum();
        Ok(files + (u64::from(self.options.kv_memory_mib) << 20))
    }

    async fn make_room(&mut self, name: &str, needed: u64) -> Result<()> {
        let limit = u64::from(self.options.on_request_memory_mib) << 20;
        if needed > limit {
            return Err(anyhow!(
                "it needs {} MiB with its keys and values, and all models on request may take {} MiB; raise \
                 --on-request-memory-mib or lower --kv-memory-mib",
                needed >> 20,
                limit >> 20
            ));
        }
        while self.loaded.iter().map(|loaded| loaded.bytes).sum::<u64>() + needed > limit {
            if let Some(index) = self.least_used(Loaded::is_idle) {
                self.unload(index).await;
                continue;
            }
            self.models.tell(name, "loading: waits for another model to make room".to_owned());
            if self.loaded.iter().all(|loaded| !loaded.withdrawn)
                && let Some(index) = self.least_used(|loaded| loaded.since.elapsed() >= TURN)
            {
                self.loaded[index].withdrawn = true;
                drop(self.models.withdraw(&self.loaded[index].name));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    fn least_used(&self, may_go: impl Fn(&Loaded) -> bool) -> Option<usize> {
        let those = (0..self.loaded.len()).filter(|index| may_go(&self.loaded[*index]));
        those.min_by_key(|index| {
            let loaded = &self.loaded[*index];
            // One that takes nothing more goes first.
            (!loaded.withdrawn, self.models.lane(&loaded.name).map_or(loaded.since, |lane| lane.used()))
        })
    }

    /// Its thread ends once all that it was given has ended.
    async fn unload(&mut self, index: usize) {
        let Loaded { name, scheduler, thread, .. } = self.loaded.swap_remove(index);
        tracing::info!(model = name, "the model makes room");
        thread.is_expected();
        drop(self.models.withdraw(&name));
        self.models.forget(&scheduler);
        drop(scheduler);
        thread.wait().await;
    }
}

impl Loaded {
    fn is_idle(&self) -> bool {
        let now = *self.scheduler.occupancy().borrow();
        now.running + now.waiting == 0
    }
}
