//! A trained model as one GGUF file, for a worker or for llama.cpp.

use anyhow::{Context, Result};
use std::path::PathBuf;
use vicuna_model::gguf::{self, Weights};

/// `vicuna-trainer export`.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// A Hugging Face directory, like a training's result, or a GGUF file.
    #[arg(long)]
    model: PathBuf,
    /// The file to write; it must not exist.
    #[arg(long)]
    gguf: PathBuf,
    /// What matrices are written as.
    #[arg(long, value_enum, default_value_t = Precision::Bf16)]
    weights: Precision,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Precision {
    F32,
    F16,
    Bf16,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let target = arguments.gguf.display();
    anyhow::ensure!(!arguments.gguf.exists(), "{target} exists already; remove it or name another file");
    let model = vicuna_model::load(&arguments.model)
        .with_context(|| format!("cannot read the model {}", arguments.model.display()))?;
    let weights = match arguments.weights {
        Precision::F32 => Weights::F32,
        Precision::F16 => Weights::F16,
        Precision::Bf16 => Weights::Bf16,
    };
    gguf::save(&arguments.gguf, &model, weights).with_context(|| format!("cannot write {target}"))
}
