//! The forward pass over one sequence as training runs it: what inference is compared with.

use crate::layers::{LayerWeights, Rope, embed, head_logits, layer_forward};
use crate::parameters::{EMBEDDING, FINAL_NORM, check, head_name};
use crate::{Config, ModelError};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// Logits `[T, V]` of what follows each of `ids`, from fp32 weights on the CPU.
pub fn logits(config: &Config, tensors: &BTreeMap<String, Tensor>, ids: &[u32]) -> Result<Tensor, ModelError> {
    check(config, tensors)?;
    let rope = Rope::new(config, ids.len(), Device::Cpu, Kind::Float);
    let ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    let mut x = embed(&tensors[EMBEDDING], &Tensor::from_slice(&ids).unsqueeze(0));
    for index in 0..config.layers {
        // `check` has seen that all are there.
        if let Some(weights) = LayerWeights::from_map(tensors, index) {
            x = layer_forward(config, &weights, &x, &rope);
        }
    }
    Ok(head_logits(config, &x, &tensors[FINAL_NORM], &tensors[head_name(config)]).squeeze_dim(0))
}
