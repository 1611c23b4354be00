//! Names and shapes of a model's parameters, as Hugging Face writes them.

use crate::{Config, ModelError};
use std::collections::BTreeMap;
use tch::Tensor;

pub const EMBEDDING: &str = "model.embed_tokens.weight";
pub const FINAL_NORM: &str = "model.norm.weight";
pub const LM_HEAD: &str = "lm_head.weight";

/// Names within a layer, in canonical order.
const LAYER: [&str; 9] = [
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
];

/// Biases of a layer, after the others.
const LAYER_BIASES: [&str; 3] = ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"];

/// All parameters in canonical order: embedding, layer 0 and following, final norm and, unless it
/// is tied to the embedding, the output projection.
pub fn parameter_names(config: &Config) -> Vec<String> {
    let mut names = vec![EMBEDDING.to_owned()];
    names.extend((0..config.layers).flat_map(|index| layer_parameter_names(config, index)));
    names.push(FINAL_NORM.to_owned());
    if !config.tie_word_embeddings {
        names.push(LM_HEAD.to_owned());
    }
    names
}

/// The parameters of layer `index` in canonical order, that of `LayerWeights::as_vec`: nine, and three
/// biases where the family has them.
pub fn layer_parameter_names(config: &Config, index: usize) -> Vec<String> {
    let mut names = layer_weight_names(index);
    if config.family.has_biases() {
        names.extend(layer_bias_names(index));
    }
    names
}

pub(crate) fn layer_weight_names(index: usize) -> Vec<String> {
    LAYER.iter().map(|name| format!("model.layers.{index}.{name}")).collect()
}

pub(crate) fn layer_bias_names(index: usize) -> Vec<String> {
    LAYER_BIASES.iter().map(|name| format!("model.layers.{index}.{name}")).collect()
}

/// Name of the tensor that turns hidden states into logits: the embedding where the two are tied.
pub fn head_name(config: &Config) -> &'static str {
    if config.tie_word_embeddings { EMBEDDING } else { LM_HEAD }
}

/// Shape of a parameter; `None` if the model has none of that name.
pub fn parameter_shape(config: &Config, name: &str) -> Option<Vec<i64>> {
    let hidden = config.hidden as i64;
    match name {
        EMBEDDING => Some(vec![config.vocab as i64, hidden]),
        FINAL_NORM => Some(vec![hidden]),
        LM_HEAD if !config.tie_word_embeddings => Some(vec![config.vocab as i64, hidden]),
        _ => layer_parameter_shape(config, name),
    }
}

fn layer_parameter_shape(config: &Config, name: &str) -> Option<Vec<i64>> {
    let (index, name) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let canonical = index.parse::<usize>().ok().filter(|number| number.to_string() == index)?;
    if canonical >= config.layers {
        return None;
    }
    let [hidden, intermediate] = [config.hidden as i64, config.intermediate as i64];
    let queries = (config.heads * config.head_dim) as i64;
    let keys = (config.kv_heads * config.head_dim) as i64;
    Some(match name {
        "input_layernorm.weight" | "post_attention_layernorm.weight" => vec![hidden],
        "self_attn.q_proj.weight" => vec![queries, hidden],
        "self_attn.k_proj.weight" | "self_attn.v_proj.weight" => vec![keys, hidden],
        "self_attn.q_proj.bias" if config.family.has_biases() => vec![queries],
        "self_attn.k_proj.bias" | "self_attn.v_proj.bias" if config.family.has_biases() => vec![keys],
        "self_attn.o_proj.weight" => vec![hidden, queries],
        "mlp.gate_proj.weight" | "mlp.up_proj.weight" => vec![intermediate, hidden],
        "mlp.down_proj.weight" => vec![hidden, intermediate],
        _ => return None,
    })
}

/// Refuses missing, unexpected and wrongly shaped tensors.
pub fn check(config: &Config, tensors: &BTreeMap<String, Tensor>) -> Result<(), ModelError> {
    for (name, tensor) in tensors {
        check_shape(config, name, &tensor.size())?;
    }
    check_complete(config, |name| tensors.contains_key(name))
}

/// Refuses what lacks a parameter.
pub(crate) fn check_complete(config: &Config, has: impl Fn(&str) -> bool) -> Result<(), ModelError> {
    match parameter_names(config).into_iter().find(|name| !has(name)) {
        Some(name) => {
            Err(ModelError::MissingTensor { expected: parameter_shape(config, &name).unwrap_or_default(), name })
        }
        None => Ok(()),
    }
}

pub(crate) fn check_shape(config: &Config, name: &str, found: &[i64]) -> Result<(), ModelError> {
    match parameter_shape(config, name) {
        Some(expected) if expected == found => Ok(()),
        Some(expected) => Err(ModelError::WrongShape { name: name.to_owned(), expected, found: found.to_vec() }),
        None => Err(ModelError::UnexpectedTensor {
            name: name.to_owned(),
            found: found.to_vec(),
            family: config.family.model_type(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_in_canonical_order_and_each_has_a_shape() {
        let mut config = crate::tiny::config();
        let tied = parameter_names(&config);
        assert_eq!(tied[0], EMBEDDING);
        assert_eq!(tied[1], "model.layers.0.input_layernorm.weight");
        assert_eq!(tied.last().unwrap(), FINAL_NORM);
        config.tie_word_embeddings = false;
        let untied = parameter_names(&config);
        assert_eq!(untied.last().unwrap(), LM_HEAD);
        assert_eq!(untied.len(), 9 * config.layers + 3);
        assert!(untied.iter().all(|name| parameter_shape(&config, name).is_some()));
    }

    #[test]
    fn names_of_other_layers_and_spellings_have_no_shape() {
        let config = crate::tiny::config();
        for name in ["model.layers.2.mlp.up_proj.weight", "model.layers.00.mlp.up_proj.weight", "lm_head.weight", "x"] {
            assert_eq!(parameter_shape(&config, name), None, "{name}");
        }
    }
}
