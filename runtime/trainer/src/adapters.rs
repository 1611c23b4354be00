//! Training adapters instead of the model: the base is the same, frozen, on every rank; blocks, twins,
//! checkpoints and the result are the adapters' alone.

use tch::{Device, Kind};
use vicuna_model::frozen::{Frozen, Quantization};
use vicuna_model::lora::{Dropout, Lora};
use vicuna_model::{ModelError, OnDisk, WeightsHasher};
use vicuna_protocol::job::{self, Base, Method, Recipe};

/// The frozen base, and what is trained of it.
#[derive(Debug)]
pub struct AdaptedBase {
    pub frozen: Frozen,
    pub lora: Lora,
    /// [`vicuna_model::weights_digest`] of the base as it was read.
    pub base_digest: String,
    seed: u64,
}

impl AdaptedBase {
    /// Reads the base model's weights, each once.
    pub fn new(recipe: &Recipe, lora: Lora, model: &OnDisk, kind: Kind, device: Device) -> Result<Self, ModelError> {
        let quantization = quantization(&recipe.method);
        let mut hasher = WeightsHasher::default();
        let read = |name: &str| {
            let tensor = model.tensor(name)?;
            hasher.add(name, &tensor)?;
            Ok(tensor)
        };
        let frozen = Frozen::new(&model.config, read, quantization, device, kind)?;
        tracing::info!(bytes = frozen.bytes(), "the base model is frozen");
        Ok(Self { frozen, lora, base_digest: hasher.finish(), seed: recipe.seed })
    }

    /// The same memory for another rank's thread.
    pub fn share(&self) -> Self {
        let (lora, base_digest) = (self.lora.clone(), self.base_digest.clone());
        Self { frozen: self.frozen.share(), lora, base_digest, seed: self.seed }
    }

    /// What is dropped of the adapters' inputs; it does not depend on who computes the micro-batch.
    pub fn dropout(&self, step: u64, micro_batch: u32, layer: usize) -> Dropout {
        Dropout {
            probability: self.lora.dropout,
            seed: self.seed,
            step,
            micro_batch: u64::from(micro_batch),
            layer: layer as u64,
        }
    }
}

/// The adapters that a method trains; `None` if it trains the model itself.
pub fn lora(method: &Method) -> Result<Option<Lora>, ModelError> {
    let lora = |lora: &job::Lora| Lora::new(lora.rank as usize, lora.alpha, lora.dropout, &lora.targets);
    method.lora().map(lora).transpose()
}

fn quantization(method: &Method) -> Option<Quantization> {
    match method {
        Method::Full | Method::LoRA(_) => None,
        Method::QLoRA(_, Base::Nf4) => Some(Quantization::Nf4),
        Method::QLoRA(_, Base::Int8) => Some(Quantization::Int8),
    }
}
