//! GGUF, llama.cpp's single-file format (`docs/gguf.md` in ggml's repository), read without ever
//! trusting a length in it.

mod container;
mod export;
pub(crate) mod packed;
mod quantization;
mod tokenizer;

pub use container::{Gguf, MAGIC, TensorInfo, Value};
pub use export::{Weights, save};
pub(crate) use tokenizer::{added_token, build as tokenizer};

use self::packed::Packed;
use crate::parameters::{self, EMBEDDING, FINAL_NORM, LM_HEAD};
use crate::{Config, Family, ModelError, Pretrained, SpecialTokens};
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// GGUF's name of each parameter within a layer, and Hugging Face's.
const LAYER_NAMES: [(&str, &str); 12] = [
    ("attn_norm.weight", "input_layernorm.weight"),
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
    ("attn_q.bias", "self_attn.q_proj.bias"),
    ("attn_k.bias", "self_attn.k_proj.bias"),
    ("attn_v.bias", "self_attn.v_proj.bias"),
];

/// What each rotary frequency is divided by, where that is not a rule of the metadata.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Reads a whole model from the bytes of a GGUF file.
pub fn load(bytes: &[u8]) -> Result<Pretrained, ModelError> {
    let gguf = Gguf::parse(bytes)?;
    let config = Config::from_gguf(&gguf)?;
    let mut tensors = BTreeMap::new();
    let mut packed = BTreeMap::new();
    for (name, info) in named(&gguf, &config)? {
        let data = gguf.data(info)?;
        if let Some(blocks) = read_packed(&config, &name, info, data) {
            packed.insert(name.clone(), blocks);
        }
        let tensor = read_tensor(&config, &name, info, data)?;
        tensors.insert(name, tensor);
    }
    let tokenizer = tokenizer(&gguf)?;
    Ok(Pretrained {
        special_tokens: SpecialTokens::of(&config, &tokenizer),
        tokenizer,
        chat_template: gguf.text("tokenizer.chat_template").map(str::to_owned),
        config,
        tensors,
        packed,
    })
}

/// All weights by Hugging Face's names, complete and of the right shapes.
pub(crate) fn named<'g>(gguf: &'g Gguf<'_>, config: &Config) -> Result<BTreeMap<String, &'g TensorInfo>, ModelError> {
    let mut named = BTreeMap::new();
    // The configuration has read the rotary factors.
    for info in gguf.tensors().iter().filter(|info| info.name != ROPE_FACTORS) {
        let name = hugging_face_name(&info.name).ok_or_else(|| ModelError::UnexpectedTensor {
            name: info.name.clone(),
            found: info.shape.clone(),
            family: config.family.model_type(),
        })?;
        parameters::check_shape(config, &name, &info.shape)?;
        named.insert(name, info);
    }
    parameters::check_complete(config, |name| named.contains_key(name))?;
    Ok(named)
}

fn hugging_face_name(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some(EMBEDDING.to_owned()),
        "output_norm.weight" => return Some(FINAL_NORM.to_owned()),
        "output.weight" => return Some(LM_HEAD.to_owned()),
        _ => {}
    }
    let (index, name) = name.strip_prefix("blk.")?.split_once('.')?;
    let (_, ours) = LAYER_NAMES.iter().find(|(theirs, _)| *theirs == name)?;
    Some(format!("model.layers.{index}.{ours}"))
}

/// From a tensor's bytes, in fp32.
pub(crate) fn read_tensor(config: &Config, name: &str, info: &TensorInfo, data: &[u8]) -> Result<Tensor, ModelError> {
    let values = quantization::dequantize(&info.name, info.kind, data)?;
    let bytes = bytemuck::cast_slice(&values);
    restore_row_order(config, name, Tensor::f_from_data_size(bytes, &info.shape, Kind::Float)?)
}

/// The tensor as it lies in the file, if it is quantised.
fn read_packed(config: &Config, name: &str, info: &TensorInfo, data: &[u8]) -> Option<Packed> {
    let (rotated, half) = (rotated_heads(config, name).is_some(), config.head_dim / 2);
    let from_row = |row: usize| {
        let (head, within) = (row / config.head_dim, row % config.head_dim);
        if rotated { head * config.head_dim + within % half * 2 + within / half } else { row }
    };
    Packed::new(info.kind, &info.shape, data, from_row)
}

/// GGUF pairs neighbouring rows of a head's queries and keys for rotation; we pair row `i` with row
/// `i + head_dim / 2`, as Hugging Face does.
fn restore_row_order(config: &Config, name: &str, tensor: Tensor) -> Result<Tensor, ModelError> {
    let Some(heads) = rotated_heads(config, name) else {
        return Ok(tensor);
    };
    let shape = tensor.size();
    let pairs = [heads as i64, (config.head_dim / 2) as i64, 2, config.hidden as i64];
    Ok(tensor.f_view(pairs)?.f_transpose(1, 2)?.f_reshape(shape)?)
}

/// Heads of a projection whose rows the format pairs its own way: LLaMA's, not Qwen2's.
fn rotated_heads(config: &Config, name: &str) -> Option<usize> {
    if config.family == Family::Qwen2 {
        return None;
    }
    match name.rsplit_once("self_attn.").map(|(_, name)| name) {
        Some("q_proj.weight") => Some(config.heads),
        Some("k_proj.weight") => Some(config.kv_heads),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
