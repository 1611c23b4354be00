//! The shape of a LLaMA model, read from Hugging Face's `config.json` or GGUF metadata.

use crate::ModelError;
use crate::gguf::Gguf;
use serde_json::{Value, json};

/// Sizes and constants of one model of the LLaMA family.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    /// Key and value heads; fewer than `heads` is grouped-query attention.
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub rope_theta: f64,
    /// Added to the mean square in RMS normalisation.
    pub eps: f64,
    /// Longest sequence that the model was made for, in tokens.
    pub max_position: usize,
    /// The output projection is the embedding; `lm_head.weight` does not exist.
    pub tie_word_embeddings: bool,
    pub bos: Option<u32>,
    /// Any of these ends a completion.
    pub eos: Vec<u32>,
    pub pad: Option<u32>,
}

impl Config {
    /// Reads Hugging Face's `config.json`.
    pub fn from_hugging_face(json: &Value) -> Result<Self, ModelError> {
        refuse_other_families(json)?;
        let heads = size(json, "num_attention_heads")?;
        let hidden = size(json, "hidden_size")?;
        Self {
            hidden,
            intermediate: size(json, "intermediate_size")?,
            layers: size(json, "num_hidden_layers")?,
            heads,
            kv_heads: size_or(json, "num_key_value_heads", heads)?,
            head_dim: size_or(json, "head_dim", hidden.checked_div(heads).unwrap_or(0))?,
            vocab: size(json, "vocab_size")?,
            rope_theta: rope_theta(json),
            eps: json["rms_norm_eps"].as_f64().unwrap_or(1e-6),
            max_position: size_or(json, "max_position_embeddings", 2048)?,
            tie_word_embeddings: json["tie_word_embeddings"].as_bool().unwrap_or(false),
            bos: token_ids(&json["bos_token_id"]).first().copied(),
            eos: token_ids(&json["eos_token_id"]),
            pad: token_ids(&json["pad_token_id"]).first().copied(),
        }
        .checked()
    }

    /// Reads the metadata of a GGUF file of architecture `llama`.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        match gguf.text("general.architecture") {
            Some("llama") => {}
            other => {
                return Err(ModelError::Config(format!(
                    "the GGUF file's architecture is {other:?}; only llama is supported"
                )));
            }
        }
        if let Some(kind) = gguf.text("llama.rope.scaling.type").filter(|kind| *kind != "none") {
            return Err(unsupported_rope(kind));
        }
        let heads = gguf.size("llama.attention.head_count")?;
        let hidden = gguf.size("llama.embedding_length")?;
        let head_dim = hidden.checked_div(heads).unwrap_or(0);
        Self {
            hidden,
            intermediate: gguf.size("llama.feed_forward_length")?,
            layers: gguf.size("llama.block_count")?,
            heads,
            kv_heads: gguf.size("llama.attention.head_count_kv").unwrap_or(heads),
            head_dim: gguf.size("llama.attention.key_length").unwrap_or(head_dim),
            vocab: gguf.array_length("tokenizer.ggml.tokens").unwrap_or(0),
            rope_theta: gguf.float("llama.rope.freq_base").unwrap_or(10_000.0),
            eps: rounded_from_f32(gguf.float("llama.attention.layer_norm_rms_epsilon").unwrap_or(1e-6)),
            max_position: gguf.size("llama.context_length")?,
            tie_word_embeddings: !gguf.has_tensor("output.weight"),
            bos: gguf.token_id("tokenizer.ggml.bos_token_id"),
            eos: gguf.token_id("tokenizer.ggml.eos_token_id").into_iter().collect(),
            pad: gguf.token_id("tokenizer.ggml.padding_token_id"),
        }
        .checked()
    }

    /// Writes Hugging Face's `config.json` for fp32 weights.
    pub fn to_hugging_face(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": false,
            "mlp_bias": false,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "rope_theta": self.rope_theta,
            "rope_scaling": null,
            "rms_norm_eps": self.eps,
            "max_position_embeddings": self.max_position,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos,
            "eos_token_id": self.eos_json(),
            "pad_token_id": self.pad,
        })
    }

    /// One id is written as a number, several as a list, as Hugging Face does.
    pub(crate) fn eos_json(&self) -> Value {
        match self.eos.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            several => json!(several),
        }
    }

    /// Numbers of all parameters, tied ones counted once.
    pub fn parameter_count(&self) -> usize {
        crate::parameter_names(self)
            .iter()
            .filter_map(|name| crate::parameter_shape(self, name))
            .map(|shape| shape.iter().product::<i64>() as usize)
            .sum()
    }

    /// Refuses what no LLaMA has, so that later arithmetic on these sizes cannot overflow.
    fn checked(self) -> Result<Self, ModelError> {
        let within = [
            ("hidden size", self.hidden, 1 << 17),
            ("intermediate size", self.intermediate, 1 << 19),
            ("number of layers", self.layers, 1 << 10),
            ("number of heads", self.heads, 1 << 12),
            ("number of key-value heads", self.kv_heads, 1 << 12),
            ("head size", self.head_dim, 1 << 12),
            ("vocabulary size", self.vocab, 1 << 22),
            ("maximum length", self.max_position, 1 << 24),
        ];
        for (what, value, limit) in within {
            if value == 0 || value > limit {
                return Err(ModelError::Config(format!("the {what} is {value}; it must be from 1 to {limit}")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(ModelError::Config(format!(
                "{} heads cannot share {} key-value heads evenly",
                self.heads, self.kv_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ModelError::Config(format!(
                "the head size {} is odd, so that rotary embeddings do not apply",
                self.head_dim
            )));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0 && self.eps.is_finite() && self.eps >= 0.0) {
            return Err(ModelError::Config(format!(
                "rope theta {} and epsilon {} must be positive numbers",
                self.rope_theta, self.eps
            )));
        }
        Ok(self)
    }
}

fn refuse_other_families(json: &Value) -> Result<(), ModelError> {
    let refuse = |message: String| Err(ModelError::Config(message));
    match json["model_type"].as_str() {
        Some("llama") => {}
        other => return refuse(format!("model_type is {other:?}; only llama is supported")),
    }
    if let Some(activation) = json["hidden_act"].as_str().filter(|name| *name != "silu") {
        return refuse(format!("hidden_act is {activation:?}; only silu is supported"));
    }
    for bias in ["attention_bias", "mlp_bias"] {
        if json[bias].as_bool() == Some(true) {
            return refuse(format!("{bias} is true; models with biases are not supported"));
        }
    }
    for scaling in [&json["rope_scaling"], &json["rope_parameters"]] {
        let kind = scaling["rope_type"].as_str().or(scaling["type"].as_str());
        if let Some(kind) = kind.filter(|kind| *kind != "default") {
            return Err(unsupported_rope(kind));
        }
    }
    Ok(())
}

fn unsupported_rope(kind: &str) -> ModelError {
    ModelError::Config(format!("rope scaling {kind:?} is not supported; only unscaled rotary embeddings are"))
}

/// At the top level up to transformers 4, in `rope_parameters` since 5.
fn rope_theta(json: &Value) -> f64 {
    json["rope_parameters"]["rope_theta"].as_f64().or(json["rope_theta"].as_f64()).unwrap_or(10_000.0)
}

fn size(json: &Value, key: &str) -> Result<usize, ModelError> {
    json[key]
        .as_u64()
        .and_then(|value| usize::try_from(value).ok())
        .ok_or_else(|| ModelError::Config(format!("{key} is {}; a number is needed", json[key])))
}

fn size_or(json: &Value, key: &str, default: usize) -> Result<usize, ModelError> {
    if json[key].is_null() { Ok(default) } else { size(json, key) }
}

/// A number, a list of numbers, or null.
pub(crate) fn token_ids(value: &Value) -> Vec<u32> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(several) => several.iter().filter_map(one).collect(),
        single => one(single).into_iter().collect(),
    }
}

/// GGUF stores 1e-5 as fp32; the nearest short decimal is what the model was trained with.
fn rounded_from_f32(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> Value {
        crate::tiny::config().to_hugging_face()
    }

    #[test]
    fn a_configuration_survives_its_own_json() {
        let config = crate::tiny::config();
        assert_eq!(Config::from_hugging_face(&valid()).unwrap(), config);
    }

    #[test]
    fn several_end_tokens_are_kept() {
        let mut json = valid();
        json["eos_token_id"] = json!([2, 0]);
        assert_eq!(Config::from_hugging_face(&json).unwrap().eos, [2, 0]);
    }

    #[test]
    fn rope_parameters_of_transformers_5_are_read() {
        let mut json = valid();
        json["rope_theta"] = Value::Null;
        json["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 77.0});
        assert_eq!(Config::from_hugging_face(&json).unwrap().rope_theta, 77.0);
    }

    #[test]
    fn impossible_configurations_are_refused_with_the_reason() {
        let cases = [
            ("model_type", json!("gpt2"), "only llama"),
            ("hidden_size", json!(0), "hidden size is 0"),
            ("hidden_size", json!("64"), "a number is needed"),
            ("num_key_value_heads", json!(3), "evenly"),
            ("head_dim", json!(15), "odd"),
            ("num_hidden_layers", json!(1u64 << 60), "number of layers"),
            ("rope_scaling", json!({"rope_type": "llama3"}), "rope scaling"),
            ("attention_bias", json!(true), "biases"),
            ("rope_theta", json!(-1.0), "positive"),
        ];
        for (key, value, expected) in cases {
            let mut json = valid();
            json[key] = value;
            let message = Config::from_hugging_face(&json).unwrap_err().to_string();
            assert!(message.contains(expected), "{key}: {message}");
        }
    }
}
