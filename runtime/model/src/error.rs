//! What can be wrong with a model, in words for the person who named it.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error("{path} cannot be written to: {reason}; name a folder that is new or empty")]
    Occupied { path: PathBuf, reason: &'static str },
    #[error("{path} is neither a GGUF file nor a directory with config.json, tokenizer.json and safetensors")]
    NotAModel { path: PathBuf },
    #[error("{path} is not valid JSON: {source}")]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("the model configuration is not usable: {0}")]
    Config(String),
    #[error("{path} is not a valid safetensors file: {reason}; was the upload complete?")]
    Safetensors { path: PathBuf, reason: String },
    #[error("not a valid GGUF file: {0}; was the upload complete?")]
    Gguf(String),
    #[error("the tokenizer is not usable: {0}")]
    Tokenizer(String),
    #[error("tensor {name} is missing; the configuration asks for shape {expected:?}")]
    MissingTensor { name: String, expected: Vec<i64> },
    #[error(
        "tensor {name} with shape {found:?} is not part of a {family} model of this configuration; adapters, experts and biases other than Qwen2's are not supported"
    )]
    UnexpectedTensor { name: String, found: Vec<i64>, family: &'static str },
    #[error("tensor {name} has shape {found:?}, the configuration asks for {expected:?}")]
    WrongShape { name: String, expected: Vec<i64>, found: Vec<i64> },
    #[error("tensor {name} has type {found}; supported are {supported}")]
    UnsupportedType { name: String, found: String, supported: &'static str },
    #[error("token id {id} is outside the vocabulary of {vocabulary}")]
    UnknownToken { id: u32, vocabulary: usize },
    #[error("{tokens} tokens do not fit the model's maximum length of {max_length}")]
    TooLong { tokens: usize, max_length: usize },
    #[error(
        "a maximum length of {wanted} tokens is more than the {allowed} that the model was made for: lower it, or leave it out"
    )]
    MaxLength { wanted: usize, allowed: usize },
    #[error("{tokens} tokens do not fit in {blocks} blocks of the cache")]
    Blocks { tokens: usize, blocks: usize },
    #[error("cannot start the engine's threads: {0}")]
    NoThreads(std::io::Error),
    #[error("device {0:?} is not known; use cpu or cuda")]
    UnknownDevice(String),
    #[error("no CUDA device: {0}")]
    NoCuda(String),
    #[error("CUDA failed: {0}")]
    Cuda(String),
    #[error("VICUNA_THREADS={0:?} is not a number of threads from 1 to 1024")]
    Threads(String),
    #[error("the adapter is not usable: {0}")]
    Lora(String),
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}
