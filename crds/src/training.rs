//! VicunaTraining: one elastic training of one model.

use crate::interval::Interval;
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
    printcolumn = r#"{"name":"Goodput","type":"number","jsonPath":".status.goodput"}"#,
    printcolumn = r#"{"name":"Reclaims","type":"integer","jsonPath":".status.disruptions.reclaims"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Loss","type":"number","jsonPath":".status.progress.loss","priority":1}"#,
    printcolumn = r#"{"name":"Eval-Loss","type":"number","jsonPath":".status.progress.evaluationLoss","priority":1}"#,
    printcolumn = r#"{"name":"Pools","type":"string","jsonPath":".status.membership.byPool","priority":1}"#,
    printcolumn = r#"{"name":"Checkpoint","type":"integer","jsonPath":".status.checkpoint.step","priority":1}"#,
    printcolumn = r#"{"name":"Cost","type":"number","jsonPath":".status.cost.estimated","priority":1}"#
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.model == oldSelf.model").field_path(".model").message("The model cannot be changed: create a new training."),
    validation = Rule::new("self.dataset == oldSelf.dataset").field_path(".dataset").message("The dataset cannot be changed: create a new training."),
    validation = Rule::new("self.recipe == oldSelf.recipe").field_path(".recipe").message("The recipe cannot be changed: create a new training."),
    validation = Rule::new("has(self.prepare) == has(oldSelf.prepare) && (!has(self.prepare) || self.prepare == oldSelf.prepare)").message("prepare cannot be changed: create a new training."),
    validation = Rule::new("!has(self.prepare) || !has(self.prepare.splitAt) || self.prepare.splitAt <= self.recipe.maxLength").message("prepare.splitAt must not be above recipe.maxLength, which would cut the pieces again: change one of them."),
    validation = Rule::new("!has(self.recipe.evaluateEvery) || (has(self.prepare) && has(self.prepare.holdOut))").message("recipe.evaluateEvery needs conversations to evaluate on: set prepare.holdOut, or leave evaluateEvery out."),
    validation = Rule::new("self.checkpoint.to == oldSelf.checkpoint.to").field_path(".checkpoint.to").message("checkpoint.to cannot be changed, since the training's state is there: create a new training."),
    validation = Rule::new("has(self.managedBy) == has(oldSelf.managedBy) && (!has(self.managedBy) || self.managedBy == oldSelf.managedBy)").message("managedBy cannot be changed: create a new training."),
    validation = Rule::new("!has(self.placement) || !has(self.placement.onDemandFloor) || self.placement.onDemandFloor <= self.workers.max").message("placement.onDemandFloor must not be above workers.max: change one of them."),
    validation = Rule::new("!has(self.placement) || !has(self.placement.onDemandFloor) || self.placement.onDemandFloor == 0 || (has(self.pools) && self.pools.exists(pool, pool.capacity != 'Spot'))").message("placement.onDemandFloor needs a pool whose capacity is OnDemand or OnPrem: add one, or set the floor to 0."),
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
    /// The controller that runs this training; absent or `vicuna.dev/operator`: this operator. With any other name the operator leaves the training alone. Cannot be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub managed_by: Option<String>,
    /// How long the training may take from its first pod, or since it was last resumed; then it is given up. Its checkpoints stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_deadline: Option<Period>,
    /// How long after its end the training is deleted; absent: never. What it wrote into its bucket stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_after_finished: Option<Period>,
}

/// Value of `managedBy` that means this operator.
pub const MANAGED_BY: &str = "vicuna.dev/operator";

impl VicunaTrainingSpec {
    /// Whether another controller runs the training.
    pub fn is_managed_elsewhere(&self) -> bool {
        self.managed_by.as_deref().is_some_and(|name| name != MANAGED_BY)
    }
}

/// What is done to the data before training. Every rank does it, and all come to the same.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Prepare {
    /// Clean the conversations as published for Vicuna: HTML becomes Markdown, remains of the web page go, conversations that name another vendor, restart their lists or are there already (exactly or nearly) are dropped, and records that are no conversations are counted and left out. If false, such a record is an error, and only what cannot be trained on is removed: turns before the first question and after the last reply, conversations whose roles do not alternate, empty turns.
    #[serde(default)]
    pub clean: bool,
    /// Keep only conversations in this language, an ISO 639-1 code such as `en`, and those whose language cannot be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 3))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z]+$')").message("Write the language as its ISO 639-1 code in lower case, such as en."))]
    pub language: Option<String>,
    /// Cut conversations longer than this many tokens between pairs of question and reply, so that nothing is lost to recipe.maxLength. Each piece has the system prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 8, max = 131_072))]
    pub split_at: Option<u32>,
    /// Share of the conversations that is not trained on but kept for evaluation, such as 0.02; chosen by what is said in them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 0.5))]
    #[x_kube(validation = Rule::new("self > 0.0").message("Set a share above 0, such as 0.02, or leave holdOut out."))]
    pub hold_out: Option<f64>,
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
    validation = Rule::new("has(self.epochs) != has(self.steps)").message("Set exactly one of epochs and steps."),
    validation = Rule::new("!has(self.lora) || self.method != 'Full'").message("lora is for the methods LoRA and QLoRA: set method to one of them, or leave lora out."),
    validation = Rule::new("!has(self.ropeScaling) || self.method == 'Full'").message("ropeScaling changes the model itself, which adapters do not carry: set method to Full, or leave ropeScaling out."),
    validation = Rule::new("!has(self.lora) || !has(self.lora.base) || self.method == 'QLoRA'").message("lora.base is for the method QLoRA: LoRA's base stays as it is.")
)]
pub struct Recipe {
    /// What is trained. Full: every weight; LoRA: low-rank adapters of a frozen model, which are the result; QLoRA: the same with the frozen model's projections in 4 or 8 bits.
    #[serde(default)]
    pub method: Method,
    /// The adapters, with the methods LoRA and QLoRA; absent: all as by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
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
    /// Most tokens in a sequence; longer conversations are cut. Not more than the model was made for, unless ropeScaling stretches it.
    #[serde(default = "default_max_length")]
    #[schemars(range(min = 8, max = 131_072))]
    pub max_length: u32,
    /// Several conversations share a sequence of maxLength tokens without seeing each other, so that hardly any token is padding. globalBatch and microBatch then count such sequences: each step trains more conversations.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub packing: bool,
    /// A longer context than the base model's: its rotary embeddings are scaled, which the result's config.json says. Needs method Full. Absent: as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// What a worker computes in. Fp32: single precision; Bf16: weights and activations of 16 bits, as usual on GPUs. Master weights, optimizer and sums of gradients are fp32 either way; the result has this precision.
    #[serde(default)]
    pub precision: Precision,
    /// What memory is spent on.
    #[serde(default)]
    pub memory: Memory,
    /// Exact: the weights are the same bits whatever becomes of the nodes; workers whose numbers differ in the last bits are kept out. Fast trades this away: nodes of different kinds train together, and GPUs use kernels whose results differ from run to run. No completed step or sample is lost either way.
    #[serde(default)]
    pub reproducibility: Reproducibility,
    /// What shuffles are drawn from.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991u64))]
    pub seed: u64,
    /// Steps from one evaluation on the held-out conversations to the next; absent: one at each epoch's end. Once more at the end. Needs prepare.holdOut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub evaluate_every: Option<u64>,
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
    LoRA,
    QLoRA,
}

/// Adapters of the layers' projections (Hu et al. 2021).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Lora {
    /// Rank of the adapters.
    #[serde(default = "default_rank")]
    #[schemars(range(min = 1, max = 1024))]
    pub rank: u32,
    /// What an adapter adds is multiplied by alpha / rank.
    #[serde(default = "default_alpha")]
    #[schemars(range(max = 65_536.0))]
    #[x_kube(validation = Rule::new("self > 0.0").message("Set lora.alpha above 0; twice the rank is usual."))]
    pub alpha: f64,
    /// Share of an adapter's inputs that is dropped in training.
    #[serde(default = "default_dropout")]
    #[schemars(range(min = 0.0, max = 0.9))]
    pub dropout: f64,
    /// Which projections of every layer are adapted; all-linear is all of them.
    #[serde(default = "default_targets")]
    #[schemars(length(min = 1, max = 7))]
    #[x_kube(validation = Rule::new("!('all-linear' in self) || size(self) == 1").message("all-linear is every projection: name it alone, or name projections."))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub targets: Vec<Target>,
    /// How QLoRA holds the frozen base's projections. Nf4: 4-bit NormalFloat in blocks of 64 (Dettmers et al. 2023); Int8: 8-bit integers with a scale for each row. Absent: Nf4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
}

impl Default for Lora {
    fn default() -> Self {
        Self {
            rank: default_rank(),
            alpha: default_alpha(),
            dropout: default_dropout(),
            targets: default_targets(),
            base: None,
        }
    }
}

fn default_rank() -> u32 {
    8
}
fn default_alpha() -> f64 {
    16.0
}
fn default_dropout() -> f64 {
    0.05
}
fn default_targets() -> Vec<Target> {
    vec![Target::QProj, Target::VProj]
}

#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    QProj,
    KProj,
    VProj,
    OProj,
    GateProj,
    UpProj,
    DownProj,
    #[serde(rename = "all-linear")]
    AllLinear,
}

impl Target {
    /// As PEFT names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
            Self::AllLinear => "all-linear",
        }
    }
}

#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Base {
    #[default]
    Nf4,
    Int8,
}

/// How rotary embeddings are scaled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RopeScaling {
    /// Linear: all frequencies are divided by the factor (Chen et al. 2023); Llama3: low ones only, as in Llama 3.1; Yarn: low ones more than high ones, with sharper attention (Peng et al. 2023).
    #[serde(rename = "type")]
    pub kind: Scaling,
    /// How many times as many tokens as the base model was made for.
    #[schemars(range(max = 1024.0))]
    #[x_kube(validation = Rule::new("self > 1.0").message("Set a factor above 1, such as 4.0 for four times the context, or leave ropeScaling out."))]
    pub factor: f64,
}

#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Scaling {
    Linear,
    Llama3,
    Yarn,
}

/// What memory is spent on. It does not change a bit of the result.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Memory {
    /// Whether layers are computed again for their gradients, which takes a third more time, instead of keeping what they need. Auto: those that there is no room for, by the memory limit of the pod or the size of the GPU; without a limit all. Always: all. Never: none; with QLoRA all are computed again nevertheless.
    #[serde(default)]
    pub recompute: Recompute,
    /// Where the weights are that workers compute with. Replicated: all on every worker. Sharded: a worker has those of its own blocks and gathers each layer's from the others, on the way forward and again on the way back, which takes less memory and more of the network. Auto: Replicated where every worker has the memory for it, by the limit of its pod or the size of its GPU, else Sharded. With LoRA and QLoRA it is about the adapters alone: every worker holds the frozen base.
    #[serde(default)]
    pub parameters: Parameters,
    /// Keep the inputs of layers that are computed again in pinned host memory until then, instead of in the GPU's. For workers with a GPU: others have no such second memory, and refuse it.
    #[serde(default)]
    pub offload: bool,
}

#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Recompute {
    #[default]
    Auto,
    Always,
    Never,
}

#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Reproducibility {
    #[default]
    Exact,
    Fast,
}

#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Parameters {
    #[default]
    Auto,
    Replicated,
    Sharded,
}

#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Precision {
    #[default]
    Fp32,
    Bf16,
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
    /// PriorityClass of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,
    /// What the pods carry besides: queues of an admission controller, for example.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<PodTemplate>,
}

/// Additions to pods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodTemplate {
    /// Labels and annotations of the pods.
    #[serde(default)]
    pub metadata: PodTemplateMetadata,
}

/// Labels and annotations; the operator's own cannot be replaced.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodTemplateMetadata {
    /// Labels of the pods.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub labels: BTreeMap<String, String>,
    /// Annotations of the pods.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub annotations: BTreeMap<String, String>,
}

fn one() -> u32 {
    1
}

/// How pools are chosen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// How long a pod may find no node in a pool before the next pool is tried.
    #[serde(default = "default_stock_out_after")]
    pub stock_out_after: Period,
    /// How long a pod stays in a pool that is not its first choice before its first choice is tried again. The new pod has its node before the old one is asked to leave.
    #[serde(default = "default_return_after")]
    #[x_kube(validation = Rule::new("self.matches('[1-9]')").message("Set a time above 0, such as 10m."))]
    pub return_after: Period,
    /// How long fewer than workers.min pods may hold nodes while an older training waits for nodes too; then they are given back for a while.
    #[serde(default = "default_forming_timeout")]
    #[x_kube(validation = Rule::new("self.matches('[1-9]')").message("Set a time above 0, such as 5m."))]
    pub forming_timeout: Period,
    /// Workers that are kept in pools whose capacity is OnDemand or OnPrem, whatever the order of pools. They go elsewhere only while those pools have no node.
    #[serde(default)]
    #[schemars(range(min = 0, max = 512))]
    pub on_demand_floor: u32,
}

fn default_stock_out_after() -> Period {
    Period::from_secs(60)
}
fn default_return_after() -> Period {
    Period::from_secs(600)
}
fn default_forming_timeout() -> Period {
    Period::from_secs(300)
}

impl Default for Placement {
    fn default() -> Self {
        Self {
            stock_out_after: default_stock_out_after(),
            return_after: default_return_after(),
            forming_timeout: default_forming_timeout(),
            on_demand_floor: 0,
        }
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
    /// Time between checkpoints, or Auto: the square root of twice a checkpoint's stall times the time between
    /// interruptions, both as measured. A reclaim that leaves too few to hold the state writes one of its own.
    #[serde(default = "default_interval")]
    pub interval: Interval,
    /// How many complete checkpoints are kept.
    #[serde(default = "default_keep")]
    #[schemars(range(min = 1, max = 1000))]
    pub keep: u32,
}

fn default_interval() -> Interval {
    Interval::Every(Period::from_secs(600))
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
    /// How often nodes, network or hanging ranks may fail it without progress. A reclaimed node is none of these.
    #[serde(default = "default_infrastructure_retries")]
    #[schemars(range(min = 0, max = 1000))]
    pub infrastructure: u32,
    /// How often it may run out of memory, of the host or of a device, without progress.
    #[serde(default = "default_out_of_memory_retries")]
    #[schemars(range(min = 0, max = 1000))]
    pub out_of_memory: u32,
}

fn default_application_retries() -> u32 {
    3
}
fn default_infrastructure_retries() -> u32 {
    20
}
fn default_out_of_memory_retries() -> u32 {
    2
}

impl Default for Retries {
    fn default() -> Self {
        Self {
            application: default_application_retries(),
            infrastructure: default_infrastructure_retries(),
            out_of_memory: default_out_of_memory_retries(),
        }
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
    /// What a worker needs in memory by estimate, for each number of workers from spec.workers.min to max.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub memory: Vec<MemoryEstimate>,
    /// Restarts by cause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restarts: Option<Restarts>,
    /// What the nodes cost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<Cost>,
    /// Time for which the pods held nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker_time: Option<WorkerTime>,
    /// Share of the time for which pods held nodes that advanced the model, from 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goodput: Option<f64>,
    /// The last thing that went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<Failure>,
    /// The trained model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<TrainingResult>,
    /// The generation of the spec that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The image of the workers' containers since the first step: another one could compute other bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// The one before it that the annotation `vicuna.dev/give-up-image` gave up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given_up_image: Option<String>,
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
    /// Mean loss per token of the held-out conversations when they were last evaluated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation_loss: Option<f64>,
    /// The step after which that was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation_step: Option<u64>,
    /// Learning rate of that step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Tokens of that step by the time that it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Time that the steps to come take at the present speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remaining: Option<Period>,
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
    /// The same for people, such as `spot 2, on-prem 1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by_pool: Option<String>,
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
    /// For how long it held up the training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stall: Option<Period>,
    /// How long it was on its way behind the training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload: Option<Period>,
    /// The time to the next one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<Period>,
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

/// What each worker needs in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemoryEstimate {
    /// Of so many.
    #[serde(default)]
    pub workers: u32,
    /// In the pod, such as `12.3 GB`.
    #[serde(default)]
    pub host: String,
    /// On the GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Every worker has as much.
    #[serde(default)]
    pub fits: bool,
}

/// Restarts by cause. Reclaims are not among them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Restarts {
    /// Failures of the training program.
    #[serde(default)]
    pub application: u32,
    /// Failures of nodes and network, evictions, and ranks that were killed from outside.
    #[serde(default)]
    pub infrastructure: u32,
    /// Ranks that ran out of memory, of the host or of a device.
    #[serde(default)]
    pub out_of_memory: u32,
    /// Ranks that hung.
    #[serde(default)]
    pub hang: u32,
    /// Failures to read or write the store, the model or the data, after which a rank ended.
    #[serde(default)]
    pub storage: u32,
    /// What is spent of spec.retries since progress was last made.
    #[serde(default)]
    pub spent: Spent,
}

/// What is spent of the budgets in spec.retries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Spent {
    /// Of retries.application.
    #[serde(default)]
    pub application: u32,
    /// Of retries.infrastructure.
    #[serde(default)]
    pub infrastructure: u32,
    /// Of retries.outOfMemory.
    #[serde(default)]
    pub out_of_memory: u32,
}

/// What the nodes cost: declared price, times the pod's share of its node, times the time for which it held the node. Starting nodes, idle nodes, disks and traffic are not in it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Cost {
    /// By the prices of the pools that were used.
    #[serde(default)]
    pub estimated: f64,
    /// What the same time would have cost in the first pool whose capacity is OnDemand and that has a price; absent where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_demand_equivalent: Option<f64>,
    /// Estimated cost by pool.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub pools: BTreeMap<String, f64>,
}

/// Time for which pods held nodes, summed over pods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerTime {
    /// Seconds from a pod's scheduling to its end.
    #[serde(default)]
    pub held_seconds: u64,
    /// Seconds of these that were spent in steps that count.
    #[serde(default)]
    pub advanced_seconds: u64,
    /// Up to when it is counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::schema::time")]
    pub until: Option<Time>,
}

/// Something that went wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// Whose fault it is: Application, OutOfMemory, DeviceOutOfMemory, Infrastructure, Hang, Data, Model, Store or Numerics.
    #[serde(default)]
    pub cause: String,
    /// Exit code of the container, where it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Node on which it happened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// What was wrong, where, and what to do; with the last lines of the log, where there are some.
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
