//! Writing a model as one GGUF file, as llama.cpp's converter lays it out.

use super::{LAYER_NAMES, MAGIC, ROPE_FACTORS, rotated_heads, tokenizer};
use crate::digest::copy_f32_bytes;
use crate::layers::frequencies;
use crate::parameters::{self, EMBEDDING, FINAL_NORM, LM_HEAD, parameter_names, parameter_shape};
use crate::{Config, Family, ModelError, Pretrained, RopeScaling};
use half::{bf16, f16};
use serde_json::Value;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use tch::Tensor;

const ALIGNMENT: usize = 32;
const VERSION: u32 = 3;

/// What matrices are written as; vectors are fp32 in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    F32,
    F16,
    Bf16,
}

impl Weights {
    /// ggml's type number.
    fn kind(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 30,
        }
    }

    /// `general.file_type`.
    fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 32,
        }
    }

    fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    fn write(self, value: f32, to: &mut Vec<u8>) {
        match self {
            Self::F32 => to.extend(value.to_le_bytes()),
            Self::F16 => to.extend(f16::from_f32(value).to_le_bytes()),
            Self::Bf16 => to.extend(bf16::from_f32(value).to_le_bytes()),
        }
    }
}

/// Writes `model` with its tokenizer and chat template. Weights that fp16 cannot hold are refused; a file
/// that could not be written to its end is removed.
pub fn save(path: &Path, model: &Pretrained, weights: Weights) -> Result<(), ModelError> {
    parameters::check(&model.config, &model.tensors)?;
    let entries = tensors(model, weights)?;
    let header = header(model, weights, &entries)?;
    let failed = |source| ModelError::Write { path: path.to_owned(), source };
    let mut file = BufWriter::new(File::create(path).map_err(failed)?);
    let written = file.write_all(&header).map_err(failed).and_then(|()| write_data(&mut file, path, &entries));
    let written = written.and_then(|()| file.flush().map_err(failed));
    if written.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_file(path);
    }
    written
}

/// A tensor of the file.
struct Entry {
    name: String,
    tensor: Tensor,
    weights: Weights,
}

impl Entry {
    fn length(&self) -> usize {
        self.tensor.numel() * self.weights.bytes()
    }
}

fn tensors(model: &Pretrained, weights: Weights) -> Result<Vec<Entry>, ModelError> {
    let config = &model.config;
    let mut entries = Vec::new();
    if let Some(divisors) = rope_divisors(config)? {
        let tensor = Tensor::f_from_slice(&divisors)?;
        entries.push(Entry { name: ROPE_FACTORS.to_owned(), tensor, weights: Weights::F32 });
    }
    for name in parameter_names(config) {
        let missing = || ModelError::MissingTensor {
            expected: parameter_shape(config, &name).unwrap_or_default(),
            name: name.clone(),
        };
        let tensor = model.tensors.get(&name).ok_or_else(missing)?;
        let weights = if tensor.dim() > 1 { weights } else { Weights::F32 };
        let theirs = gguf_name(&name).ok_or_else(missing)?;
        entries.push(Entry { name: theirs, tensor: paired_rows(config, &name, tensor)?, weights });
    }
    Ok(entries)
}

/// The rule of Llama 3 has no metadata: files hold what it comes to.
fn rope_divisors(config: &Config) -> Result<Option<Vec<f32>>, ModelError> {
    if !matches!(config.rope_scaling, RopeScaling::Llama3 { .. }) {
        return Ok(None);
    }
    let plain = frequencies(config.rope_theta, config.head_dim)?;
    let mut scaled = plain.clone();
    config.rope_scaling.apply(&mut scaled, config.rope_theta);
    Ok(Some(plain.iter().zip(scaled).map(|(plain, scaled)| plain / scaled).collect()))
}

fn gguf_name(name: &str) -> Option<String> {
    match name {
        EMBEDDING => return Some("token_embd.weight".to_owned()),
        FINAL_NORM => return Some("output_norm.weight".to_owned()),
        LM_HEAD => return Some("output.weight".to_owned()),
        _ => {}
    }
    let (index, name) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (theirs, _) = LAYER_NAMES.iter().find(|(_, ours)| *ours == name)?;
    Some(format!("blk.{index}.{theirs}"))
}

/// Neighbouring rows of a head are rotated together, where Hugging Face takes row `i` and
/// `i + head_dim / 2`.
fn paired_rows(config: &Config, name: &str, tensor: &Tensor) -> Result<Tensor, ModelError> {
    let Some(heads) = rotated_heads(config, name) else {
        return Ok(tensor.shallow_clone());
    };
    let halves = [heads as i64, 2, config.head_dim as i64 / 2, config.hidden as i64];
    Ok(tensor.f_contiguous()?.f_view(halves)?.f_transpose(1, 2)?.f_reshape(tensor.size())?)
}

fn header(model: &Pretrained, weights: Weights, entries: &[Entry]) -> Result<Vec<u8>, ModelError> {
    let mut metadata = Metadata::default();
    describe(&model.config, weights, &mut metadata);
    tokenizer::describe(&model.tokenizer, &model.config, &mut metadata)?;
    if let Some(template) = &model.chat_template {
        metadata.text("tokenizer.chat_template", template);
    }
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((entries.len() as u64).to_le_bytes());
    bytes.extend(metadata.count.to_le_bytes());
    bytes.extend(&metadata.bytes);
    let mut offset = 0;
    for entry in entries {
        put_text(&mut bytes, &entry.name);
        let shape = entry.tensor.size();
        bytes.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|size| bytes.extend((*size as u64).to_le_bytes()));
        bytes.extend(entry.weights.kind().to_le_bytes());
        bytes.extend((offset as u64).to_le_bytes());
        offset += entry.length().next_multiple_of(ALIGNMENT);
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    Ok(bytes)
}

fn describe(config: &Config, weights: Weights, metadata: &mut Metadata) {
    let architecture = if config.family == Family::Qwen2 { "qwen2" } else { "llama" };
    metadata.text("general.architecture", architecture);
    metadata.number("general.file_type", weights.file_type() as usize);
    let key = |name: &str| format!("{architecture}.{name}");
    let sizes = [
        ("context_length", config.rope_scaling.unstretched(config.max_position)),
        ("embedding_length", config.hidden),
        ("block_count", config.layers),
        ("feed_forward_length", config.intermediate),
        ("attention.head_count", config.heads),
        ("attention.head_count_kv", config.kv_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.head_dim),
        ("vocab_size", config.vocab),
    ];
    sizes.into_iter().for_each(|(name, value)| metadata.number(&key(name), value));
    if let Some(window) = config.sliding_window {
        metadata.number(&key("attention.sliding_window"), window);
    }
    metadata.float(&key("attention.layer_norm_rms_epsilon"), config.eps);
    metadata.float(&key("rope.freq_base"), config.rope_theta);
    config.rope_scaling.describe(|name, value| match value {
        Value::String(text) => metadata.text(&key(name), &text),
        Value::Number(number) if number.is_u64() => metadata.number(&key(name), number.as_u64().unwrap_or(0) as usize),
        other => metadata.float(&key(name), other.as_f64().unwrap_or(0.0)),
    });
}

fn write_data(file: &mut impl Write, path: &Path, entries: &[Entry]) -> Result<(), ModelError> {
    let (mut values, mut bytes) = (Vec::new(), Vec::new());
    for entry in entries {
        copy_f32_bytes(&entry.tensor, &mut values)?;
        bytes.clear();
        for value in values.chunks_exact(4) {
            let value = f32::from_le_bytes([value[0], value[1], value[2], value[3]]);
            if entry.weights == Weights::F16 && value.is_finite() && !f16::from_f32(value).is_finite() {
                return Err(ModelError::Gguf(format!(
                    "tensor {} holds {value}, which fp16 cannot; write it as bf16",
                    entry.name
                )));
            }
            entry.weights.write(value, &mut bytes);
        }
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        file.write_all(&bytes).map_err(|source| ModelError::Write { path: path.to_owned(), source })?;
    }
    Ok(())
}

/// Metadata fields as the format writes them.
#[derive(Default)]
pub(super) struct Metadata {
    bytes: Vec<u8>,
    count: u64,
}

impl Metadata {
    fn field(&mut self, key: &str, kind: u32) {
        put_text(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
        self.count += 1;
    }

    fn array(&mut self, key: &str, kind: u32, count: usize) {
        self.field(key, 9);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((count as u64).to_le_bytes());
    }

    pub fn number(&mut self, key: &str, value: usize) {
        self.field(key, 4);
        self.bytes.extend((value as u32).to_le_bytes());
    }

    fn float(&mut self, key: &str, value: f64) {
        self.field(key, 6);
        self.bytes.extend((value as f32).to_le_bytes());
    }

    pub fn switch(&mut self, key: &str, value: bool) {
        self.field(key, 7);
        self.bytes.push(value.into());
    }

    pub fn text(&mut self, key: &str, value: &str) {
        self.field(key, 8);
        put_text(&mut self.bytes, value);
    }

    pub fn texts(&mut self, key: &str, values: &[String]) {
        self.array(key, 8, values.len());
        values.iter().for_each(|value| put_text(&mut self.bytes, value));
    }

    pub fn signed(&mut self, key: &str, values: &[i32]) {
        self.array(key, 5, values.len());
        values.iter().for_each(|value| self.bytes.extend(value.to_le_bytes()));
    }

    pub fn floats(&mut self, key: &str, values: &[f32]) {
        self.array(key, 6, values.len());
        values.iter().for_each(|value| self.bytes.extend(value.to_le_bytes()));
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}
