//! Tokens per second of the engine alone: a prompt, one sequence, eight sequences. Figures mean
//! something beside those of a peer from the same run only (llama.cpp's `llama-bench`, transformers).

use anyhow::{Result, bail};
use clap::Parser;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tch::Kind;
use vicuna_model::inference::{BLOCK_TOKENS, Engine, EngineOptions, Outputs, Piece, Precision, Want};
use vicuna_model::tiny;

#[derive(Parser)]
struct Options {
    /// Hugging Face directory or GGUF file.
    #[arg(long, required_unless_present = "random_7b")]
    model: Option<PathBuf>,
    /// LLaMA-7B's shape with random weights, on the device that VICUNA_DEVICE names.
    #[arg(long)]
    random_7b: bool,
    /// Sequences that are decoded together, in turn.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8])]
    sequences: Vec<usize>,
    /// Memory for keys and values, in GiB.
    #[arg(long, default_value_t = 1)]
    cache: usize,
    /// file, fp32, bf16, int8 or int4.
    #[arg(long, default_value = "file", value_parser = precision)]
    precision: Precision,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Tokens of the prompt, and of what each sequence has before its first measured token.
    #[arg(long, default_value_t = 256)]
    prompt: usize,
    /// Steps that are measured.
    #[arg(long, default_value_t = 64)]
    steps: usize,
    /// The best of so many runs is told: the others were disturbed.
    #[arg(long, default_value_t = 3)]
    runs: usize,
}

fn precision(name: &str) -> Result<Precision, String> {
    Ok(match name {
        "file" => Precision::File,
        "fp32" => Precision::Fp32,
        "bf16" => Precision::Bf16,
        "int8" => Precision::Int8,
        "int4" => Precision::Int4,
        other => return Err(format!("{other:?} is none of file, fp32, bf16, int8 and int4")),
    })
}

fn main() -> Result<()> {
    let options = Options::parse();
    let device = vicuna_model::device::open(None)?;
    let model = match &options.model {
        Some(path) => vicuna_model::load(path)?,
        None => tiny::random(tiny::llama_7b(), Kind::BFloat16, device),
    };
    let engine_options = EngineOptions {
        device,
        precision: options.precision,
        max_length: Some(options.prompt + options.steps + BLOCK_TOKENS),
        cache_bytes: options.cache << 30,
        threads: options.threads,
    };
    let mut bench = Bench { engine: Engine::new(&model, &engine_options)?, outputs: Outputs::default() };
    let rate = |tokens: usize, spent: Duration| tokens as f64 / spent.as_secs_f64();
    let best = |mut run: Box<dyn FnMut() -> Result<Duration> + '_>| -> Result<Duration> {
        let times = (0..options.runs).map(|_| run()).collect::<Result<Vec<_>>>()?;
        Ok(times.into_iter().min().unwrap_or_default())
    };
    let prompt = best(Box::new(|| bench.prompt(options.prompt)))?;
    println!(
        "{:?}, {device:?}, {} threads: prompt of {}: {:.0} tokens/s",
        options.precision,
        options.threads,
        options.prompt,
        rate(options.prompt, prompt),
    );
    for sequences in options.sequences.iter().copied() {
        let answer = best(Box::new(|| bench.answer(sequences, options.prompt, options.steps)))?;
        println!(
            "  {sequences} sequences: {:.1} tokens/s, {:.2} ms a step",
            rate(sequences * options.steps, answer),
            answer.as_secs_f64() * 1e3 / options.steps as f64,
        );
    }
    Ok(())
}

struct Bench {
    engine: Engine,
    outputs: Outputs,
}

impl Bench {
    fn ids(&self, count: usize) -> Vec<u32> {
        let vocabulary = self.engine.config().vocab as u32;
        (0..count as u32).map(|index| (index * 7919 + 13) % vocabulary).collect()
    }

    /// Time to the logits after a prompt.
    fn prompt(&mut self, length: usize) -> Result<Duration> {
        let (ids, blocks) = (self.ids(length), self.tables(1, length)?);
        let started = Instant::now();
        let piece = Piece { tokens: &ids, past: 0, blocks: &blocks[0], want: Want::Last, adapter: None };
        self.engine.step(&[piece], &mut self.outputs)?;
        Ok(started.elapsed())
    }

    /// Time of greedy steps of several sequences after their prompts.
    fn answer(&mut self, sequences: usize, past: usize, steps: usize) -> Result<Duration> {
        let (ids, tables) = (self.ids(past), self.tables(sequences, past + steps)?);
        for blocks in &tables {
            let piece = Piece { tokens: &ids, past: 0, blocks, want: Want::Nothing, adapter: None };
            self.engine.step(&[piece], &mut self.outputs)?;
        }
        let mut last = vec![[1u32]; sequences];
        let started = Instant::now();
        for step in 0..steps {
            let piece =
                |(tokens, blocks): (_, _)| Piece { tokens, past: past + step, blocks, want: Want::Last, adapter: None };
            let pieces: Vec<Piece<'_>> =
                last.iter().zip(&tables).map(|(tokens, blocks)| piece((&tokens[..], &blocks[..]))).collect();
            self.engine.step(&pieces, &mut self.outputs)?;
            for (index, last) in last.iter_mut().enumerate() {
                *last = [likeliest(self.outputs.logits(index).next().unwrap_or_default())];
            }
        }
        Ok(started.elapsed())
    }

    /// Blocks for so many sequences of this length.
    fn tables(&self, sequences: usize, length: usize) -> Result<Vec<Vec<u32>>> {
        let each = length.div_ceil(BLOCK_TOKENS) as u32;
        if sequences as u32 * each > self.engine.blocks() as u32 {
            bail!("the cache has {} blocks; {sequences} sequences need {each} each", self.engine.blocks());
        }
        Ok((0..sequences as u32).map(|index| (index * each..(index + 1) * each).collect()).collect())
    }
}

fn likeliest(logits: &[f32]) -> u32 {
    let better = |best: usize, id: usize| if logits[id] > logits[best] { id } else { best };
    (0..logits.len()).reduce(better).unwrap_or(0) as u32
}
