//! Tokens per second of a step's gradients alone: forward, recomputation and backward of every
//! micro-batch, layer-major, with fp32 sums in the canonical order. LLaMA-7B's shape, random weights. Figures
//! mean something beside those of a peer from the same run only.

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use std::time::Instant;
use tch::Kind;
use tokio_util::sync::CancellationToken;
use vicuna_model::layers::{IGNORED, Rope};
use vicuna_model::tiny;
use vicuna_trainer::batch::MicroBatch;
use vicuna_trainer::blocks::BlockTable;
use vicuna_trainer::heap;
use vicuna_trainer::state::Weights;
use vicuna_trainer::step::gradients::Computation;
use vicuna_trainer::step::weights::Source;

/// Tokens of a question, and of a reply.
const TURN: usize = 32;

#[derive(Parser)]
struct Options {
    /// Layers, if not the model's.
    #[arg(long)]
    layers: Option<usize>,
    /// Micro-batches of a step.
    #[arg(long, default_value_t = 8)]
    micro_batches: usize,
    /// Sequences of a micro-batch.
    #[arg(long, default_value_t = 1)]
    rows: usize,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 2048)]
    length: usize,
    #[arg(long, default_value_t = 3)]
    steps: usize,
    /// Of the last layers, how many are kept whole instead of run again.
    #[arg(long, default_value_t = 0)]
    whole_layers: usize,
    /// SmolLM2-135M's shape instead of LLaMA-7B's.
    #[arg(long)]
    smollm2: bool,
    /// Compute in fp32, not in bf16.
    #[arg(long)]
    fp32: bool,
    /// Learn every other run of 32 tokens, as of conversations, not all.
    #[arg(long)]
    replies: bool,
    /// Let torch choose kernels that do not repeat their bits.
    #[arg(long)]
    fast: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    heap::keep_freed_memory();
    let open = if options.fast { vicuna_model::device::open } else { vicuna_model::device::open_exact };
    let device = open(None)?;
    // The same weights each time: figures of one shape have the same loss and bits.
    tch::manual_seed(0);
    let kind = if options.fp32 { Kind::Float } else { Kind::BFloat16 };
    let shape = if options.smollm2 { tiny::smollm2_135m() } else { tiny::llama_7b() };
    let layers = options.layers.unwrap_or(shape.layers);
    let model = tiny::random(vicuna_model::Config { layers, ..shape }, kind, device);
    let table = BlockTable::new(&model.config);
    let tensor = |name: &String| model.tensors.get(name).map(tch::Tensor::shallow_clone).context("complete");
    let tensors = table.parameters.iter().map(|parameter| tensor(&parameter.name)).collect::<Result<_>>()?;
    let weights = Weights { tensors };
    let rope = Rope::new(&model.config, options.length, device, kind);
    let abort = CancellationToken::new();
    let computation = Computation {
        config: &model.config,
        table: &table,
        rope: &rope,
        device,
        adapted: None,
        step: 1,
        whole_layers: options.whole_layers,
        offload: false,
        abort: &abort,
    };
    let batches: Vec<_> = (0..options.micro_batches).map(|index| batch(&options, index)).collect();
    let tokens = options.micro_batches * options.rows * options.length;
    let mut digests = Vec::new();
    for step in 0..=options.steps {
        let started = Instant::now();
        let mut sums = Vec::new();
        let losses = computation
            .run(&mut Source::Here(&table, &weights), 0, &batches, |partial| {
                // One number of each group, so that the work is done and can be compared.
                sums.extend(partial.sums.iter().flat_map(|(_, sum)| sum.tensors()).map(|sum| sum.sum(Kind::Double)));
                Ok(())
            })
            .map_err(|error| anyhow!(error))?;
        let sums: Vec<u64> = sums.iter().map(|sum| sum.double_value(&[]).to_bits()).collect();
        let seconds = started.elapsed().as_secs_f64();
        let loss = losses.iter().sum::<f64>() / tokens as f64;
        let name = if step == 0 { "warm-up".to_owned() } else { format!("step {step}") };
        println!("{name}: {:.0} tokens/s, {seconds:.2} s, loss {loss:.4}", tokens as f64 / seconds);
        digests.push(blake3::hash(bytemuck::cast_slice(&sums)));
    }
    let equal = digests.windows(2).all(|pair| pair[0] == pair[1]);
    let bits = digests[0].to_hex();
    println!(
        "gradients of all steps {}",
        if equal { format!("have the same bits, {}", &bits[..16]) } else { "differ".to_owned() }
    );
    Ok(())
}

fn batch(options: &Options, index: usize) -> MicroBatch {
    let ids: Vec<i64> =
        (0..options.rows * options.length).map(|place| ((place + index * 77) * 7919 + 13) as i64 % 32_000).collect();
    let is_learned = |place: usize| !options.replies || (place % options.length / TURN).is_multiple_of(2);
    let label = |(place, id): (usize, &i64)| if is_learned(place) { *id } else { IGNORED };
    let labels = ids.iter().enumerate().map(label).collect();
    MicroBatch { rows: options.rows, length: options.length, labels, ids, packed: None }
}
