//! VicunaServing: one model behind the shared gateway.

use crate::period::Period;
use crate::pool::Pool;
use crate::source::{SUPPORTED, SUPPORTED_MESSAGE, SecretReference, Template};
use k8s_openapi::api::core::v1::ResourceRequirements;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Types of the conditions in a status.
pub mod condition {
    /// A worker answers requests; False names what is in the way.
    pub const READY: &str = "Ready";
    /// The model's address is known and no worker has found it unreadable; False names what is in the way.
    pub const MODEL_AVAILABLE: &str = "ModelAvailable";
    /// Replicas follow demand; False says why they do not.
    pub const SCALING_ACTIVE: &str = "ScalingActive";
}

/// Most entries kept in `status.scalingHistory`.
pub const SCALING_HISTORY_MAX: usize = 5;

/// One model behind the shared gateway, under the public name `namespace/name`.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "vicuna.dev",
    version = "v1alpha1",
    kind = "VicunaServing",
    plural = "vicunaservings",
    shortname = "vs",
    category = "all",
    category = "vicuna",
    namespaced,
    status = "VicunaServingStatus",
    derive = "PartialEq",
    doc = "One model behind the shared gateway, under the public name namespace/name.",
    validation = Rule::new("self.metadata.name.matches('^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$')").message("Name the serving with at most 40 lower-case letters, digits and hyphens: its pods are named after it."),
    scale = r#"{"specReplicasPath":".spec.replicas","statusReplicasPath":".status.replicas.ready","labelSelectorPath":".status.selector"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"URL","type":"string","jsonPath":".status.url"}"#,
    printcolumn = r#"{"name":"Replicas","type":"string","jsonPath":".status.readyDesired"}"#,
    printcolumn = r#"{"name":"Model","type":"string","jsonPath":".status.model"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Source","type":"string","jsonPath":".status.source","priority":1}"#
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.replicas) != has(self.autoscaling)").message("Set exactly one of replicas and autoscaling."))]
pub struct VicunaServingSpec {
    /// What is served.
    pub model: ServedModel,
    /// A fixed number of workers. Exclusive with autoscaling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: Option<u32>,
    /// Workers that follow demand. Exclusive with replicas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,
    /// Kinds of nodes, in the order in which they are tried; absent: every node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub pools: Vec<Pool>,
    /// How workers leave.
    #[serde(default)]
    pub drain: Drain,
    /// What each worker may use.
    #[serde(default)]
    pub worker: Worker,
}

/// What is served, and what is needed to read it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new(OTHER_THAN_MODEL).message("An adapter's from must not be that of the model: name the base model in model.from and what was trained on it in adapters."))]
pub struct ServedModel {
    /// Where the weights come from.
    pub from: ServedFrom,
    /// Adapters of this model (LoRA), each offered as a model of its own, `namespace/serving:name`, and computed beside the weights, in one batch with the others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub adapters: Vec<ServedAdapter>,
    /// The Secret for all addresses; absent: that of the first training named in from and adapters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<SecretReference>,
    /// How a conversation is written as text; absent: the model's own template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<Template>,
    /// Most tokens of prompt and completion together, at most as many as the model allows, which is what absent means.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 8, max = 1_048_576))]
    pub max_length: Option<u32>,
    /// What weights are held as; File leaves the quantised tensors of a GGUF file as they are, None quantises nothing, Int8 and Int4 round on loading. On GPUs File is as None.
    #[serde(default)]
    pub quantization: Quantization,
}

/// CEL: no adapter comes from where the model comes from.
const OTHER_THAN_MODEL: &str = "!has(self.adapters) || self.adapters.all(a, !(has(a.from.uri) && has(self.from.uri) && a.from.uri == self.from.uri) && !(has(a.from.trainingRef) && has(self.from.trainingRef) && a.from.trainingRef.name == self.from.trainingRef.name))";

/// An adapter of the served model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServedAdapter {
    /// Requests name the model `namespace/serving:name`.
    #[schemars(length(min = 1, max = 63), regex(pattern = "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub name: String,
    /// A directory as PEFT writes it, or a training with the method LoRA or QLoRA.
    pub from: ServedFrom,
}

// No doc comment: see Template.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Quantization {
    #[default]
    File,
    None,
    Int8,
    Int4,
}

impl Quantization {
    /// The name that workers know it by.
    pub const fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::None => "none",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }
}

/// An address, or a training whose result is served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.uri) != has(self.trainingRef)").message("Set exactly one of uri and trainingRef."))]
pub struct ServedFrom {
    /// A Hugging Face directory or a GGUF file, at an `s3://` or `file://` address. Exclusive with trainingRef.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 6, max = 1024))]
    #[x_kube(validation = Rule::new(SUPPORTED).message(SUPPORTED_MESSAGE))]
    pub uri: Option<String>,
    /// A VicunaTraining in the same namespace: its result is served once it is complete. Exclusive with uri.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training_ref: Option<TrainingReference>,
}

/// A VicunaTraining in the same namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrainingReference {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Workers that follow demand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.min <= self.max").message("autoscaling.min must not be above autoscaling.max: change one of them."))]
pub struct Autoscaling {
    /// Fewest workers. At 0 a model that nobody asks for has none; a request for it waits at the gateway and brings one.
    #[serde(default = "one")]
    #[schemars(range(max = 1000))]
    pub min: u32,
    /// Most workers.
    #[schemars(range(min = 1, max = 1000))]
    pub max: u32,
    /// What each worker is to carry.
    pub target: Target,
    /// How fast replicas change.
    #[serde(default)]
    pub behavior: Behavior,
}

fn one() -> u32 {
    1
}

/// What each worker is to carry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Target {
    /// Unfinished requests for each worker.
    #[schemars(range(min = 1, max = 100_000))]
    pub in_flight: u32,
}

/// How fast replicas change, as in HorizontalPodAutoscaler v2.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Behavior {
    /// How replicas go down.
    #[serde(default)]
    pub scale_down: ScaleDown,
}

/// How replicas go down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScaleDown {
    /// How long demand must have been lower before a worker is let go.
    #[serde(default = "default_stabilization")]
    #[schemars(range(min = 0, max = 3600))]
    pub stabilization_window_seconds: u32,
}

fn default_stabilization() -> u32 {
    300
}

impl Default for ScaleDown {
    fn default() -> Self {
        Self { stabilization_window_seconds: default_stabilization() }
    }
}

/// How workers leave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Drain {
    /// How long a worker that is let go may finish its requests, at most a third of its pool's notice where its nodes may go; what is left then goes on elsewhere.
    #[serde(default = "default_drain")]
    pub timeout: Period,
}

fn default_drain() -> Period {
    Period::from_secs(60)
}

impl Default for Drain {
    fn default() -> Self {
        Self { timeout: default_drain() }
    }
}

/// What each worker may use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Worker {
    /// CPU, memory and devices of each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::schema::resources")]
    pub resources: Option<ResourceRequirements>,
    /// Requests that a worker runs at the same time.
    #[serde(default = "default_slots")]
    #[schemars(range(min = 1, max = 1024))]
    pub slots: u32,
    /// Where workers of a node share what they have fetched from buckets; each fetches for itself if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<WeightsCache>,
}

/// A volume with weights, verified at each use, of which what was used longest ago goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.claimName) != has(self.csi)").message("Set exactly one of claimName and csi."))]
pub struct WeightsCache {
    /// A PersistentVolumeClaim of the serving's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: Option<String>,
    /// A volume of a CSI driver, which may give all pods of a node the same folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub csi: Option<CacheDriver>,
    /// MiB that the cache may take of it.
    #[serde(default = "default_cache_mib")]
    #[schemars(range(min = 1, max = 1_073_741_824))]
    pub size_mib: u64,
}

/// An inline volume of a CSI driver.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CacheDriver {
    /// Name of the driver, as `kubectl get csidrivers` has it.
    #[schemars(length(min = 1, max = 63))]
    pub driver: String,
    /// What the driver wants to know.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub volume_attributes: BTreeMap<String, String>,
}

fn default_cache_mib() -> u64 {
    100 * 1024
}

fn default_slots() -> u32 {
    8
}

impl Default for Worker {
    fn default() -> Self {
        Self { resources: None, slots: default_slots(), cache: None }
    }
}

/// What became of a serving.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VicunaServingStatus {
    /// Ready, ModelAvailable, ScalingActive.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "crate::schema::conditions")]
    pub conditions: Vec<Condition>,
    /// Workers, wanted and there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<Replicas>,
    /// Ready workers, of those that are wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_desired: Option<String>,
    /// Label selector of the serving's pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Base URL of the OpenAI API, inside the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// The name that requests give in `model`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The names that requests give for its adapters.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub adapters: Vec<String>,
    /// Address of the weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Digest of the training's result, with trainingRef.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The last changes of the number of workers, newest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 5))]
    pub scaling_history: Vec<Scaling>,
    /// The generation of the spec that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

/// Workers, wanted and there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Replicas {
    /// Workers that are wanted.
    #[serde(default)]
    pub desired: u32,
    /// Workers that answer requests.
    #[serde(default)]
    pub ready: u32,
    /// Ready workers on spot nodes.
    #[serde(default)]
    pub spot: u32,
    /// Ready workers on on-demand nodes.
    #[serde(default)]
    pub on_demand: u32,
    /// Ready workers on our own nodes.
    #[serde(default)]
    pub on_prem: u32,
}

/// A change of the number of workers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Scaling {
    /// When.
    #[schemars(schema_with = "crate::schema::required_time")]
    pub time: Time,
    /// Workers wanted before.
    #[serde(default)]
    pub from: u32,
    /// Workers wanted after.
    #[serde(default)]
    pub to: u32,
    /// Why.
    #[serde(default)]
    pub reason: String,
}
