//! The shape of a model of LLaMA's kind, read from Hugging Face's `config.json` or GGUF metadata.

use crate::gguf::Gguf;
use crate::rope::{RopeScaling, Stretch};
use crate::{ModelError, layers};
use serde_json::{Value, json};

/// Relatives that differ in little.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// LLaMA 1, 2 and 3 (Touvron et al. 2023; Grattafiori et al. 2024), Vicuna among them.
    Llama,
    /// Attention to the nearest tokens only (Jiang et al. 2023).
    Mistral,
    /// Biases on queries, keys and values (Yang et al. 2024); Qwen 2 and 2.5.
    Qwen2,
}

/// Sizes and constants of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub family: Family,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    /// Key and value heads; fewer than `heads` is grouped-query attention.
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    /// Tokens that one attends to, itself among them; `None`: all before it.
    pub sliding_window: Option<usize>,
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

const MAX_HEAD_DIM: usize = 1 << 12;

impl Config {
    /// Reads Hugging Face's `config.json`.
    pub fn from_hugging_face(json: &Value) -> Result<Self, ModelError> {
        let family = family_of(json)?;
        refuse_unsupported(json)?;
        let defaults = family.defaults();
        let heads = size(json, "num_attention_heads")?;
        let hidden = size(json, "hidden_size")?;
        let max_position = size_or(json, "max_position_embeddings", defaults.max_position)?;
        let rope_scaling = RopeScaling::from_hugging_face(json, max_position)?;
        Self {
            family,
            hidden,
            intermediate: size(json, "intermediate_size")?,
            layers: size(json, "num_hidden_layers")?,
            heads,
            kv_heads: kv_heads(json, heads, defaults.kv_heads)?,
            head_dim: size_or(json, "head_dim", hidden.checked_div(heads).unwrap_or(0))?,
            vocab: size(json, "vocab_size")?,
            rope_theta: rope_theta(json),
            rope_scaling,
            sliding_window: sliding_window(json, family)?,
            eps: json["rms_norm_eps"].as_f64().unwrap_or(1e-6),
            max_position: size_or(json, "max_sequence_length", rope_scaling.stretched(max_position))?,
            tie_word_embeddings: json["tie_word_embeddings"].as_bool().unwrap_or(false),
            bos: token_ids(&json["bos_token_id"]).first().copied(),
            eos: token_ids(&json["eos_token_id"]),
            pad: token_ids(&json["pad_token_id"]).first().copied(),
        }
        .checked()
    }

    /// Reads the metadata of a GGUF file of architecture `llama` (Mistral models among them) or `qwen2`.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        let architecture = gguf.text("general.architecture").unwrap_or_default();
        let key = |name: &str| format!("{architecture}.{name}");
        let sliding_window = gguf.size(&key("attention.sliding_window")).ok().filter(|window| *window > 0);
        let family = match (architecture, sliding_window) {
            ("llama", None) => Family::Llama,
            ("llama", Some(_)) => Family::Mistral,
            ("qwen2", None) => Family::Qwen2,
            ("qwen2", Some(_)) => return Err(refusal("attention.sliding_window of qwen2 is not supported")),
            (other, _) => {
                return Err(refusal(format!(
                    "the GGUF file's architecture is {other:?}; llama and qwen2 are supported"
                )));
            }
        };
        let heads = gguf.size(&key("attention.head_count"))?;
        let hidden = gguf.size(&key("embedding_length"))?;
        let head_dim = gguf.size(&key("attention.key_length")).unwrap_or(hidden.checked_div(heads).unwrap_or(0));
        let rotated = gguf.size(&key("rope.dimension_count")).unwrap_or(head_dim);
        if rotated != head_dim {
            let message = format!("rope.dimension_count is {rotated} of {head_dim}; rotating a part is not supported");
            return Err(refusal(message));
        }
        if gguf.size(&key("expert_count")).is_ok_and(|experts| experts > 0) {
            return Err(refusal("expert_count is not 0; mixtures of experts are not supported"));
        }
        let rope_theta = gguf.float(&key("rope.freq_base")).unwrap_or(10_000.0);
        let frequencies = layers::frequencies(rope_theta, head_dim.min(MAX_HEAD_DIM))?;
        let rope_scaling = RopeScaling::from_gguf(gguf, architecture, &frequencies)?;
        Self {
            family,
            hidden,
            intermediate: gguf.size(&key("feed_forward_length"))?,
            layers: gguf.size(&key("block_count"))?,
            heads,
            kv_heads: gguf.size(&key("attention.head_count_kv")).unwrap_or(heads),
            head_dim,
            vocab: gguf.array_length("tokenizer.ggml.tokens").unwrap_or(0),
            rope_theta,
            rope_scaling,
            sliding_window,
            eps: rounded_from_f32(gguf.float(&key("attention.layer_norm_rms_epsilon")).unwrap_or(1e-6)),
            max_position: rope_scaling.stretched(gguf.size(&key("context_length"))?),
            tie_word_embeddings: !gguf.has_tensor("output.weight"),
            bos: gguf.token_id("tokenizer.ggml.bos_token_id"),
            eos: ["eos", "eot"]
                .into_iter()
                .filter_map(|name| gguf.token_id(&format!("tokenizer.ggml.{name}_token_id")))
                .collect(),
            pad: gguf.token_id("tokenizer.ggml.padding_token_id"),
        }
        .checked()
    }

    /// The same model for sequences `factor` times as long; its rotary embeddings must not be scaled already.
    pub fn stretched(self, how: Stretch, factor: f64) -> Result<Self, ModelError> {
        if self.rope_scaling != RopeScaling::Unscaled {
            return Err(refusal("the model's rotary embeddings are scaled already; leave them as they are"));
        }
        let rope_scaling = RopeScaling::stretching(how, factor, self.max_position)?;
        let max_position = (self.max_position as f64 * factor) as usize;
        Self { rope_scaling, max_position, ..self }.checked()
    }

    /// Writes Hugging Face's `config.json`, all but the weights' type.
    pub fn to_hugging_face(&self) -> Value {
        let mut json = json!({
            "architectures": [self.family.architecture()],
            "model_type": self.family.model_type(),
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling.to_hugging_face(),
            "rms_norm_eps": self.eps,
            "max_position_embeddings": self.rope_scaling.unstretched(self.max_position),
            "max_sequence_length": self.max_position,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos,
            "eos_token_id": self.eos_json(),
            "pad_token_id": self.pad,
        });
        match self.family {
            Family::Llama => {
                json["attention_bias"] = json!(false);
                json["mlp_bias"] = json!(false);
            }
            Family::Mistral => json["sliding_window"] = json!(self.sliding_window),
            Family::Qwen2 => json["use_sliding_window"] = json!(false),
        }
        json
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

    /// Refuses what no such model has, so that later arithmetic on these sizes cannot overflow.
    fn checked(self) -> Result<Self, ModelError> {
        let within = [
            ("hidden size", self.hidden, 1 << 17),
            ("intermediate size", self.intermediate, 1 << 19),
            ("number of layers", self.layers, 1 << 10),
            ("number of heads", self.heads, 1 << 12),
            ("number of key-value heads", self.kv_heads, 1 << 12),
            ("head size", self.head_dim, MAX_HEAD_DIM),
            ("vocabulary size", self.vocab, 1 << 22),
            ("maximum length", self.max_position, 1 << 24),
            ("sliding window", self.sliding_window.unwrap_or(1), 1 << 24),
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

impl Family {
    pub const ALL: [Self; 3] = [Self::Llama, Self::Mistral, Self::Qwen2];

    /// As `config.json` names it.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
        }
    }

    fn architecture(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
        }
    }

    /// Query, key and value projections add a bias.
    pub fn has_biases(self) -> bool {
        self == Self::Qwen2
    }

    /// What `config.json` means where it says nothing.
    fn defaults(self) -> Defaults {
        match self {
            Self::Llama => Defaults { max_position: 2048, kv_heads: None },
            Self::Mistral => Defaults { max_position: 131_072, kv_heads: Some(8) },
            Self::Qwen2 => Defaults { max_position: 32_768, kv_heads: Some(32) },
        }
    }
}

struct Defaults {
    max_position: usize,
    /// `None`: as many as heads.
    kv_heads: Option<usize>,
}

fn family_of(json: &Value) -> Result<Family, ModelError> {
    let found = json["model_type"].as_str();
    let family = Family::ALL.into_iter().find(|family| found == Some(family.model_type()));
    family.ok_or_else(|| refusal(format!("model_type is {found:?}; llama, mistral and qwen2 are supported")))
}

/// Names each field that would change what the model computes in a way that is not ours.
fn refuse_unsupported(json: &Value) -> Result<(), ModelError> {
    if let Some(activation) = json["hidden_act"].as_str().filter(|name| *name != "silu") {
        return Err(refusal(format!("hidden_act is {activation:?}; only silu is supported")));
    }
    for switch in ["attention_bias", "mlp_bias", "use_sliding_window", "qk_norm", "use_qk_norm"] {
        if json[switch].as_bool() == Some(true) {
            let hint = if switch.ends_with("bias") { "; only Qwen2's biases are supported" } else { "" };
            return Err(refusal(format!("{switch} is true, which is not supported{hint}")));
        }
    }
    for field in ["num_local_experts", "num_experts", "n_routed_experts", "quantization_config"] {
        if !json[field].is_null() {
            return Err(refusal(format!(
                "{field} is set: mixtures of experts and quantised safetensors are not supported"
            )));
        }
    }
    for place in [json, &json["rope_scaling"], &json["rope_parameters"]] {
        if place["partial_rotary_factor"].as_f64().is_some_and(|part| part != 1.0) {
            return Err(refusal("partial_rotary_factor is not 1; rotating a part of a head is not supported"));
        }
    }
    if json["attention_dropout"].as_f64().is_some_and(|share| share > 0.0) {
        return Err(refusal("attention_dropout is not 0; training without it would not be what the model asks for"));
    }
    let layers = json["layer_types"].as_array().into_iter().flatten();
    match layers.filter_map(Value::as_str).find(|kind| *kind != "full_attention") {
        Some(kind) => {
            Err(refusal(format!("layer_types has {kind:?}; layers of different attention are not supported")))
        }
        None => Ok(()),
    }
}

/// Absent means 4096 in transformers, and null none.
fn sliding_window(json: &Value, family: Family) -> Result<Option<usize>, ModelError> {
    match (family, json.get("sliding_window")) {
        (Family::Mistral, None) => Ok(Some(4096)),
        (Family::Mistral, Some(window)) if !window.is_null() => size(json, "sliding_window").map(Some),
        _ => Ok(None),
    }
}

/// Null means as many as heads; absent, the family's number.
fn kv_heads(json: &Value, heads: usize, default: Option<usize>) -> Result<usize, ModelError> {
    match json.get("num_key_value_heads") {
        None => Ok(default.unwrap_or(heads)),
        Some(_) => size_or(json, "num_key_value_heads", heads),
    }
}

fn refusal(message: impl Into<String>) -> ModelError {
    ModelError::Config(message.into())
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
    fn a_stretched_model_says_so_in_its_config_json() {
        let base = crate::tiny::config();
        for how in [Stretch::Linear, Stretch::Llama3, Stretch::Yarn] {
            let stretched = base.clone().stretched(how, 4.0).unwrap();
            assert_eq!(stretched.max_position, 4 * base.max_position);
            assert_eq!(Config::from_hugging_face(&stretched.to_hugging_face()).unwrap(), stretched, "{how:?}");
            let twice = stretched.stretched(how, 2.0).unwrap_err().to_string();
            assert!(twice.contains("scaled already"), "{twice}");
        }
        for factor in [1.0, 0.5, f64::NAN] {
            assert!(base.clone().stretched(Stretch::Linear, factor).is_err(), "{factor}");
        }
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
            ("model_type", json!("gpt2"), "llama, mistral and qwen2"),
            ("hidden_size", json!(0), "hidden size is 0"),
            ("hidden_size", json!("64"), "a number is needed"),
            ("num_key_value_heads", json!(3), "evenly"),
            ("head_dim", json!(15), "odd"),
            ("num_hidden_layers", json!(1u64 << 60), "number of layers"),
            ("rope_scaling", json!({"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
            ("rope_scaling", json!({"rope_type": "llama3"}), "rope scaling's factor"),
            ("attention_bias", json!(true), "biases"),
            ("rope_theta", json!(-1.0), "positive"),
            ("use_sliding_window", json!(true), "use_sliding_window"),
            ("num_local_experts", json!(8), "num_local_experts"),
            ("partial_rotary_factor", json!(0.5), "partial_rotary_factor"),
            ("layer_types", json!(["full_attention", "sliding_attention"]), "layer_types"),
        ];
        for (key, value, expected) in cases {
            let mut json = valid();
            json[key] = value;
            let message = Config::from_hugging_face(&json).unwrap_err().to_string();
            assert!(message.contains(expected), "{key}: {message}");
        }
    }

    #[test]
    fn no_value_of_any_field_causes_a_panic() {
        let mut whole = valid();
        for (key, value) in [
            ("sliding_window", json!(5)),
            ("max_sequence_length", json!(512)),
            ("original_max_position_embeddings", json!(64)),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "truncate": null})),
            (
                "rope_parameters",
                json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}),
            ),
        ] {
            whole[key] = value;
        }
        let odd = [
            json!(null),
            json!(true),
            json!(-1),
            json!(0),
            json!(3),
            json!(u64::MAX),
            json!(1e308),
            json!(1e-320),
            json!("yarn"),
            json!([]),
            json!([[u64::MAX, "x"], {}]),
            json!({"rope_type": "linear", "factor": 1e300}),
            json!({"type": "llama3", "factor": 0, "low_freq_factor": -1, "high_freq_factor": "x"}),
            json!({"rope_type": "yarn", "factor": null, "original_max_position_embeddings": 0}),
            json!({"full_attention": {"rope_type": "default"}}),
        ];
        let keys: Vec<String> = whole.as_object().unwrap().keys().cloned().collect();
        let (mut accepted, mut refused) = (0, 0);
        for family in Family::ALL {
            for key in &keys {
                for value in &odd {
                    let mut json = whole.clone();
                    json["model_type"] = json!(family.model_type());
                    json[key] = value.clone();
                    match Config::from_hugging_face(&json) {
                        Ok(config) => {
                            accepted += 1;
                            assert!(config.max_position <= 1 << 24 && config.parameter_count() > 0);
                        }
                        Err(_) => refused += 1,
                    }
                }
            }
        }
        assert!(accepted > 100 && refused > 100, "{accepted} accepted, {refused} refused");
    }
}
