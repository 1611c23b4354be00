//! `vicuna-trainer estimate`.

use super::limits::Limits;
use super::remedies::remedies;
use super::{Need, Workload, data_bytes};
use crate::adapters;
use crate::blocks::BlockTable;
use crate::prepare::LARGEST_ESTIMATE;
use anyhow::{Context, Result};
use clap::ValueEnum;
use std::fmt::Write;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use vicuna_data::read;
use vicuna_model::{Config, load_config};
use vicuna_protocol::gigabytes;
use vicuna_protocol::job::{
    Base, Lora, Method, Parameters, Precision, Recipe, Recompute, Reproducibility, RunLength, Schedule,
};

#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// The model: its directory, its config.json alone, or a GGUF file.
    #[arg(long)]
    model: PathBuf,
    #[arg(long, value_enum, default_value_t = Trained::Full)]
    method: Trained,
    /// Rank of LoRA's and QLoRA's adapters.
    #[arg(long, default_value_t = 8)]
    lora_rank: u32,
    /// What the adapters are of: q_proj, v_proj and so on, or all-linear.
    #[arg(long, value_delimiter = ',', default_value = "q_proj,v_proj")]
    targets: Vec<String>,
    /// Compute in bf16.
    #[arg(long)]
    bf16: bool,
    /// The model computes on a GPU.
    #[arg(long)]
    gpu: bool,
    /// Whether layers are computed again for their gradients, as recipe.memory.recompute.
    #[arg(long, value_enum, default_value_t = Again::Auto)]
    recompute: Again,
    /// Where the weights are that ranks compute with, as recipe.memory.parameters. Without --host-memory and
    /// --device-memory there is always room for replicated ones.
    #[arg(long, value_enum, default_value_t = Whose::Auto)]
    parameters: Whose,
    /// Layers' inputs wait in host memory, as recipe.memory.offload.
    #[arg(long, requires = "gpu")]
    offload: bool,
    /// Sequences of a step, over all ranks.
    #[arg(long, default_value_t = 128)]
    global_batch: u32,
    /// Sequences that one rank runs at a time.
    #[arg(long, default_value_t = 1)]
    micro_batch: u32,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 2048)]
    max_length: u32,
    /// Several sequences share a row of --max-length tokens, as recipe.packing.
    #[arg(long)]
    packing: bool,
    /// Conversations that are trained on, files or folders: every rank holds where each of them is.
    #[arg(long)]
    data: Vec<PathBuf>,
    /// Numbers of ranks: from 1 to this, or FIRST..LAST.
    #[arg(long, default_value = "8", value_parser = ranks)]
    ranks: RangeInclusive<u32>,
    /// What a rank has on the host, such as 64Gi: says which numbers of ranks fit.
    #[arg(long, value_parser = bytes)]
    host_memory: Option<u64>,
    /// What a rank's GPU has, such as 80G.
    #[arg(long, value_parser = bytes, requires = "gpu")]
    device_memory: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Trained {
    Full,
    Lora,
    /// With the base in NF4.
    Qlora,
    /// QLoRA with the base in 8 bits.
    Qlora8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Again {
    Auto,
    Always,
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Whose {
    Auto,
    Replicated,
    Sharded,
}

/// Prints a table, with a verdict for each number of ranks where there are limits.
pub fn run(arguments: &Arguments) -> Result<()> {
    let config = load_config(&arguments.model).with_context(|| arguments.model.display().to_string())?;
    print!("{}", table(arguments, &config)?);
    Ok(())
}

fn table(arguments: &Arguments, config: &Config) -> Result<String> {
    let (recipe, data) = (recipe(arguments), held_bytes(&arguments.data)?);
    let blocks = blocks(config, &recipe)?;
    let workload = Workload { config, table: &blocks, recipe: &recipe, gpu: arguments.gpu, data, slow_store: true };
    let mut text = String::new();
    writeln!(
        text,
        "{} parameters, {} trained; each rank needs at its peak",
        config.parameter_count(),
        blocks.elements()
    )?;
    let needs: Vec<Need> =
        arguments.ranks.clone().map(|ranks| workload.need_within(ranks, limits(arguments))).collect();
    for need in &needs {
        writeln!(text, "{}{}", line(need), verdict(need, limits(arguments)))?;
    }
    let layer = workload.run_bytes_a_token() * workload.tokens();
    writeln!(text, "a layer of a micro-batch that is kept instead of computed again: {} more", gigabytes(layer))?;
    if arguments.max_length as usize > config.max_position {
        let has = config.max_position;
        writeln!(text, "the model is made for {has} tokens: longer sequences need recipe.ropeScaling")?;
    }
    if !needs.iter().all(|need| need.fits(limits(arguments))) {
        writeln!(text, "{}", advice(&workload, limits(arguments), *arguments.ranks.end()))?;
    }
    Ok(text)
}

fn limits(arguments: &Arguments) -> Limits {
    Limits { host: arguments.host_memory, reserved: arguments.host_memory, device: arguments.device_memory }
}

fn line(need: &Need) -> String {
    let parts = need.parts.iter().map(|part| {
        let place = if part.on_device { "device" } else { "host" };
        format!("{} {} ({place})", part.what, gigabytes(part.bytes))
    });
    let device = if need.device > 0 { format!(", device {}", gigabytes(need.device)) } else { String::new() };
    let sharded = if need.sharded { "weights sharded, " } else { "" };
    format!(
        "{:>3} ranks: {sharded}host {}{device}: {}",
        need.ranks,
        gigabytes(need.host),
        parts.collect::<Vec<_>>().join(", ")
    )
}

/// Nothing where nobody says what there is.
fn verdict(need: &Need, limits: Limits) -> String {
    let lacks = |what: &str, bytes: u64, limit: Option<u64>| {
        let lacking = limit.and_then(|limit| bytes.checked_sub(limit)).filter(|bytes| *bytes > 0)?;
        Some(format!("{} more on the {what}", gigabytes(lacking)))
    };
    let lacks = [lacks("host", need.host, limits.host), lacks("device", need.device, limits.device)];
    let lacks: Vec<String> = lacks.into_iter().flatten().collect();
    match (limits.host.or(limits.device), lacks.is_empty()) {
        (None, _) => String::new(),
        (_, true) => "; fits".to_owned(),
        (_, false) => format!("; does not fit: needs {}", lacks.join(" and ")),
    }
}

/// What would fit: more ranks, or other settings with as many.
fn advice(workload: &Workload<'_>, limits: Limits, last: u32) -> String {
    let fits = |ranks: &u32| workload.need_within(*ranks, limits).fits(limits);
    let more = (1..=LARGEST_ESTIMATE).find(fits).map(|ranks| format!("at least {ranks} ranks"));
    let changed = remedies(workload, limits, last..=last);
    let changed = changed.iter().map(|remedy| format!("{} among {last}", remedy.options()));
    let found: Vec<String> = more.into_iter().chain(changed).collect();
    match found.is_empty() {
        true => "no change of settings would fit: give ranks more memory".to_owned(),
        false => format!("what would fit: {}", found.join("; ")),
    }
}

fn blocks(config: &Config, recipe: &Recipe) -> Result<BlockTable> {
    Ok(BlockTable::of(config, adapters::lora(&recipe.method)?.as_ref()))
}

/// Bytes of these files and folders that their sequences come to in memory.
fn held_bytes(paths: &[PathBuf]) -> Result<u64> {
    let mut files = Vec::new();
    for path in paths {
        for file in read::files(path)?.paths {
            let bytes = std::fs::metadata(&file).with_context(|| file.display().to_string())?.len();
            files.push((file.display().to_string(), bytes));
        }
    }
    Ok(data_bytes(&files))
}

/// `8` or `4..16`.
fn ranks(text: &str) -> Result<RangeInclusive<u32>, String> {
    let number = |text: &str| text.parse::<u32>().ok().filter(|ranks| (1..=LARGEST_ESTIMATE).contains(ranks));
    let (first, last) = text.split_once("..").unwrap_or(("1", text));
    let range = number(first).zip(number(last)).filter(|(first, last)| first <= last);
    let (first, last) =
        range.ok_or_else(|| format!("give a number from 1 to {LARGEST_ESTIMATE}, or two such as 4..16"))?;
    Ok(first..=last)
}

/// A quantity as Kubernetes writes it: `64Gi`, `80G`, or bytes.
fn bytes(text: &str) -> Result<u64, String> {
    let units = [("Ki", 1 << 10), ("Mi", 1 << 20), ("Gi", 1 << 30), ("Ti", 1_u64 << 40)];
    let units = units.into_iter().chain([("M", 1_000_000), ("G", 1_000_000_000), ("T", 1_000_000_000_000), ("", 1)]);
    let given = units.into_iter().find_map(|(unit, size)| Some((text.strip_suffix(unit)?.parse::<f64>().ok()?, size)));
    let given = given.filter(|(number, _)| number.is_finite() && *number > 0.0);
    let (number, size) = given.ok_or_else(|| "give a number of bytes such as 64Gi or 80G".to_owned())?;
    Ok((number * size as f64) as u64)
}

fn recipe(arguments: &Arguments) -> Recipe {
    let lora = || Lora { rank: arguments.lora_rank, targets: arguments.targets.clone(), ..Lora::default() };
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
        recompute: match arguments.recompute {
            Again::Auto => Recompute::Auto,
            Again::Always => Recompute::Always,
            Again::Never => Recompute::Never,
        },
        parameters: match arguments.parameters {
            Whose::Auto => Parameters::Auto,
            Whose::Replicated => Parameters::Replicated,
            Whose::Sharded => Parameters::Sharded,
        },
        offload: arguments.offload,
        packing: arguments.packing,
        // What does not take memory.
        length: RunLength::Steps(1),
        learning_rate: 1e-5,
        schedule: Schedule::Constant,
        warmup_ratio: 0.0,
        weight_decay: 0.0,
        gradient_clip: 1.0,
        seed: 0,
        evaluate_every: None,
        rope_scaling: None,
        reproducibility: Reproducibility::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use vicuna_model::tiny;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn estimated(options: &str) -> String {
        let words = ["estimate", "--model", "m", "--bf16", "--gpu"].into_iter().chain(options.split_whitespace());
        table(&Command::parse_from(words).arguments, &tiny::llama_7b()).unwrap()
    }

    #[test]
    fn numbers_of_ranks_and_bytes_are_read_as_people_write_them() {
        assert_eq!((ranks("8"), ranks("4..16")), (Ok(1..=8), Ok(4..=16)));
        assert!(["0", "9..4", "513", "a", ""].iter().all(|text| ranks(text).is_err()));
        assert_eq!(
            (bytes("64Gi"), bytes("80G"), bytes("1.5Ki"), bytes("7")),
            (Ok(64 << 30), Ok(80_000_000_000), Ok(1536), Ok(7))
        );
        assert!(["", "Gi", "-1G", "1X"].iter().all(|text| bytes(text).is_err()));
    }

    #[test]
    fn every_number_of_ranks_has_a_verdict_where_there_are_limits() {
        assert!(!estimated("--ranks 2").contains("fit"));
        let text = estimated("--ranks 1..3 --host-memory 64Gi --device-memory 80G");
        let lines: Vec<&str> = text.lines().filter(|line| line.contains(" ranks: ")).collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[0].contains("; does not fit: needs ") && lines[0].contains(" more on the host"), "{text}");
        let fewest = text.lines().last().unwrap();
        assert!(fewest.contains("at least ") && fewest.contains("--method lora"), "{text}");
        assert!(
            estimated("--ranks 1 --global-batch 16 --method qlora --host-memory 64Gi --device-memory 80G")
                .contains("; fits")
        );
    }

    #[test]
    fn what_is_never_computed_again_may_be_what_does_not_fit() {
        let text = estimated(
            "--ranks 1 --global-batch 16 --method lora --recompute never --host-memory 64Gi --device-memory 80G",
        );
        assert!(text.contains("layers that are kept") && text.contains("--recompute auto"), "{text}");
        let first = |options: &str| estimated(options).lines().next().unwrap().to_owned();
        let few = first("--ranks 1 --method lora");
        // 32 layers of adapters of rank 8 at two projections of 4096 x 4096: what a VicunaTraining trains by default.
        assert!(few.contains(&format!(" {} trained", 32 * 2 * 8 * (4096 + 4096))), "{few}");
        assert_ne!(few, first("--ranks 1 --method lora --targets all-linear"));
    }

    #[test]
    fn packing_is_in_the_estimate() {
        let options = "--ranks 1 --method lora --recompute never";
        assert_ne!(estimated(options), estimated(&format!("{options} --packing")));
    }
}
