//! The training job as the ranks need it: what the coordinator hands out in `Welcome`.

use serde::{Deserialize, Serialize};

/// Everything that decides the weights, and where they go. Field meanings are those of
/// `VicunaTraining.spec`; defaults are already filled in and names resolved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrainingJob {
    pub namespace: String,
    pub name: String,
    /// UID of the VicunaTraining: state of a namesake is never taken for one's own.
    pub uid: String,
    pub model: ModelSource,
    pub dataset: Vec<DatasetSource>,
    #[serde(default)]
    pub prepare: Prepare,
    pub recipe: Recipe,
    pub checkpoint: Checkpointing,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelSource {
    /// `s3://…`, `file://…`: a Hugging Face directory or a GGUF file.
    pub from: String,
    /// `vicuna_v0`, `vicuna_v1.1`, `llama-2`, `llama-3`, `chatml`; absent: the model's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DatasetSource {
    pub from: String,
    /// How often the set is seen in an epoch; 1 is once.
    pub weight: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Prepare {
    /// All published steps of cleaning; else only those without which nothing can be trained.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub clean: bool,
    /// ISO 639-1 code of the only language.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language: Option<String>,
    /// Tokens above which conversations are cut between pairs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split_at: Option<u32>,
    /// Share of the conversations that is kept for evaluation, 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold_out: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
}

/// Who the model is to say that it is: turned into conversations by `vicuna-data`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Identity {
    pub name: String,
    pub organization: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Recipe {
    pub method: Method,
    /// Sequences in a step, over all ranks, or rows of them where they are packed; a multiple of `micro_batch`.
    pub global_batch: u32,
    /// Sequences that one rank runs at a time.
    pub micro_batch: u32,
    pub length: RunLength,
    pub learning_rate: f64,
    pub schedule: Schedule,
    /// Share of the steps in which the learning rate rises linearly from 0.
    pub warmup_ratio: f64,
    pub weight_decay: f64,
    /// Largest global L2 norm of the gradient.
    pub gradient_clip: f64,
    /// Tokens in a sequence, at most; longer conversations are cut.
    pub max_length: u32,
    /// Several sequences, which do not see each other, share a row of `max_length` tokens.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub packing: bool,
    pub seed: u64,
    /// Steps from one evaluation on the held-out data to the next; absent: one at each epoch's end. There is one at
    /// the end anyway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluate_every: Option<u64>,
    #[serde(default, skip_serializing_if = "Precision::is_default")]
    pub precision: Precision,
    #[serde(default, skip_serializing_if = "Recompute::is_default")]
    pub recompute: Recompute,
    #[serde(default, skip_serializing_if = "Reproducibility::is_default")]
    pub reproducibility: Reproducibility,
    #[serde(default, skip_serializing_if = "Parameters::is_default")]
    pub parameters: Parameters,
    /// Layers' inputs wait in host memory for their way back, not in a GPU's. It does not change a bit of the result.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub offload: bool,
    /// Absent: the base model's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
}

/// A context longer than the base model's, by scaling its rotary embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RopeScaling {
    #[serde(rename = "type")]
    pub kind: Scaling,
    /// How many times as many tokens; above 1.
    pub factor: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scaling {
    /// All frequencies alike (Chen et al. 2023).
    Linear,
    /// Low ones only, as Llama 3.1's.
    Llama3,
    /// Low ones more than high ones, and sharper attention (Peng et al. 2023).
    Yarn,
}

/// Whether layers run again on the way back (Chen et al. 2016). It does not change a bit of the result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Recompute {
    /// Those that memory has no room to keep.
    #[default]
    Auto,
    Always,
    /// A quantised base's are made again all the same.
    Never,
}

impl Recompute {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Whether every bit of the result is promised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reproducibility {
    #[default]
    Exact,
    /// Ranks of different numerics classes train together, with kernels whose results differ from run to run.
    Fast,
}

impl Reproducibility {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    pub fn is_exact(self) -> bool {
        self == Self::Exact
    }
}

/// Where the weights are that passes compute with. It does not change a bit of the result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Parameters {
    /// Replicated where every rank has the memory for it, else sharded.
    #[default]
    Auto,
    /// All that is trained is on every rank.
    Replicated,
    /// A rank has its blocks alone, and gathers each layer from the others when a pass comes to it.
    Sharded,
}

impl Parameters {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What forward and backward passes compute in. Masters, moments and sums of gradients are fp32 either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Precision {
    #[default]
    Fp32,
    Bf16,
}

impl Precision {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Method {
    /// Every weight.
    Full,
    /// Low-rank adapters of a frozen base.
    LoRA(Lora),
    /// … whose projections are held in fewer bits.
    QLoRA(Lora, Base),
}

impl Method {
    /// The adapters' settings, if adapters are trained.
    pub fn lora(&self) -> Option<&Lora> {
        match self {
            Self::Full => None,
            Self::LoRA(lora) | Self::QLoRA(lora, _) => Some(lora),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Lora {
    pub rank: u32,
    pub alpha: f64,
    /// Share of an adapter's inputs that is dropped, from 0 to below 1.
    pub dropout: f64,
    /// `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj`, or `all-linear`.
    pub targets: Vec<String>,
}

impl Default for Lora {
    /// As published for Vicuna, and where a VicunaTraining says nothing.
    fn default() -> Self {
        let targets = ["q_proj", "v_proj"].map(str::to_owned).to_vec();
        Self { rank: 8, alpha: 16.0, dropout: 0.05, targets }
    }
}

/// How a frozen base's projections are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Base {
    /// 4-bit NormalFloat in blocks of 64.
    Nf4,
    /// 8-bit integers with a scale a row.
    Int8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RunLength {
    Epochs(u32),
    Steps(u64),
}

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Schedule {
    /// Half a cosine from the peak to 0.
    Cosine,
    Linear,
    Constant,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Checkpointing {
    /// URI prefix. Blocks, manifests and the result lie below it. Credentials are in the pod's
    /// environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`, `AWS_REGION`).
    pub to: String,
    /// Seconds between periodic checkpoints; absent: by their stall and the time between interruptions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval_seconds: Option<u64>,
    /// Complete manifests kept.
    pub keep: u32,
}
