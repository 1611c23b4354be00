//! Gets everything that a rank needs within reach: the base model, the encoded data, the store.

use crate::adapters::{self, AdaptedBase};
use crate::batch::Dataset;
use crate::blocks::{BlockTable, Parameter};
use crate::checkpoint::Publisher;
use crate::collective::Collective;
use crate::evaluation::HeldOut;
use crate::layout::Layout;
use crate::log::Line;
use crate::log::scribe::{self, Scribe};
use crate::memory::limits::Limits;
use crate::memory::remedies::Remedy;
use crate::memory::{self, Need, Workload};
use crate::numerics;
use crate::step::Room;
use parking_lot::Mutex;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use tokio::runtime::Handle;
use vicuna_checkpoint::manifest::{digest, list_manifests};
use vicuna_checkpoint::{Inputs, ManifestRef, Store, StoreError, fetch};
use vicuna_data::prepare::{PrepareError, Prepared, Settings, Source};
use vicuna_data::{Conversation, Language, Length, Mixture, Order, Report, Sequences, Template, identity, read};
use vicuna_model::gguf::Gguf;
use vicuna_model::lora::Lora;
use vicuna_model::{Config, ModelError, OnDisk, Stretch};
use vicuna_protocol::coordinator::Cause;
use vicuna_protocol::gigabytes;
use vicuna_protocol::job::{
    Method, Parameters, Precision, Recipe, Recompute, RopeScaling, RunLength, Scaling, TrainingJob,
};

/// Manifests that a rank reports, at most.
pub const MANIFESTS: usize = 16;
/// How often each identity question is put, with different answers.
const IDENTITY_ROUNDS: usize = 4;
/// Ranks for which memory is estimated: as many as a training may have.
pub const LARGEST_ESTIMATE: u32 = 512;
/// Bytes of a GGUF file within which its header ends: a tokenizer's words and merges are a third of it.
const GGUF_HEADER_BYTES: u64 = 32 << 20;
/// Remedies that are named in a message, at most.
const ADVICE: usize = 3;
/// Where the report of the preparation lies below the checkpoint URI, and in the result.
pub const DATA_REPORT: &str = "data-report.json";

/// Why the rank cannot go on, in words for the person who wrote the job.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{message}")]
pub struct Trouble {
    pub cause: Cause,
    pub message: String,
}

impl Trouble {
    fn new(cause: Cause, message: impl Into<String>) -> Self {
        Self { cause, message: message.into() }
    }
}

/// What all generations of this process share.
#[derive(Debug)]
pub struct Session {
    pub job: TrainingJob,
    pub store: Store,
    pub config: Config,
    pub table: Arc<BlockTable>,
    /// The frozen base, if adapters are trained.
    pub adapted: Option<Mutex<AdaptedBase>>,
    pub data: Dataset,
    /// Sequences that are not trained on (`prepare.holdOut`); empty where none was asked for.
    pub held_out: HeldOut,
    /// What preparing did to the data.
    pub data_report: Report,
    /// The base model, of which no weights are kept.
    pub model: OnDisk,
    /// Jinja source that the result is to carry.
    pub chat_template: String,
    pub device: Device,
    pub threads: i32,
    pub runtime: Handle,
    /// Digest of everything in the job that decides the weights.
    pub recipe_digest: String,
    /// Of this process.
    pub numerics_class: String,
    /// Digests of what was read.
    pub inputs: Inputs,
    pub scratch: PathBuf,
    limits: Limits,
}

/// Where and on what to work.
#[derive(Clone, Debug)]
pub struct Place {
    pub scratch: PathBuf,
    pub device: Device,
    pub threads: i32,
}

/// One attempt; nothing of it is lost that a further attempt could use.
pub async fn prepare(job: TrainingJob, place: Place) -> Result<Session, Trouble> {
    check(&job, place.device)?;
    let store = Store::open(&job.checkpoint.to).map_err(store_trouble)?;
    store.probe().await.map_err(store_trouble)?;
    let model_path = fetch_model(&job, &place).await?;
    let files = fetch_datasets(&job, &place).await?;
    let runtime = Handle::current();
    let assemble = move || assemble(job, store, model_path, &files, place, runtime);
    let assembled = tokio::task::spawn_blocking(assemble).await;
    assembled.unwrap_or_else(|error| {
        let message = format!("preparing failed unexpectedly ({error}); is there enough memory?");
        Err(Trouble::new(Cause::Application, message))
    })
}

/// What the API server does not check.
fn check(job: &TrainingJob, device: Device) -> Result<(), Trouble> {
    let recipe = &job.recipe;
    let wrong = if recipe.global_batch == 0 || recipe.micro_batch == 0 {
        "globalBatch and microBatch must be at least 1"
    } else if !recipe.global_batch.is_multiple_of(recipe.micro_batch) {
        "globalBatch must be a multiple of microBatch"
    } else if recipe.max_length < 2 {
        "maxLength must be at least 2"
    } else if recipe.evaluate_every.is_some() && job.prepare.hold_out.is_none() {
        "evaluateEvery needs data to evaluate on: set prepare.holdOut"
    } else if recipe.rope_scaling.is_some() && recipe.method != Method::Full {
        "ropeScaling changes the model itself, which adapters do not carry: set method to Full, or leave it out"
    } else if recipe.offload && !device.is_cuda() {
        "memory.offload moves layers' inputs from a GPU's memory to the host's, and this worker computes on the CPU: give workers.resources a GPU, or leave offload out"
    } else {
        return Ok(());
    };
    Err(Trouble::new(Cause::Application, wrong))
}

fn store_trouble(error: StoreError) -> Trouble {
    Trouble::new(Cause::Store, error.to_string())
}

/// A source that is not there is that source's trouble; a store that is not, is the store's.
fn source_trouble(cause: Cause, what: &str, error: &StoreError) -> Trouble {
    match error {
        StoreError::NotFound { .. } | StoreError::BadUri { .. } => Trouble::new(cause, format!("{what}: {error}")),
        _ => Trouble::new(Cause::Store, format!("{what}: {error}")),
    }
}

/// A folder of its own for each URI.
fn folder(place: &Place, kind: &str, uri: &str) -> PathBuf {
    let name = digest(uri.as_bytes());
    place.scratch.join(format!("{kind}-{}", &name[..16]))
}

async fn fetch_model(job: &TrainingJob, place: &Place) -> Result<PathBuf, Trouble> {
    let uri = &job.model.from;
    let mut told = 0;
    let progress = |done: u64, total: u64| {
        let tenths = done * 10 / total.max(1);
        if tenths > told {
            told = tenths;
            tracing::info!(bytes = done, total_bytes = total, "fetching the model");
        }
    };
    let fetched = fetch(uri, &folder(place, "model", uri), progress).await;
    fetched.map_err(|error| source_trouble(Cause::Model, "the base model", &error))
}

/// The files of each dataset, in order.
async fn fetch_datasets(job: &TrainingJob, place: &Place) -> Result<Vec<read::Files>, Trouble> {
    let mut all = Vec::with_capacity(job.dataset.len());
    for source in &job.dataset {
        let folder = folder(place, "data", &source.from);
        // What lies there may be what could not be read before it was corrected.
        drop(tokio::fs::remove_dir_all(&folder).await);
        let fetched = fetch(&source.from, &folder, |_, _| ()).await;
        let path = fetched.map_err(|error| source_trouble(Cause::Data, "the dataset", &error))?;
        let files = read::files(&path);
        let files =
            files.map_err(|error| Trouble::new(Cause::Data, format!("the dataset {}: {error}", source.from)))?;
        if !files.skipped.is_empty() {
            let skipped = files.skipped.join(", ");
            tracing::warn!(dataset = source.from, skipped, "files that are not .json, .jsonl or .parquet are not read");
        }
        all.push(files);
    }
    Ok(all)
}

/// What a rank with this memory needs, and what would fit where that does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// For each number of ranks from 1.
    pub needs: Vec<Need>,
    pub remedies: Vec<Remedy>,
}

/// From the model's configuration alone; `None` where that cannot be read: what is wrong is said when the model is.
pub async fn preflight(job: &TrainingJob, device: Device, limits: Limits) -> Result<Option<Estimate>, Trouble> {
    let store = Store::open(&job.model.from).map_err(|error| source_trouble(Cause::Model, "the base model", &error))?;
    let Some(config) = configuration(&store).await else { return Ok(None) };
    let config = stretched(job, config)?;
    let lora = adapters::lora(&job.recipe.method);
    let lora = lora.map_err(|error| Trouble::new(Cause::Application, format!("recipe.lora: {error}")))?;
    let table = BlockTable::of(&config, lora.as_ref());
    let workload = workload(job, &config, &table, device, data_size(job).await);
    let needs: Vec<Need> = (1..=LARGEST_ESTIMATE).map(|ranks| workload.need_within(ranks, limits)).collect();
    let remedies = match needs.iter().all(|need| need.fits(limits)) {
        true => Vec::new(),
        false => memory::remedies::remedies(&workload, limits, 1..=LARGEST_ESTIMATE),
    };
    Ok(Some(Estimate { needs, remedies }))
}

/// Of a directory's `config.json`, or of the header of a GGUF file.
async fn configuration(store: &Store) -> Option<Config> {
    if let Ok(json) = store.get("config.json").await {
        return Config::from_hugging_face(&serde_json::from_slice(&json).ok()?).ok();
    }
    let objects = vicuna_checkpoint::sizes(store.uri()).await.ok()?;
    let mut files = objects.into_iter().map(|(name, _)| name).filter(|name| name.ends_with(".gguf"));
    let (name, None) = (files.next()?, files.next()) else { return None };
    let key = if store.uri().ends_with(&name) { "" } else { name.as_str() };
    let header = store.head(key, GGUF_HEADER_BYTES).await.ok()?;
    Config::from_gguf(&Gguf::header(&header).ok()?).ok()
}

/// The model as it is trained: with a longer context where the recipe asks for one, and long enough for it.
fn stretched(job: &TrainingJob, config: Config) -> Result<Config, Trouble> {
    let wrong = |message: String| Trouble::new(Cause::Application, message);
    let config = match job.recipe.rope_scaling {
        None => config,
        Some(RopeScaling { kind, factor }) => {
            let how = match kind {
                Scaling::Linear => Stretch::Linear,
                Scaling::Llama3 => Stretch::Llama3,
                Scaling::Yarn => Stretch::Yarn,
            };
            config.stretched(how, factor).map_err(|error| wrong(format!("recipe.ropeScaling: {error}")))?
        }
    };
    let (wanted, has) = (job.recipe.max_length as usize, config.max_position);
    if wanted > has {
        let or = match (job.recipe.rope_scaling, config.rope_scaling, &job.recipe.method) {
            (Some(_), ..) => ", or raise recipe.ropeScaling's factor".to_owned(),
            (None, vicuna_model::RopeScaling::Unscaled, Method::Full) => {
                format!(", or set recipe.ropeScaling with a factor of at least {}", wanted.div_ceil(has))
            }
            // It cannot be stretched once more, nor beneath adapters.
            (None, ..) => String::new(),
        };
        let name = &job.model.from;
        let message = format!("recipe.maxLength is {wanted} tokens, and the model {name} is made for {has}");
        return Err(wrong(format!("{message}: lower maxLength{or}")));
    }
    Ok(config)
}

/// Bytes that a rank will hold of the data. What cannot be listed is said when it is fetched.
async fn data_size(job: &TrainingJob) -> u64 {
    let mut bytes = 0;
    for source in &job.dataset {
        bytes += memory::data_bytes(&vicuna_checkpoint::sizes(&source.from).await.unwrap_or_default());
    }
    bytes
}

/// Refuses what fits with no number of ranks; the coordinator sees to it that there are enough where some do.
pub fn refuse_what_does_not_fit(job: &TrainingJob, estimate: &Estimate, limits: Limits) -> Result<(), Trouble> {
    let Estimate { needs, remedies } = estimate;
    let Some(least) = needs.last().filter(|_| !needs.iter().any(|need| need.fits(limits))) else { return Ok(()) };
    let has = |what: &str, bytes: Option<u64>| bytes.map(|bytes| format!("{} {what}", gigabytes(bytes)));
    let has = [has("on the host", limits.host), has("on the device", limits.device)];
    let has = has.into_iter().flatten().collect::<Vec<_>>().join(" and ");
    let advice = match remedies.is_empty() {
        true => ", which no change of the recipe would spare".to_owned(),
        false => {
            let said = |remedy: &Remedy| format!("{remedy} (with at least {} workers)", remedy.ranks);
            format!(", or set {}", remedies.iter().take(ADVICE).map(said).collect::<Vec<_>>().join(", or "))
        }
    };
    let (ranks, name) = (least.ranks, &job.model.from);
    let message = format!(
        "even among {ranks} workers, each needs {least} to train {name}, and has {has}: give workers.resources more memory{advice}"
    );
    Err(Trouble::new(Cause::OutOfMemory, message))
}

fn workload<'a>(
    job: &'a TrainingJob,
    config: &'a Config,
    table: &'a BlockTable,
    device: Device,
    data: u64,
) -> Workload<'a> {
    Workload { config, table, recipe: &job.recipe, gpu: device.is_cuda(), data, slow_store: true }
}

fn assemble(
    job: TrainingJob,
    store: Store,
    model_path: PathBuf,
    files: &[read::Files],
    place: Place,
    runtime: Handle,
) -> Result<Session, Trouble> {
    tch::set_num_threads(place.threads);
    if !job.recipe.reproducibility.is_exact() {
        let fast = vicuna_model::device::be_fast(place.device);
        fast.map_err(|error| Trouble::new(Cause::Application, error.to_string()))?;
    }
    let lora = adapters::lora(&job.recipe.method);
    let lora = lora.map_err(|error| Trouble::new(Cause::Application, format!("recipe.lora: {error}")))?;
    let mut model = OnDisk::open(&model_path).map_err(|error| model_trouble(&job, &model_path, &error))?;
    model.config = stretched(&job, model.config)?;
    let template = template(&job, &model)?;
    let prepared = data(&job, files, &model, &template, &place.scratch)?;
    let data = ordered(&job, prepared.examples, &prepared.mixtures)?;
    let table = BlockTable::of(&model.config, lora.as_ref());
    let freeze = |lora| {
        let adapted = AdaptedBase::new(&job.recipe, lora, &model, kind(&job), place.device);
        adapted.map(Mutex::new).map_err(|error| Trouble::new(Cause::Model, error.to_string()))
    };
    let adapted = lora.map(freeze).transpose()?;
    // Of a whole model's weights no digest is needed: they are in its checkpoints.
    let base = adapted.as_ref().map(|adapted| adapted.lock().base_digest.clone());
    let inputs = Inputs { data: Some(prepared.digest), base };
    tracing::info!(data = inputs.data, base = inputs.base, "read");
    Ok(Session {
        store,
        adapted,
        config: model.config.clone(),
        table: Arc::new(table),
        data,
        held_out: HeldOut::new(prepared.held_out, job.recipe.micro_batch as usize),
        data_report: prepared.report,
        model,
        chat_template: template.jinja().to_owned(),
        device: place.device,
        threads: place.threads,
        runtime,
        recipe_digest: recipe_digest(&job),
        numerics_class: numerics::class(place.device, place.threads),
        inputs,
        scratch: place.scratch,
        limits: memory::limits::limits(place.device),
        job,
    })
}

/// A model that cannot be read may be replaced in the bucket: the next attempt fetches it anew.
fn model_trouble(job: &TrainingJob, path: &Path, error: &ModelError) -> Trouble {
    let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    if let Err(error) = removed {
        tracing::warn!(%error, path = %path.display(), "an unreadable model could not be removed");
    }
    Trouble::new(Cause::Model, format!("the base model {}: {error}", job.model.from))
}

fn template(job: &TrainingJob, model: &OnDisk) -> Result<Template, Trouble> {
    let failed = |error: vicuna_data::TemplateError| Trouble::new(Cause::Model, error.to_string());
    if let Some(name) = &job.model.template {
        return Template::named(name).map_err(failed);
    }
    let [bos, eos] = model.special_tokens.around();
    match &model.chat_template {
        Some(source) => Template::from_jinja(source, bos, eos).map_err(failed),
        None => Err(Trouble::new(
            Cause::Model,
            format!("the base model {} has no chat template: set model.template", job.model.from),
        )),
    }
}

fn data(
    job: &TrainingJob,
    files: &[read::Files],
    model: &OnDisk,
    template: &Template,
    scratch: &Path,
) -> Result<Prepared, Trouble> {
    let bound = template.bind(&model.tokenizer);
    let encoder = bound.map_err(|error| Trouble::new(Cause::Model, error.to_string()))?;
    let sources = job.dataset.iter().zip(files).map(|(set, files)| Source {
        name: set.from.clone(),
        files: files.paths.clone(),
        skipped: files.skipped.clone(),
        weight: set.weight,
    });
    let sources: Vec<Source> = sources.collect();
    let prepared = vicuna_data::prepare::prepare(&sources, &who(job), &settings(job)?, &encoder, scratch);
    let prepared = prepared.map_err(|error| {
        let cause = if matches!(error, PrepareError::Scratch(_)) { Cause::Application } else { Cause::Data };
        Trouble::new(cause, error.to_string())
    })?;
    check_ids(&prepared, model)?;
    tracing::info!(summary = prepared.report.summary(), "data prepared");
    if let Some(encoded) = &prepared.report.encoded {
        tracing::info!(%encoded, "data encoded");
    }
    if job.prepare.hold_out.is_some() && prepared.held_out.is_empty() {
        tracing::warn!("prepare.holdOut put no conversation aside: the data are too few for so small a share");
    }
    Ok(prepared)
}

/// The embedding has a row for every token, or torch would fail in the midst of the training.
fn check_ids(prepared: &Prepared, model: &OnDisk) -> Result<(), Trouble> {
    let (id, rows) = (prepared.largest_id, model.config.vocab);
    if (id as usize) < rows {
        return Ok(());
    }
    let token = model.tokenizer.id_to_token(id).unwrap_or_default();
    let message = format!(
        "the token {token:?} has the id {id}, and the model's embedding has {rows} rows: tokenizer.json and the weights do not belong together; give the model the tokenizer that it was trained with, or enlarge its embedding"
    );
    Err(Trouble::new(Cause::Model, message))
}

fn settings(job: &TrainingJob) -> Result<Settings, Trouble> {
    let prepare = &job.prepare;
    let language = prepare.language.as_deref().map(|code| {
        Language::parse(code).ok_or_else(|| {
            let known = Language::codes().join(" ");
            let message = format!("prepare.language {code:?} is not among those that can be told apart: {known}");
            Trouble::new(Cause::Data, message)
        })
    });
    Ok(Settings {
        clean: prepare.clean,
        language: language.transpose()?,
        split_at: prepare.split_at.map(|tokens| tokens as usize),
        hold_out: prepare.hold_out.unwrap_or(0.0),
        max_length: job.recipe.max_length as usize,
        pack: job.recipe.packing,
    })
}

/// Conversations that teach the model who it is.
fn who(job: &TrainingJob) -> Vec<Conversation> {
    let count = identity::questions() * IDENTITY_ROUNDS;
    let identity = job.prepare.identity.as_ref();
    identity.map_or_else(Vec::new, |who| identity::conversations(&who.name, &who.organization, job.recipe.seed, count))
}

fn ordered(job: &TrainingJob, examples: Sequences, mixtures: &[Mixture]) -> Result<Dataset, Trouble> {
    let recipe = &job.recipe;
    let length = match recipe.length {
        RunLength::Epochs(epochs) => Length::Epochs(epochs),
        RunLength::Steps(steps) => Length::Steps(steps),
    };
    let order = Order::new(recipe.seed, recipe.global_batch, length, mixtures)
        .map_err(|error| Trouble::new(Cause::Data, error.to_string()))?;
    Ok(Dataset::new(examples, order, recipe.micro_batch as usize))
}

fn kind(job: &TrainingJob) -> Kind {
    match job.recipe.precision {
        Precision::Fp32 => Kind::Float,
        Precision::Bf16 => Kind::BFloat16,
    }
}

/// Model, data, preparation and recipe, as the job writes them.
fn recipe_digest(job: &TrainingJob) -> String {
    let (recompute, parameters) = (Recompute::default(), Parameters::default());
    let recipe = Recipe { evaluate_every: None, recompute, parameters, offload: false, ..job.recipe.clone() };
    let parts = (&job.model, &job.dataset, &job.prepare, &recipe);
    // Plain structs always serialise.
    digest(&serde_json::to_vec(&parts).unwrap_or_default())
}

impl Session {
    /// Micro-batches in a full step.
    pub fn micro_batches(&self) -> u32 {
        self.job.recipe.global_batch.div_ceil(self.job.recipe.micro_batch)
    }

    /// Puts the data report into the store.
    pub async fn write_data_report(&self) -> Result<(), StoreError> {
        self.store.put(DATA_REPORT, self.data_report_json().into()).await
    }

    pub fn data_report_json(&self) -> String {
        // Plain structs always serialise.
        serde_json::to_string_pretty(&self.data_report).unwrap_or_default()
    }

    /// Who writes the log of a generation that starts from step `base` in the store, or from memory.
    pub fn scribe(&self, base: Option<u64>) -> Scribe {
        Scribe::new(&self.store, &self.job.uid, base)
    }

    /// The log as far as it is in the store.
    pub async fn log(&self) -> Result<Vec<Line>, StoreError> {
        scribe::read(&self.store, &self.job.uid).await
    }

    /// Whether the held-out loss is wanted after `step` steps.
    pub fn evaluates_after(&self, step: u64) -> bool {
        let due = match self.job.recipe.evaluate_every {
            Some(every) => step.is_multiple_of(every),
            None => step > 0 && self.data.cursor(step).epoch > self.data.cursor(step - 1).epoch,
        };
        step > 0 && !self.held_out.is_empty() && (due || step == self.data.steps())
    }

    /// The complete checkpoints in the store, newest first.
    pub async fn manifests(&self) -> Result<Vec<ManifestRef>, StoreError> {
        list_manifests(&self.store, &self.job.uid, MANIFESTS).await
    }

    /// Bytes of the prepared sequences.
    pub fn data_bytes(&self) -> u64 {
        self.data.bytes() + self.held_out.bytes()
    }

    fn workload(&self) -> Workload<'_> {
        workload(&self.job, &self.config, &self.table, self.device, self.data_bytes())
    }

    /// Whether a rank among `ranks` had better not hold all weights.
    pub fn shards(&self, ranks: u32) -> bool {
        self.workload().need_within(ranks, self.limits).sharded
    }

    /// What a rank among `ranks` may keep of the way forward.
    pub fn room(&self, ranks: u32, sharded: bool) -> Room {
        let workload = self.workload();
        let bytes = match (self.job.recipe.recompute, &self.job.recipe.method) {
            // Whole layers would hold their weights in full.
            (Recompute::Always, _) | (_, Method::QLoRA(..)) => 0,
            (Recompute::Never, _) => u64::MAX,
            (Recompute::Auto, _) => {
                let need = workload.need(ranks, sharded);
                let (limit, need) = match self.device.is_cuda() {
                    true => (self.limits.device, need.device),
                    false => (self.limits.reserved, need.host),
                };
                limit.map_or(0, |limit| (limit - limit / 10).saturating_sub(need))
            }
        };
        let (bytes_a_token, bytes_a_layer) = (workload.run_bytes_a_token(), workload.run_bytes_a_layer(sharded));
        Room { bytes, bytes_a_token, bytes_a_layer }
    }

    /// What forward and backward passes compute in.
    pub fn kind(&self) -> Kind {
        kind(&self.job)
    }

    /// What training of a parameter starts from, in fp32 on the CPU: the base model's weight, or an adapter's first value.
    pub fn first_value(&self, parameter: &Parameter) -> Result<Tensor, ModelError> {
        let Parameter { name, shape, .. } = parameter;
        match &self.adapted {
            Some(_) => Ok(Lora::initial(self.job.recipe.seed, name, shape)),
            None => self.model.tensor(name),
        }
    }

    pub fn publisher(&self, collective: Arc<dyn Collective>, layout: Layout, generation: u64) -> Publisher {
        Publisher {
            store: self.store.clone(),
            runtime: self.runtime.clone(),
            collective,
            table: self.table.clone(),
            layout,
            training_uid: self.job.uid.clone(),
            recipe_digest: self.recipe_digest.clone(),
            numerics_class: self.numerics_class.clone(),
            inputs: self.inputs.clone(),
            generation,
            keep: self.job.checkpoint.keep,
        }
    }
}
