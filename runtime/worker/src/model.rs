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

/// A model, ready to serve.
pub struct Served {
    pub engine: Engine,
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
}

impl Source {
    /// Where the base model goes, if this is an adapter.
    fn base_folder(&self) -> PathBuf {
        self.folder.with_extension("base")
    }
}

/// Fetches and loads all models, trying again for `model_patience` while one cannot be had. The error
/// is then the last reason.
pub async fn obtain(options: &Options, device: Device, health: &Health) -> Result<Vec<Served>> {
    let mut served = Vec::new();
    for (index, (name, uri)) in options.models().into_iter().enumerate() {
        let folder = if index == 0 { "model".to_owned() } else { format!("model-{index}") };
        let source = Source { name, uri, folder: options.scratch.join(folder) };
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
    let path = vicuna_checkpoint::fetch(&source.uri, &source.folder, |done, total| {
        health.loading(format!("fetched {done} of {total} bytes of {}", source.name));
    })
    .await?;
    let base = base(source, &path, health).await?;
    health.loading(format!("the model {} is being loaded", source.name));
    let (name, settings) = (source.name.clone(), options.clone());
    let loading = tokio::task::spawn_blocking(move || load(&name, &path, base.as_deref(), &settings, device));
    let loaded = loading.await.context("loading the model was interrupted")?;
    if loaded.is_err() {
        forget(&source.folder).await;
        forget(&source.base_folder()).await;
    }
    loaded.with_context(|| format!("the model {} cannot be used", source.uri))
}

/// The base model of what was fetched, if that is an adapter.
async fn base(source: &Source, path: &Path, health: &Health) -> Result<Option<PathBuf>> {
    if !lora::is_adapter(path) {
        return Ok(None);
    }
    let unusable = || format!("the adapter {} cannot be used", source.uri);
    let uri = Adapter::load(path).with_context(unusable)?.base;
    let folder = source.base_folder();
    let fetched = vicuna_checkpoint::fetch(&uri, &folder, |done, total| {
        health.loading(format!("fetched {done} of {total} bytes of the base model of {}", source.name));
    });
    let fetched = fetched.await.with_context(|| format!("the base model {uri:?} of the adapter {}", source.uri))?;
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

/// Loads, checks and names a model on disk. With `base` that is the model, and `path` an adapter which is
/// added to its weights.
pub fn load(name: &str, path: &Path, base: Option<&Path>, options: &Options, device: Device) -> Result<Served> {
    let model = match base {
        Some(base) => vicuna_model::load_adapted(base, path)?,
        None => vicuna_model::load(path)?,
    };
    let encoder = template(&model, options.template.as_deref())?.bind(&model.tokenizer)?;
    let engine = Engine::new(&model, &engine_options(options, device))?;
    let bytes = Arc::new(TokenBytes::of(&model.tokenizer));
    let end_tokens = end_tokens(&model.config, &encoder);
    let vocabulary = Vocabulary {
        grammars: grammars(&bytes, model.config.vocab, &end_tokens),
        bytes,
        end_tokens,
        size: model.config.vocab,
        max_length: engine.max_length(),
    };
    let offer = ModelOffer {
        name: name.to_owned(),
        weights_digest: vicuna_model::weights_digest(&model.tensors)?,
        template: encoder.template().name().to_owned(),
        quantization: engine.precision().to_owned(),
        max_length: engine.max_length() as u32,
        tools: false,
        embedding_dimensions: model.config.hidden as u32,
        json_schema: vocabulary.grammars.is_some(),
    };
    Ok(Served { engine, encoder, vocabulary, offer })
}

fn engine_options(options: &Options, device: Device) -> EngineOptions {
    EngineOptions {
        device,
        precision: options.precision(),
        max_length: options.max_length.map(|length| length as usize),
        cache_bytes: options.kv_memory_mib as usize * (1 << 20),
        threads: options.threads(),
    }
}

fn grammars(bytes: &TokenBytes, size: usize, end_tokens: &[u32]) -> Option<Grammars> {
    let made = Grammars::new(bytes, size, *end_tokens.first()?);
    made.inspect_err(|reason| tracing::warn!(reason, "completions of this model cannot be held to JSON")).ok()
}

/// The named template, else the model's own.
fn template(model: &Pretrained, name: Option<&str>) -> Result<Template> {
    if let Some(name) = name {
        return Ok(Template::named(name)?);
    }
    let source = model.chat_template.as_deref().ok_or_else(|| {
        anyhow!("the model has no chat template of its own; name one (vicuna_v1.1 or chatml) in the template field")
    })?;
    let token = |id: Option<u32>| id.and_then(|id| model.tokenizer.id_to_token(id)).unwrap_or_default();
    let (bos, eos) = (token(model.config.bos), token(model.config.eos.first().copied()));
    Ok(Template::from_jinja(source, &bos, &eos)?)
}

/// The model's own end tokens and those of the template.
fn end_tokens(config: &Config, encoder: &Encoder) -> Arc<[u32]> {
    let mut tokens = config.eos.clone();
    tokens.extend(encoder.end_tokens());
    tokens.sort_unstable();
    tokens.dedup();
    tokens.into()
}
