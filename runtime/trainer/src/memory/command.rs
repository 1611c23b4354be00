//! `vicuna-trainer estimate`.

use super::{Need, Workload};
use crate::adapters;
use crate::blocks::BlockTable;
use anyhow::{Context, Result};
use clap::ValueEnum;
use std::path::{Path, PathBuf};
use vicuna_model::Config;
use vicuna_protocol::gigabytes;
use vicuna_protocol::job::{Base, Lora, Method, Precision, Recipe, Recompute, RunLength, Schedule};

#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// The model's config.json, or the directory that it is in.
    #[arg(long)]
    model: PathBuf,
    #[arg(long, value_enum, default_value_t = Trained::Full)]
    method: Trained,
    /// Rank of LoRA's and QLoRA's adapters, on all linear maps.
    #[arg(long, default_value_t = 8)]
    lora_rank: u32,
    /// Compute in bf16.
    #[arg(long)]
    bf16: bool,
    /// The model computes on a GPU.
    #[arg(long)]
    gpu: bool,
    /// Sequences of a step, over all ranks.
    #[arg(long, default_value_t = 128)]
    global_batch: u32,
    /// Sequences that one rank runs at a time.
    #[arg(long, default_value_t = 1)]
    micro_batch: u32,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 2048)]
    max_length: u32,
    /// Largest number of ranks.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    ranks: u32,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Trained {
    Full,
    Lora,
    /// With the base in NF4.
    Qlora,
    /// QLoRA with the base in 8 bits.
    Qlora8,
}

/// Prints a table.
pub fn run(arguments: &Arguments) -> Result<()> {
    let config = config(&arguments.model)?;
    let recipe = recipe(arguments);
    let table = match adapters::lora(&recipe.method)? {
        None => BlockTable::new(&config),
        Some(lora) => BlockTable::adapters(&config, &lora),
    };
    let workload = Workload { config: &config, table: &table, recipe: &recipe, gpu: arguments.gpu, data: 0 };
    println!("{} parameters, {} trained; each rank needs at its peak", config.parameter_count(), table.elements());
    for ranks in 1..=arguments.ranks {
        println!("{}", line(&workload.need(ranks)));
    }
    let whole = workload.run_bytes_a_token() * workload.tokens();
    println!("a layer of a micro-batch that is kept instead of computed again: {} more", gigabytes(whole));
    Ok(())
}

fn line(need: &Need) -> String {
    let parts = need.parts.iter().map(|part| {
        let place = if part.on_device { "device" } else { "host" };
        format!("{} {} ({place})", part.what, gigabytes(part.bytes))
    });
    let device = if need.device > 0 { format!(", device {}", gigabytes(need.device)) } else { String::new() };
    format!("{:>3} ranks: host {}{device}: {}", need.ranks, gigabytes(need.host), parts.collect::<Vec<_>>().join(", "))
}

fn config(path: &Path) -> Result<Config> {
    let path = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let json = serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))?;
    Config::from_hugging_face(&json).with_context(|| path.display().to_string())
}

fn recipe(arguments: &Arguments) -> Recipe {
    let lora = || Lora { rank: arguments.lora_rank, alpha: 16.0, dropout: 0.0, targets: vec!["all-linear".to_owned()] };
    Recipe {
        method: match arguments.method {
            Trained::Full => Method::Full,
            Trained::Lora => Method::LoRA(lora()),
            Trained::Qlora => Method::QLoRA(lora(), Base::Nf4),
            Trained::Qlora8 => Method::QLoRA(lora(), Base::Int8),
        },
        global_batch: arguments.global_batch,
        micro_batch: arguments.micro_batch,
        max_length: arguments.max_length,
        precision: if arguments.bf16 { Precision::Bf16 } else { Precision::Fp32 },
        // What does not take memory.
        length: RunLength::Steps(1),
        learning_rate: 1e-5,
        schedule: Schedule::Constant,
        warmup_ratio: 0.0,
        weight_decay: 0.0,
        gradient_clip: 1.0,
        seed: 0,
        evaluate_every: None,
        recompute: Recompute::Auto,
    }
}
