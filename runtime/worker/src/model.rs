//! Getting the models: from the object store to weights on the device. An unavailable model is asked
//! for again and again, and why it is unavailable is said where people look.

use crate::completion::Vocabulary;
use crate::detokenize::TokenBytes;
use crate::grammar::Grammars;
use crate::health::{Health, explain};
use crate::models::Models;
use crate::options::Options;
use anyhow::{Context, Result, anyhow};
use rand::Rng;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::Device;
use vicuna_checkpoint::Cache;
use vicuna_checkpoint::cache::{Entry, Progress};
use vicuna_data::template::{Encoder, Template};
use vicuna_model::inference::{Engine, EngineOptions};
use vicuna_model::lora::{self, Adapter};
use vicuna_model::{Config, Pretrained};
use vicuna_protocol::inference::ModelOffer;
use vicuna_protocol::tools::Dialect;

const FIRST_RETRY: Duration = Duration::from_millis(500);
const SLOWEST_RETRY: Duration = Duration::from_secs(10);

/// An engine, ready to serve, and what it is offered as.
pub struct Served {
    pub engine: Engine,
    /// The bare model, then its adapters.
    pub models: Vec<Offered>,
}

/// A model by its public name.
pub struct Offered {
    /// Which of the engine's adapters computes it; `None`: the bare model.
    pub adapter: Option<usize>,
    pub encoder: Encoder,
    pub vocabulary: Vocabulary,
    pub offer: ModelOffer,
}

/// Which model, and where its files go.
#[derive(Clone, Debug)]
pub struct Source {
    pub name: String,
    pub uri: String,
    pub folder: PathBuf,
    /// Names and URIs of what is offered beside it.
    pub adapters: Vec<(String, String)>,
}

impl Source {
    /// Where the base model goes, if this is an adapter.
    fn base_folder(&self) -> PathBuf {
        self.folder.with_extension("base")
    }

    /// Where an adapter that is offered beside it goes.
    fn adapter_folder(&self, index: usize) -> PathBuf {
        self.folder.with_extension(format!("adapter-{index}"))
    }

    /// Public names, its own and its adapters'.
    fn names(&self) -> impl Iterator<Item = &str> {
        [self.name.as_str()].into_iter().chain(self.adapters.iter().map(|(name, _)| name.as_str()))
    }

    fn folders(&self) -> impl Iterator<Item = PathBuf> {
        let adapters = (0..self.adapters.len()).map(|index| self.adapter_folder(index));
        [self.folder.clone(), self.base_folder()].into_iter().chain(adapters)
    }
}

/// A model's files on this machine.
#[derive(Clone, Debug)]
pub struct Files {
    pub model: PathBuf,
    /// If `model` is an adapter: its base model, to whose weights it is added.
    pub base: Option<PathBuf>,
    /// By public name: what is computed beside the weights.
    pub adapters: Vec<(String, PathBuf)>,
}

/// What is loaded from the start on. `scratch`: the folder for models' files.
pub fn sources(options: &Options, scratch: &Path) -> Vec<Source> {
    let source = |(index, (name, uri))| {
        let folder = if index == 0 { "model".to_owned() } else { format!("model-{index}") };
        let adapters = if index == 0 { options.adapters.clone() } else { Vec::new() };
        Source { name, uri, folder: scratch.join(folder), adapters }
    };
    options.models().into_iter().enumerate().map(source).collect()
}

/// Who hears what becomes of a model that is loaded at the start: probes, and the gateways' clients.
#[derive(Clone, Copy)]
pub struct Audience<'a> {
    pub health: &'a Health,
    pub models: &'a Models,
}

/// Fetches and loads a model, trying again for `model_patience` while it cannot be had. The error
/// is then the last reason.
pub async fn obtain(source: &Source, options: &Options, device: Device, audience: Audience<'_>) -> Result<Served> {
    let started = Instant::now();
    let mut pause = FIRST_RETRY;
    loop {
        let tell = |progress: String| {
            source.names().for_each(|name| audience.models.tell(name, format!("loading: {progress}")));
            audience.health.loading(progress);
        };
        let error = match attempt(source, options, device, &tell).await {
            Ok(served) => return Ok(served),
            Err(error) => error,
        };
        report(source, audience, &error);
        if started.elapsed() + pause > options.model_patience {
            return Err(error);
        }
        tokio::time::sleep(pause.mul_f64(rand::rng().random_range(0.8..1.2))).await;
        pause = (pause * 2).min(SLOWEST_RETRY);
    }
}

fn report(source: &Source, audience: Audience<'_>, error: &anyhow::Error) {
    let reason = explain(error);
    tracing::warn!(uri = source.uri, reason, "the model is unavailable");
    println!(
        "{}",
        serde_json::json!({ "event": "modelUnavailable", "model": source.name, "uri": source.uri, "reason": reason })
    );
    source.names().for_each(|name| audience.models.tell(name, format!("cannot be loaded: {reason}")));
    audience.health.model_unavailable(&reason);
}

/// Who hears how far loading is.
pub type Tell<'a> = &'a (dyn Fn(String) + Send + Sync);

/// Fetches and loads a model, once.
pub async fn attempt(source: &Source, options: &Options, device: Device, tell: Tell<'_>) -> Result<Served> {
    let mut fetching = Fetching::new(options, tell);
    let model = fetching.fetch(&source.name, &source.uri, &source.folder).await?;
    let base = base(source, &model, &mut fetching).await?;
    let mut adapters = Vec::new();
    for (index, (name, uri)) in source.adapters.iter().enumerate() {
        let fetched = fetching.fetch(name, uri, &source.adapter_folder(index)).await;
        adapters.push((name.clone(), fetched.with_context(|| format!("the adapter {name} at {uri}"))?));
    }
    tell(format!("the model {} is being loaded", source.name));
    let (name, settings) = (source.name.clone(), options.clone());
    let files = Files { model, base, adapters };
    let loading = tokio::task::spawn_blocking(move || load(&name, &files, &settings, device));
    let loaded = loading.await.context("loading the model was interrupted")?;
    if loaded.is_err() {
        for folder in source.folders() {
            forget(&folder).await;
        }
        fetching.discard();
    }
    loaded.with_context(|| format!("the model {} cannot be used", source.uri))
}

/// Gets what a model is made of, by way of the node's cache where there is one.
struct Fetching<'a> {
    cache: Option<Cache>,
    tell: Tell<'a>,
    /// In use until all is loaded.
    entries: Vec<Entry>,
}

impl<'a> Fetching<'a> {
    fn new(options: &Options, tell: Tell<'a>) -> Self {
        let cache = options.cache.as_ref().map(|folder| Cache::new(folder.clone(), options.cache_mib << 20));
        Self { cache, tell, entries: Vec::new() }
    }

    /// `folder`: where it goes without a cache.
    async fn fetch(&mut self, name: &str, uri: &str, folder: &Path) -> Result<PathBuf> {
        if let Some(path) = self.cached(name, uri).await? {
            return Ok(path);
        }
        let told = |done, all| (self.tell)(format!("fetched {} of {name}", percent(done, all)));
        Ok(vicuna_checkpoint::fetch(uri, folder, told).await?)
    }

    /// What lies on a disk is not put on another; none, too, where the cache has no room.
    async fn cached(&mut self, name: &str, uri: &str) -> Result<Option<PathBuf>> {
        let Some(cache) = self.cache.as_ref().filter(|_| !uri.starts_with("file:")) else {
            return Ok(None);
        };
        let tell = self.tell;
        let told = |progress| {
            tell(match progress {
                Progress::Waits => format!("waits for another worker of this node that fetches {name}"),
                Progress::Fetched(done, all) => format!("fetched {} of {name}", percent(done, all)),
                Progress::Compared(done, all) => {
                    format!("compared {} of {name} in the node's cache", percent(done, all))
                }
            });
        };
        let entry = cache.get(uri, told).await?;
        if entry.is_none() {
            tracing::warn!(uri, "the node's cache has no room for it; it goes into the scratch folder");
        }
        let path = entry.as_ref().map(|entry| entry.path.clone());
        self.entries.extend(entry);
        Ok(path)
    }

    /// What was fetched cannot be loaded, and may be at fault.
    fn discard(self) {
        self.entries.into_iter().for_each(Entry::discard);
    }
}

/// In whole hundredths: what is told changes no more often.
fn percent(done: u64, all: u64) -> String {
    format!("{} %", done.saturating_mul(100).checked_div(all).unwrap_or(100))
}

/// The base model of what was fetched, if that is an adapter.
async fn base(source: &Source, path: &Path, fetching: &mut Fetching<'_>) -> Result<Option<PathBuf>> {
    if !lora::is_adapter(path) {
        return Ok(None);
    }
    let unusable = || format!("the adapter {} cannot be used", source.uri);
    let uri = Adapter::load(path).with_context(unusable)?.base;
    let name = format!("the base model of {}", source.name);
    let fetched = fetching.fetch(&name, &uri, &source.base_folder()).await;
    let fetched = fetched.with_context(|| format!("the base model {uri:?} of the adapter {}", source.uri))?;
    Ok(Some(fetched))
}

/// Files of the right size are not fetched again; those of a model that does not load must be.
async fn forget(folder: &Path) {
    let removed = tokio::fs::remove_dir_all(folder).await;
    if let Err(error) = removed
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(%error, folder = %folder.display(), "cannot remove the model's files");
    }
}

/// Loads, checks and names a model on disk, and its adapters.
pub fn load(name: &str, files: &Files, options: &Options, device: Device) -> Result<Served> {
    let model = match &files.base {
        Some(base) => vicuna_model::load_adapted(base, &files.model)?,
        None => vicuna_model::load(&files.model)?,
    };
    let adapters = files.adapters.iter().map(adapter).collect::<Result<Vec<_>>>()?;
    let engine = Engine::adapted(&model, &adapters, &engine_options(options, &model, device))?;
    let offering = Offering { model: &model, engine: &engine, template: options.template.as_deref() };
    let digest = vicuna_model::weights_digest(&model.tensors)?;
    let mut models = vec![offering.of(name, &digest, model.chat_template.as_deref())?];
    for (index, (adapter, (name, _))) in adapters.iter().zip(&files.adapters).enumerate() {
        tracing::info!(adapter = name, base = adapter.base, "an adapter is offered beside the model");
        let own = adapter.chat_template.as_deref().or(model.chat_template.as_deref());
        models.push(Offered { adapter: Some(index), ..offering.of(name, &adapter.digest(&digest)?, own)? });
    }
    Ok(Served { engine, models })
}

fn adapter((name, path): &(String, PathBuf)) -> Result<Adapter> {
    let unusable = || format!("the adapter {name}");
    if !lora::is_adapter(path) {
        return Err(anyhow!("there is no adapter_config.json, so it is not a PEFT adapter")).with_context(unusable);
    }
    Adapter::load(path).with_context(unusable)
}

/// What all names of an engine have in common.
struct Offering<'a> {
    model: &'a Pretrained,
    engine: &'a Engine,
    /// A template that takes the place of theirs.
    template: Option<&'a str>,
}

impl Offering<'_> {
    /// The bare model as `name`; `own` is its chat template.
    fn of(&self, name: &str, weights_digest: &str, own: Option<&str>) -> Result<Offered> {
        let (config, engine) = (&self.model.config, self.engine);
        let encoder = template(self.model, own, self.template)?.bind(&self.model.tokenizer)?;
        let end_tokens = end_tokens(config, &encoder);
        let dialect = dialect(&encoder);
        let marks = dialect.map_or(&[][..], Dialect::marks);
        let bytes = Arc::new(TokenBytes::of(&self.model.tokenizer, marks));
        let vocabulary = Vocabulary {
            grammars: grammars(&bytes, config.vocab, &end_tokens),
            bytes,
            dialect,
            end_tokens,
            size: config.vocab,
            max_length: engine.max_length(),
        };
        let offer = ModelOffer {
            name: name.to_owned(),
            weights_digest: weights_digest.to_owned(),
            template: encoder.template().name().to_owned(),
            quantization: engine.precision().to_owned(),
            max_length: engine.max_length() as u32,
            tool_dialect: dialect.map_or("", Dialect::name).to_owned(),
            on_request: false,
            progress: String::new(),
            at_start: false,
            min_tokens: true,
            embedding_dimensions: config.hidden as u32,
            json_schema: vocabulary.grammars.is_some(),
            grammars: vocabulary.grammars.is_some(),
        };
        Ok(Offered { adapter: None, encoder, vocabulary, offer })
    }
}

fn engine_options(options: &Options, model: &Pretrained, device: Device) -> EngineOptions {
    EngineOptions {
        device,
        precision: options.precision(device != Device::Cpu && model.is_bf16()),
        max_length: options.max_length.map(|length| length as usize),
        cache_bytes: options.kv_memory_mib as usize * (1 << 20),
        threads: options.threads(),
    }
}

fn grammars(bytes: &TokenBytes, size: usize, end_tokens: &[u32]) -> Option<Grammars> {
    let made = Grammars::new(bytes, size, *end_tokens.first()?);
    made.inspect_err(|reason| tracing::warn!(reason, "completions of this model cannot be held to JSON")).ok()
}

/// The named template, else `own`.
fn template(model: &Pretrained, own: Option<&str>, name: Option<&str>) -> Result<Template> {
    if let Some(name) = name {
        return Ok(Template::named(name)?);
    }
    let source = own.ok_or_else(|| {
        anyhow!("the model has no chat template of its own; name one (vicuna_v1.1 or chatml) in the template field")
    })?;
    let [bos, eos] = model.special_tokens.around();
    Ok(Template::from_jinja(source, bos, eos)?)
}

/// How the model calls tools, if its template does write them down.
fn dialect(encoder: &Encoder) -> Option<Dialect> {
    let dialect = Dialect::of(encoder.template().jinja())?;
    let taken = encoder.takes_tools();
    if !taken {
        tracing::warn!(template = encoder.template().name(), "the template speaks of tools, but does not take them");
    }
    taken.then_some(dialect)
}

/// The model's own end tokens and those of the template.
fn end_tokens(config: &Config, encoder: &Encoder) -> Arc<[u32]> {
    let mut tokens = config.eos.clone();
    tokens.extend(encoder.end_tokens());
    tokens.sort_unstable();
    tokens.dedup();
    tokens.into()
}
