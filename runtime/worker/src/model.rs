//! Getting the models: from the object store to weights on the device. An unavailable model is asked
//! for again and again, and why it is unavailable is said where people look.

use crate::completion::Vocabulary;
use crate::detokenize::TokenBytes;
use crate::grammar::Grammars;
use crate::health::{Health, explain};
use crate::options::Options;
use anyhow::{Context, Result, anyhow};
use rand::Rng;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::Device;
use vicuna_data::template::{Encoder, Template};
use vicuna_model::inference::{Engine, EngineOptions};
use vicuna_model::lora::{self, Adapter};
use vicuna_model::{Config, Pretrained};
use vicuna_protocol::inference::ModelOffer;

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
struct Source {
    name: String,
    uri: String,
    folder: PathBuf,
    /// Names and URIs of what is offered beside it.
    adapters: Vec<(String, String)>,
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

/// Fetches and loads all models, trying again for `model_patience` while one cannot be had. The error
/// is then the last reason.
pub async fn obtain(options: &Options, device: Device, health: &Health) -> Result<Vec<Served>> {
    let mut served = Vec::new();
    for (index, (name, uri)) in options.models().into_iter().enumerate() {
        let folder = if index == 0 { "model".to_owned() } else { format!("model-{index}") };
        let adapters = if index == 0 { options.adapters.clone() } else { Vec::new() };
        let source = Source { name, uri, folder: options.scratch.join(folder), adapters };
        served.push(obtain_one(&source, options, device, health).await?);
    }
    Ok(served)
}

async fn obtain_one(source: &Source, options: &Options, device: Device, health: &Health) -> Result<Served> {
    let started = Instant::now();
    let mut pause = FIRST_RETRY;
    loop {
        let error = match attempt(source, options, device, health).await {
            Ok(served) => return Ok(served),
            Err(error) => error,
        };
        report(source, health, &error);
        if started.elapsed() + pause > options.model_patience {
            return Err(error);
        }
        tokio::time::sleep(pause.mul_f64(rand::rng().random_range(0.8..1.2))).await;
        pause = (pause * 2).min(SLOWEST_RETRY);
    }
}

fn report(source: &Source, health: &Health, error: &anyhow::Error) {
    let reason = explain(error);
    tracing::warn!(uri = source.uri, reason, "the model is unavailable");
    println!(
        "{}",
        serde_json::json!({ "event": "modelUnavailable", "model": source.name, "uri": source.uri, "reason": reason })
    );
    health.model_unavailable(&reason);
}

async fn attempt(source: &Source, options: &Options, device: Device, health: &Health) -> Result<Served> {
    let model = fetch(&source.name, &source.uri, &source.folder, health).await?;
    let base = base(source, &model, health).await?;
    let mut adapters = Vec::new();
    for (index, (name, uri)) in source.adapters.iter().enumerate() {
        let fetched = fetch(name, uri, &source.adapter_folder(index), health).await;
        adapters.push((name.clone(), fetched.with_context(|| format!("the adapter {name} at {uri}"))?));
    }
    health.loading(format!("the model {} is being loaded", source.name));
    let (name, settings) = (source.name.clone(), options.clone());
    let files = Files { model, base, adapters };
    let loading = tokio::task::spawn_blocking(move || load(&name, &files, &settings, device));
    let loaded = loading.await.context("loading the model was interrupted")?;
    if loaded.is_err() {
        for folder in source.folders() {
            forget(&folder).await;
        }
    }
    loaded.with_context(|| format!("the model {} cannot be used", source.uri))
}

async fn fetch(name: &str, uri: &str, folder: &Path, health: &Health) -> Result<PathBuf> {
    let told = |done, total| health.loading(format!("fetched {done} of {total} bytes of {name}"));
    Ok(vicuna_checkpoint::fetch(uri, folder, told).await?)
}

/// The base model of what was fetched, if that is an adapter.
async fn base(source: &Source, path: &Path, health: &Health) -> Result<Option<PathBuf>> {
    if !lora::is_adapter(path) {
        return Ok(None);
    }
    let unusable = || format!("the adapter {} cannot be used", source.uri);
    let uri = Adapter::load(path).with_context(unusable)?.base;
    let name = format!("the base model of {}", source.name);
    let fetched = fetch(&name, &uri, &source.base_folder(), health).await;
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
    let offering = Offering {
        model: &model,
        engine: &engine,
        bytes: Arc::new(TokenBytes::of(&model.tokenizer)),
        template: options.template.as_deref(),
    };
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
    bytes: Arc<TokenBytes>,
    /// A template that takes the place of theirs.
    template: Option<&'a str>,
}

impl Offering<'_> {
    /// The bare model as `name`; `own` is its chat template.
    fn of(&self, name: &str, weights_digest: &str, own: Option<&str>) -> Result<Offered> {
        let (config, engine) = (&self.model.config, self.engine);
        let encoder = template(self.model, own, self.template)?.bind(&self.model.tokenizer)?;
        let end_tokens = end_tokens(config, &encoder);
        let vocabulary = Vocabulary {
            grammars: grammars(&self.bytes, config.vocab, &end_tokens),
            bytes: self.bytes.clone(),
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
            tools: false,
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

/// The model's own end tokens and those of the template.
fn end_tokens(config: &Config, encoder: &Encoder) -> Arc<[u32]> {
    let mut tokens = config.eos.clone();
    tokens.extend(encoder.end_tokens());
    tokens.sort_unstable();
    tokens.dedup();
    tokens.into()
}
