//! Where models and data come from, and what they need to be read.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// CEL: whether an address has a scheme that this version reads.
pub(crate) const SUPPORTED: &str = "self.startsWith('s3://') || self.startsWith('file://')";
pub(crate) const SUPPORTED_MESSAGE: &str =
    "Write an s3://bucket/key or file:///path address; gs://, az://, hf:// and pvc:// are not supported yet.";

/// A Secret in the same namespace whose keys become environment variables of our pods:
/// `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`, `AWS_REGION`. The operator never reads it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretReference {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

// No doc comment: it would replace that of each optional field of this type (facts.md).
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Template {
    #[serde(rename = "vicuna_v0")]
    VicunaV0,
    #[serde(rename = "vicuna_v1.1")]
    VicunaV1_1,
    #[serde(rename = "llama-2")]
    Llama2,
    #[serde(rename = "llama-3")]
    Llama3,
    #[serde(rename = "chatml")]
    ChatMl,
}

impl Template {
    /// The name that trainers and workers know it by.
    pub const fn name(self) -> &'static str {
        match self {
            Self::VicunaV0 => "vicuna_v0",
            Self::VicunaV1_1 => "vicuna_v1.1",
            Self::Llama2 => "llama-2",
            Self::Llama3 => "llama-3",
            Self::ChatMl => "chatml",
        }
    }
}

/// A model to start from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelSource {
    /// A Hugging Face directory or a GGUF file, at an `s3://` or `file://` address.
    #[schemars(length(min = 6, max = 1024))]
    #[x_kube(validation = Rule::new(SUPPORTED).message(SUPPORTED_MESSAGE))]
    pub from: String,
    /// How a conversation is written as text; absent: the model's own template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<Template>,
}

/// Conversations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct DatasetSource {
    /// A file of conversations, or a folder of such: ShareGPT's records or OpenAI's messages, as JSON, JSON lines or Parquet, at an `s3://` or `file://` address.
    #[schemars(length(min = 6, max = 1024))]
    #[x_kube(validation = Rule::new(SUPPORTED).message(SUPPORTED_MESSAGE))]
    pub from: String,
    /// How often each conversation is seen in an epoch: 1 is once, 0.5 is every second one.
    #[serde(default = "once")]
    #[schemars(range(max = 1000.0))]
    #[x_kube(validation = Rule::new("self > 0.0").message("Give each data set a weight above 0, or leave the data set out."))]
    pub weight: f64,
}

fn once() -> f64 {
    1.0
}
