//! VicunaTraining: one elastic training of one model.

use crate::period::Period;
use crate::pool::Pool;
use crate::source::{DatasetSource, ModelSource, SUPPORTED, SUPPORTED_MESSAGE, SecretReference};
use k8s_openapi::api::core::v1::ResourceRequirements;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Types of the conditions in a status.
pub mod condition {
    /// The spec can be run; False says what cannot.
    pub const ADMITTED: &str = "Admitted";
    /// A generation of ranks is training.
    pub const RUNNING: &str = "Running";
    /// Steps are being made; False names what is in the way.
    pub const PROGRESSING: &str = "Progressing";
    /// A checkpoint is in the bucket.
    pub const CHECKPOINTED: &str = "Checkpointed";
    /// `spec.suspend` is carried out.
    pub const SUSPENDED: &str = "Suspended";
    /// The result is in the bucket.
    pub const COMPLETE: &str = "Complete";
    /// Given up; `lastFailure` says why.
    pub const FAILED: &str = "Failed";
    /// Complete or failed: waiting for it never hangs.
    pub const FINISHED: &str = "Finished";
}

/// A training that goes on while its nodes come and go.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "vicuna.dev",
    version = "v1alpha1",
    kind = "VicunaTraining",
    plural = "vicunatrainings",
    shortname = "vt",
    category = "all",
    category = "vicuna",
    namespaced,
    status = "VicunaTrainingStatus",
    derive = "PartialEq",
    doc = "A training that goes on while its nodes come and go.",
    validation = Rule::new("self.metadata.name.matches('^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$')").message("Name the training with at most 40 lower-case letters, digits and hyphens: its pods are named after it."),
    scale = r#"{"specReplicasPath":".spec.workers.max","statusReplicasPath":".status.membership.ready","labelSelectorPath":".status.selector"}"#,
    printcolumn = r#"{"name":"State","type":"string","jsonPath":".status.state"}"#,
    printcolumn = r#"{"name":"Step","type":"string","jsonPath":".status.progress.stepOf"}"#,
    printcolumn = r#"{"name":"Ready/Max","type":"string","jsonPath":".status.readyMax"}"#,
    printcolumn = r#"{"name":"Reclaims","type":"integer","jsonPath":".status.disruptions.reclaims"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Loss","type":"number","jsonPath":".status.progress.loss","priority":1}"#,
    printcolumn = r#"{"name":"Checkpoint","type":"integer","jsonPath":".status.checkpoint.step","priority":1}"#
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.model == oldSelf.model").field_path(".model").message("The model cannot be changed: create a new training."),
    validation = Rule::new("self.dataset == oldSelf.dataset").field_path(".dataset").message("The dataset cannot be changed: create a new training."),
    validation = Rule::new("self.recipe == oldSelf.recipe").field_path(".recipe").message("The recipe cannot be changed: create a new training."),
    validation = Rule::new("has(self.prepare) == has(oldSelf.prepare) && (!has(self.prepare) || self.prepare == oldSelf.prepare)").message("prepare cannot be changed: create a new training."),
    validation = Rule::new("self.checkpoint.to == oldSelf.checkpoint.to").field_path(".checkpoint.to").message("checkpoint.to cannot be changed, since the training's state is there: create a new training."),
    validation = Rule::new("self.workers.max <= self.recipe.globalBatch / self.recipe.microBatch").message("A step has globalBatch / microBatch micro-batches, and each worker needs one: lower workers.max or microBatch, or raise globalBatch.")
)]
pub struct VicunaTrainingSpec {
    /// The model to start from. Cannot be changed.
    pub model: ModelSource,
    /// Conversations to learn from. Cannot be changed.
    #[schemars(length(min = 1, max = 32))]
    pub dataset: Vec<DatasetSource>,
    /// What is done to the data first. Cannot be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepare: Option<Prepare>,
    /// What decides the weights. Cannot be changed.
    pub recipe: Recipe,
    /// How many ranks train, and what each may use.
    pub workers: Workers,
    /// Kinds of nodes, in the order in which they are tried; absent: every node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub pools: Vec<Pool>,
    /// How pools are chosen.
    #[serde(default)]
    pub placement: Placement,
    /// Where the training's state and result are kept.
    pub checkpoint: CheckpointSpec,
    /// How often what may be tried again.
    #[serde(default)]
    pub retries: Retries,
    /// Stop after a checkpoint and give the pods back, until this is false again.
    #[serde(default)]
    pub suspend: bool,
}

/// What is done to the data before training.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Prepare {
    /// Who the model is to say that it is: conversations that teach it are added to the data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
}

/// A name and its maker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Identity {
    /// What the model calls itself.
    #[schemars(length(min = 1, max = 64))]
    pub name: String,
    /// Who it says made it.
    #[schemars(length(min = 1, max = 64))]
    pub organization: String,
}

/// What decides the weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.globalBatch % self.microBatch == 0").message("globalBatch must be a multiple of microBatch: change one of them."),
    validation = Rule::new("has(self.epochs) != has(self.steps)").message("Set exactly one of epochs and steps.")
)]
pub struct Recipe {
    /// What is trained. Full: every weight.
    #[serde(default)]
    pub method: Method,
    /// Sequences in a step, over all workers; a multiple of microBatch.
    #[serde(default = "default_global_batch")]
    #[schemars(range(min = 1, max = 65536))]
    pub global_batch: u32,
    /// Sequences that a worker runs at a time.
    #[serde(default = "default_micro_batch")]
    #[schemars(range(min = 1, max = 1024))]
    pub micro_batch: u32,
    /// How often the data are gone through. Exclusive with steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub epochs: Option<u32>,
    /// How many steps are made. Exclusive with epochs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub steps: Option<u64>,
    /// Learning rate at its peak.
    #[serde(default = "default_learning_rate")]
    #[schemars(range(max = 1.0))]
    #[x_kube(validation = Rule::new("self > 0.0").message("Set a learning rate above 0; 2e-5 is usual for a full fine-tuning."))]
    pub learning_rate: f64,
    /// How the learning rate falls after the warm-up. Cosine: half a cosine to 0; Linear: a line to 0; Constant: not at all.
    #[serde(default)]
    pub schedule: Schedule,
    /// Share of the steps in which the learning rate rises from 0.
    #[serde(default = "default_warmup_ratio")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub warmup_ratio: f64,
    /// AdamW's decoupled weight decay.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub weight_decay: f64,
    /// Largest global L2 norm of the gradient; a longer one is scaled down to it.
    #[serde(default = "default_gradient_clip")]
    #[schemars(range(max = 1_000_000.0))]
    #[x_kube(validation = Rule::new("self > 0.0").message("Set gradientClip above 0; 1.0 is usual."))]
    pub gradient_clip: f64,
    /// Most tokens in a sequence; longer conversations are cut.
    #[serde(default = "default_max_length")]
    #[schemars(range(min = 8, max = 131_072))]
    pub max_length: u32,
    /// What shuffles are drawn from.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991u64))]
    pub seed: u64,
}

fn default_global_batch() -> u32 {
    128
}
fn default_micro_batch() -> u32 {
    1
}
fn default_learning_rate() -> f64 {
    2e-5
}
fn default_warmup_ratio() -> f64 {
    0.03
}
fn default_gradient_clip() -> f64 {
    1.0
}
fn default_max_length() -> u32 {
    2048
}

#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Method {
    #[default]
    Full,
}

#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Schedule {
    #[default]
    Cosine,
    Linear,
    Constant,
}

/// How many ranks train, one in each pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.min <= self.max").message("workers.min must not be above workers.max: change one of them."))]
pub struct Workers {
    /// Fewest workers that train; with fewer the training waits and keeps its state.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 512))]
    pub min: u32,
    /// Most workers that train.
    #[schemars(range(min = 1, max = 512))]
    pub max: u32,
    /// CPU, memory and devices of each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::schema::resources")]
    pub resources: Option<ResourceRequirements>,
}

fn one() -> u32 {
    1
}

/// How pools are chosen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// How long a pod may find no node in a pool before the next pool is tried.
    #[serde(default = "default_stock_out_after")]
    pub stock_out_after: Period,
}

fn default_stock_out_after() -> Period {
    Period::from_secs(60)
}

impl Default for Placement {
    fn default() -> Self {
        Self { stock_out_after: default_stock_out_after() }
    }
}

/// Where the training's state and result are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointSpec {
    /// An `s3://` or `file://` address under which blocks, manifests and the result are written. Cannot be changed.
    #[schemars(length(min = 6, max = 1024))]
    #[x_kube(validation = Rule::new(SUPPORTED).message(SUPPORTED_MESSAGE))]
    pub to: String,
    /// The Secret for all addresses of this training: model, data and checkpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<SecretReference>,
    /// Time between checkpoints. A reclaim with notice writes one of its own.
    #[serde(default = "default_interval")]
    #[x_kube(validation = Rule::new("self.matches('[1-9]')").message("Set an interval above 0, such as 10m."))]
    pub interval: Period,
    /// How many complete checkpoints are kept.
    #[serde(default = "default_keep")]
    #[schemars(range(min = 1, max = 1000))]
    pub keep: u32,
}

fn default_interval() -> Period {
    Period::from_secs(600)
}
fn default_keep() -> u32 {
    3
}

/// How often what may be tried again. Reclaims are never counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Retries {
    /// How often the training program may fail without progress before the training is given up.
    #[serde(default = "default_application_retries")]
    #[schemars(range(min = 0, max = 1000))]
    pub application: u32,
}

fn default_application_retries() -> u32 {
    3
}

impl Default for Retries {
    fn default() -> Self {
        Self { application: default_application_retries() }
    }
}

/// What became of a training.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VicunaTrainingStatus {
    /// Admitted, Running, Progressing, Checkpointed, Suspended, Complete, Failed, Finished.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "crate::schema::conditions")]
    pub conditions: Vec<Condition>,
    /// The conditions in one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<TrainingState>,
    /// How far the training is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Who is training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub membership: Option<Membership>,
    /// Workers that train, of the most that may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_max: Option<String>,
    /// Label selector of the training's pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// The newest complete checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointStatus>,
    /// What the nodes' coming and going did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disruptions: Option<Disruptions>,
    /// Restarts by cause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restarts: Option<Restarts>,
    /// The last thing that went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<Failure>,
    /// The trained model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<TrainingResult>,
    /// The generation of the spec that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// When the first pod was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::schema::time")]
    pub start_time: Option<Time>,
    /// When the training was complete or given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::schema::time")]
    pub completion_time: Option<Time>,
}

#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TrainingState {
    /// Waits for nodes.
    Pending,
    /// Ranks fetch the model and data, or form a generation.
    Starting,
    Running,
    /// Ranks leave one generation and form the next.
    Recovering,
    /// Something outside the training is in the way; a condition says what.
    Blocked,
    Suspending,
    Suspended,
    Complete,
    Failed,
}

/// How far a training is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// The last step that was applied.
    #[serde(default)]
    pub step: u64,
    /// Steps in the whole run; 0 until the data are read.
    #[serde(default)]
    pub steps: u64,
    /// Step and steps, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step_of: Option<String>,
    /// How often the data have been gone through.
    #[serde(default)]
    pub epoch: f64,
    /// Mean loss per trained token of that step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Learning rate of that step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Tokens of that step by the time that it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
}

/// Who trains.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Membership {
    /// Number of the set of ranks that trains; it grows with each change.
    #[serde(default)]
    pub generation: u64,
    /// Ranks in it.
    #[serde(default)]
    pub ready: u32,
    /// Ranks in it by pool.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub pools: BTreeMap<String, u32>,
}

/// A complete checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointStatus {
    /// The last step in it.
    #[serde(default)]
    pub step: u64,
    /// Address of its manifest.
    #[serde(default)]
    pub uri: String,
    /// BLAKE3 of its manifest.
    #[serde(default)]
    pub digest: String,
    /// When it was complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::schema::time")]
    pub time: Option<Time>,
}

/// What the nodes' coming and going did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Disruptions {
    /// Warnings that a node would go.
    #[serde(default)]
    pub notices: u64,
    /// Ranks that went with their node.
    #[serde(default)]
    pub reclaims: u64,
    /// Steps that had to be made again.
    #[serde(default)]
    pub lost_steps: u64,
    /// Time from the last step before a reclaim to the first after it, such as `7s300ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_recovery: Option<Period>,
}

/// Restarts by cause.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Restarts {
    /// Failures of the training program since it last made progress.
    #[serde(default)]
    pub application: u32,
}

/// Something that went wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// Whose fault it is: Store, Model, Data, OutOfMemory, Numerics, Infrastructure or Application.
    #[serde(default)]
    pub cause: String,
    /// Exit code of the container, where it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Node on which it happened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// What was wrong, where, and what to do.
    #[serde(default)]
    pub message: String,
}

/// The trained model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrainingResult {
    /// A Hugging Face directory.
    #[serde(default)]
    pub uri: String,
    /// BLAKE3 over its tensors in name order.
    #[serde(default)]
    pub digest: String,
}
