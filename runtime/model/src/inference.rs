//! Inference over a paged key-value cache (Kwon et al. 2023, "PagedAttention"). A step takes pieces
//! of many sequences, prompts and single tokens alike; each attends to its own blocks. Which blocks a
//! sequence has is the caller's business.

mod cpu;
mod torch;

use crate::lora::Adapter;
use crate::{Config, ModelError, Pretrained};
use cpu::CpuEngine;
use tch::{Device, Kind};
use torch::{Bits, Place, TorchEngine};

/// Tokens whose keys and values share a block.
pub const BLOCK_TOKENS: usize = 16;

/// What the weights are held as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Quantised tensors of a GGUF file as they are there, others as fp32.
    File,
    Fp32,
    Bf16,
    /// On the CPU integers with a scale for each 32 weights of a row, and activations rounded to 15 bits; on a GPU integers with
    /// a scale for each row, and activations in bf16.
    Int8,
    /// 4 bits with scale and minimum for each 32 weights; on the CPU embedding and output projection have 8. On a GPU
    /// activations are bf16, and so is the embedding.
    Int4,
}

#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    pub device: Device,
    pub precision: Precision,
    /// Sequences are bounded by it, or by the model's own limit if that is smaller.
    pub max_length: Option<usize>,
    /// Memory for keys and values. One sequence of the greatest length fits in any case.
    pub cache_bytes: usize,
    /// Threads of a step on the CPU.
    pub threads: usize,
}

/// Some tokens of a sequence, one after another, and what to compute of them.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    pub tokens: &'a [u32],
    /// Tokens of the sequence before these; their keys and values are in the cache.
    pub past: usize,
    /// The sequence's blocks in order, enough for `past` and `tokens`.
    pub blocks: &'a [u32],
    pub want: Want,
    /// Which of the engine's adapters computes it; `None`: the bare model.
    pub adapter: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Only keys and values.
    Nothing,
    /// Logits of what follows the last token.
    Last,
    /// Logits of what follows each token.
    Every,
    /// The sum of the normalised last hidden states.
    Hidden,
}

/// What a step computed, piece by piece; kept from step to step, so that its memory is.
#[derive(Debug, Default)]
pub struct Outputs {
    vocabulary: usize,
    /// First row of logits of each piece.
    rows: Vec<usize>,
    /// `[rows, V]`.
    logits: Vec<f32>,
    /// One a piece, empty unless it was wanted.
    hidden: Vec<Vec<f32>>,
}

impl Outputs {
    fn begin(&mut self, vocabulary: usize, pieces: &[Piece<'_>]) {
        self.vocabulary = vocabulary;
        self.rows.clear();
        let mut rows = 0;
        for piece in pieces {
            self.rows.push(rows);
            rows += match piece.want {
                Want::Last => 1,
                Want::Every => piece.tokens.len(),
                Want::Nothing | Want::Hidden => 0,
            };
        }
        self.rows.push(rows);
        self.logits.resize(rows * vocabulary, 0.0);
        self.hidden.clear();
        self.hidden.resize(pieces.len(), Vec::new());
    }

    /// Logits of a piece, one row after another.
    pub fn logits(&mut self, piece: usize) -> std::slice::ChunksExactMut<'_, f32> {
        let rows = self.rows[piece]..self.rows[piece + 1];
        self.logits[rows.start * self.vocabulary..rows.end * self.vocabulary].chunks_exact_mut(self.vocabulary)
    }

    /// The sum of a piece's hidden states.
    pub fn hidden(&self, piece: usize) -> &[f32] {
        &self.hidden[piece]
    }
}

/// Weights on their device, and the cache.
#[derive(Debug)]
pub struct Engine {
    config: Config,
    max_length: usize,
    blocks: usize,
    precision: &'static str,
    adapters: usize,
    backend: Backend,
}

#[derive(Debug)]
enum Backend {
    Cpu(Box<CpuEngine>),
    Torch(Box<TorchEngine>),
}

impl Engine {
    /// Lays out the weights and sets memory aside for the cache.
    pub fn new(model: &Pretrained, options: &EngineOptions) -> Result<Self, ModelError> {
        Self::adapted(model, &[], options)
    }

    /// With adapters, which stay apart from the weights: each piece of a step has one, or none. They are
    /// held as fp32 on the CPU, and in the engine's type on a GPU.
    pub fn adapted(model: &Pretrained, adapters: &[Adapter], options: &EngineOptions) -> Result<Self, ModelError> {
        let config = &model.config;
        crate::parameters::check(config, &model.tensors)?;
        for adapter in adapters {
            adapter.check(|name| model.tensors.get(name).map(tch::Tensor::size))?;
        }
        let max_length = max_length(options.max_length, config.max_position)?;
        let on_cpu = options.device == Device::Cpu;
        let token_bytes = match on_cpu {
            true => CpuEngine::token_bytes(config),
            false => TorchEngine::token_bytes(config, on_gpu(options.precision, options.device).kind),
        };
        let blocks = blocks_within(options.cache_bytes, token_bytes, max_length);
        let backend = match on_cpu {
            true => {
                let engine = CpuEngine::new(model, adapters, options.precision, max_length, blocks, options.threads)?;
                Backend::Cpu(Box::new(engine))
            }
            false => {
                let place = on_gpu(options.precision, options.device);
                Backend::Torch(Box::new(TorchEngine::new(model, adapters, place, max_length, blocks)?))
            }
        };
        let precision = name_of(options.precision, on_cpu, !model.packed.is_empty());
        Ok(Self { config: config.clone(), max_length, blocks, precision, adapters: adapters.len(), backend })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Most tokens that a sequence may hold, prompt and completion together.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// What the weights are held as: engines of one model where this is equal give the same numbers, up
    /// to rounding.
    pub fn precision(&self) -> &'static str {
        self.precision
    }

    /// Blocks of the cache.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Computes all pieces. Each is as if it were alone; on the CPU to the bit.
    ///
    /// Refuses pieces that are empty, longer than the model allows, of unknown tokens or adapters, or with
    /// too few blocks; nothing is computed then.
    pub fn step(&mut self, pieces: &[Piece<'_>], outputs: &mut Outputs) -> Result<(), ModelError> {
        pieces.iter().try_for_each(|piece| self.check(piece))?;
        match &mut self.backend {
            Backend::Cpu(engine) => engine.step(pieces, outputs),
            Backend::Torch(engine) => engine.step(pieces, outputs)?,
        }
        Ok(())
    }

    fn check(&self, piece: &Piece<'_>) -> Result<(), ModelError> {
        let vocabulary = self.config.vocab;
        let length = piece.past + piece.tokens.len();
        if let Some(id) = piece.tokens.iter().find(|id| **id as usize >= vocabulary) {
            return Err(ModelError::UnknownToken { id: *id, vocabulary });
        }
        if piece.tokens.is_empty() || length > self.max_length {
            return Err(ModelError::TooLong { tokens: length, max_length: self.max_length });
        }
        if let Some(adapter) = piece.adapter.filter(|adapter| *adapter >= self.adapters) {
            return Err(ModelError::Lora(format!("there is no adapter {adapter} among {}", self.adapters)));
        }
        let known = piece.blocks.iter().all(|block| (*block as usize) < self.blocks);
        if !known || piece.blocks.len() * BLOCK_TOKENS < length {
            return Err(ModelError::Blocks { tokens: length, blocks: piece.blocks.len() });
        }
        Ok(())
    }
}

fn max_length(wanted: Option<usize>, allowed: usize) -> Result<usize, ModelError> {
    match wanted {
        Some(wanted) if wanted > allowed => Err(ModelError::MaxLength { wanted, allowed }),
        wanted => Ok(wanted.unwrap_or(allowed)),
    }
}

fn blocks_within(bytes: usize, token_bytes: usize, max_length: usize) -> usize {
    let wanted = bytes / (token_bytes * BLOCK_TOKENS);
    wanted.max(max_length.div_ceil(BLOCK_TOKENS))
}

fn name_of(precision: Precision, on_cpu: bool, packed: bool) -> &'static str {
    match (precision, on_cpu) {
        (Precision::File, true) if packed => "gguf",
        (Precision::File | Precision::Fp32, _) => "fp32",
        (Precision::Bf16, _) => "bf16",
        (Precision::Int8, true) => "int8",
        (Precision::Int4, true) => "int4",
        // Rounded another way: a stream that began with one of them does not go on with the other.
        (Precision::Int8, false) => "int8-gpu",
        (Precision::Int4, false) => "int4-gpu",
    }
}

/// What a GPU holds and computes with; next to integers there is bf16.
fn on_gpu(precision: Precision, device: Device) -> Place {
    let (kind, bits) = match precision {
        Precision::File | Precision::Fp32 => (Kind::Float, None),
        Precision::Bf16 => (Kind::BFloat16, None),
        Precision::Int8 => (Kind::BFloat16, Some(Bits::Eight)),
        Precision::Int4 => (Kind::BFloat16, Some(Bits::Four)),
    };
    Place { device, kind, bits }
}

fn missing_if_none<T>(name: &str, found: Option<T>) -> Result<T, ModelError> {
    found.ok_or_else(|| ModelError::MissingTensor { name: name.to_owned(), expected: Vec::new() })
}

#[cfg(test)]
mod tests;
