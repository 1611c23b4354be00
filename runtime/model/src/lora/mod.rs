//! Low-rank adapters (Hu et al. 2021): each chosen projection `W [out, in]` of a layer, which is frozen,
//! gets `A [r, in]` and `B [out, r]`, and computes `x Wᵀ + alpha / r · dropout(x) Aᵀ Bᵀ`. Names, layout
//! on disk and first values are PEFT's.

mod adapter;
mod dropout;
mod layer;
mod merge;

pub use adapter::{Adapter, is_adapter};
pub use dropout::Dropout;
pub use layer::{AdaptedGradients, AdaptedRun, LayerAdapters, adapted_layer_forward};
pub use merge::merge;

use crate::layers::Projection;
use crate::{Config, ModelError};
use tch::Tensor;

/// What PEFT puts before a model's own names.
const PREFIX: &str = "base_model.model.";
const A: &str = "lora_A.weight";
const B: &str = "lora_B.weight";
/// PEFT's word for every projection.
pub const ALL_LINEAR: &str = "all-linear";

/// Which projections are adapted, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    pub rank: usize,
    pub alpha: f64,
    /// Share of an adapter's inputs that is dropped in training.
    pub dropout: f64,
    /// In canonical order, without repetition.
    pub targets: Vec<Projection>,
}

impl Lora {
    /// `targets` are the last parts of Hugging Face's module names, such as `q_proj`, or [`ALL_LINEAR`].
    pub fn new(rank: usize, alpha: f64, dropout: f64, targets: &[impl AsRef<str>]) -> Result<Self, ModelError> {
        let refuse = |message: String| Err(ModelError::Lora(message));
        if rank == 0 || rank > 4096 {
            return refuse(format!("the rank is {rank}; it must be from 1 to 4096"));
        }
        if !(alpha.is_finite() && alpha > 0.0) {
            return refuse(format!("alpha is {alpha}; it must be above 0"));
        }
        if !(0.0..1.0).contains(&dropout) {
            return refuse(format!("dropout is {dropout}; it must be from 0 to below 1"));
        }
        Ok(Self { rank, alpha, dropout, targets: projections(targets)? })
    }

    /// The factor on what an adapter adds.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// PEFT's names and shapes of one layer's adapters, in canonical order: A and B of each target.
    pub fn layer_parameters(&self, config: &Config, layer: usize) -> Vec<(String, Vec<i64>)> {
        let rank = self.rank as i64;
        let pair = |target: &Projection| {
            let (outputs, inputs) = target.size(config);
            let module = module(layer, *target);
            [(format!("{module}.{A}"), vec![rank, inputs]), (format!("{module}.{B}"), vec![outputs, rank])]
        };
        self.targets.iter().flat_map(pair).collect()
    }

    /// First values of a parameter of [`Lora::layer_parameters`], fp32 on the CPU: A is uniform up to
    /// `1 / √in` (Kaiming with √5, as PEFT has it) and depends on seed and name alone; B is zero.
    pub fn initial(seed: u64, name: &str, shape: &[i64]) -> Tensor {
        let options = (tch::Kind::Float, tch::Device::Cpu);
        if name.ends_with(B) {
            return Tensor::zeros(shape, options);
        }
        let key = dropout::key(seed, &[name_key(name)]);
        let inputs = shape.last().copied().unwrap_or(1).max(1) as f64;
        let count = shape.iter().product::<i64>() as u64;
        let unit = |index: u64| (dropout::mix(key, index) >> 11) as f64 / (1u64 << 53) as f64;
        let values: Vec<f32> = (0..count).map(|index| ((2.0 * unit(index) - 1.0) / inputs.sqrt()) as f32).collect();
        Tensor::from_slice(&values).view(shape)
    }
}

/// FNV-1a: a number for a name, the same everywhere.
fn name_key(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// PEFT's name of a layer's adapted module.
fn module(layer: usize, target: Projection) -> String {
    let name = target.weight_name(layer);
    format!("{PREFIX}{}", name.trim_end_matches(".weight"))
}

fn projections(targets: &[impl AsRef<str>]) -> Result<Vec<Projection>, ModelError> {
    if targets.iter().any(|target| target.as_ref() == ALL_LINEAR) {
        return Ok(Projection::ALL.to_vec());
    }
    let mut found = Vec::with_capacity(targets.len());
    for target in targets {
        let target = target.as_ref();
        let known = Projection::ALL.into_iter().find(|projection| projection.name() == target);
        let Some(projection) = known else {
            let names = Projection::ALL.map(Projection::name).join(", ");
            return Err(ModelError::Lora(format!("target {target:?} is not one of {names} or {ALL_LINEAR}")));
        };
        found.push(projection);
    }
    found.sort_unstable();
    found.dedup();
    if found.is_empty() {
        return Err(ModelError::Lora("no target is named; q_proj and v_proj are usual".to_owned()));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_have_the_names_and_shapes_of_peft() {
        let lora = Lora::new(8, 16.0, 0.05, &["v_proj", "q_proj", "q_proj"]).unwrap();
        let parameters = lora.layer_parameters(&crate::tiny::config(), 1);
        let expected = [
            ("base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight", [8, 64]),
            ("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight", [64, 8]),
            ("base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight", [8, 64]),
            ("base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight", [32, 8]),
        ];
        assert_eq!(parameters, expected.map(|(name, shape)| (name.to_owned(), shape.to_vec())));
        assert_eq!(Lora::new(8, 16.0, 0.0, &[ALL_LINEAR]).unwrap().targets.len(), 7);
    }

    #[test]
    fn impossible_settings_are_refused_with_the_reason() {
        let cases = [
            (Lora::new(0, 16.0, 0.0, &["q_proj"]), "rank is 0"),
            (Lora::new(8, 0.0, 0.0, &["q_proj"]), "alpha is 0"),
            (Lora::new(8, 16.0, 1.0, &["q_proj"]), "dropout is 1"),
            (Lora::new(8, 16.0, 0.0, &["query"]), "\"query\" is not one of q_proj"),
            (Lora::new(8, 16.0, 0.0, &[] as &[&str]), "no target"),
        ];
        for (result, expected) in cases {
            let message = result.unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn the_first_values_depend_on_seed_and_name_and_fill_their_range() {
        let name = "x.lora_A.weight";
        let first = Lora::initial(1, name, &[8, 64]);
        assert_eq!(first, Lora::initial(1, name, &[8, 64]));
        assert_ne!(first, Lora::initial(2, name, &[8, 64]));
        assert_ne!(first, Lora::initial(1, "y.lora_A.weight", &[8, 64]));
        let bound = first.abs().max().double_value(&[]);
        assert!((0.12..=0.125).contains(&bound), "{bound}");
        assert!(first.mean(tch::Kind::Float).double_value(&[]).abs() < 0.01);
        assert_eq!(Lora::initial(1, "x.lora_B.weight", &[4, 8]).abs().max().double_value(&[]), 0.0);
    }
}
