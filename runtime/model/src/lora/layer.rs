//! A frozen layer with its adapters, forward and backward.

use super::{Dropout, Lora};
use crate::layers::{LayerWeights, Projection, Rope, layer_forward_with, linear};
use crate::{Config, autograd};
use tch::Tensor;

/// The adapters of one layer.
#[derive(Debug)]
pub struct LayerAdapters<'a> {
    lora: &'a Lora,
    /// In the order of [`Lora::layer_parameters`].
    tensors: Vec<Tensor>,
}

impl<'a> LayerAdapters<'a> {
    /// Shares tensors in the order of [`Lora::layer_parameters`]; `None` for any other number of them.
    pub fn from_slice(lora: &'a Lora, tensors: &[Tensor]) -> Option<Self> {
        let complete = tensors.len() == 2 * lora.targets.len();
        complete.then(|| Self { lora, tensors: tensors.iter().map(Tensor::shallow_clone).collect() })
    }

    /// `y`, which the frozen projection made of `x`, with what the adapter adds.
    fn adapt(&self, target: Projection, x: &Tensor, y: Tensor, dropout: Option<&Dropout>) -> Tensor {
        let Some(index) = self.lora.targets.iter().position(|one| *one == target) else { return y };
        let [a, b] = [&self.tensors[2 * index], &self.tensors[2 * index + 1]];
        let low = match dropout.filter(|dropout| dropout.probability > 0.0) {
            Some(dropout) => linear(&(x * dropout.factors(target as u64, &x.size(), x.kind(), x.device())), a),
            None => linear(x, a),
        };
        y + linear(&low, b) * self.lora.scale()
    }

    fn leaves(&self) -> Self {
        let leaf = |tensor: &Tensor| tensor.detach().set_requires_grad(true);
        Self { lora: self.lora, tensors: self.tensors.iter().map(leaf).collect() }
    }
}

/// [`crate::layers::layer_forward`] with adapters.
pub fn adapted_layer_forward(
    config: &Config,
    weights: &LayerWeights,
    adapters: &LayerAdapters<'_>,
    x: &Tensor,
    rope: &Rope,
    dropout: Option<&Dropout>,
) -> Tensor {
    layer_forward_with(config, weights, x, rope, &|target, x, y| adapters.adapt(target, x, y, dropout))
}

/// Gradients of a layer whose weights are frozen.
#[derive(Debug)]
pub struct AdaptedGradients {
    /// With respect to the layer's input, `[B, T, H]`.
    pub input: Tensor,
    /// In the order of [`Lora::layer_parameters`].
    pub adapters: Vec<Tensor>,
}

/// An adapted layer's way forward with everything that its way back needs.
#[derive(Debug)]
pub struct AdaptedRun {
    x: Tensor,
    adapters: Vec<Tensor>,
    y: Tensor,
}

impl AdaptedRun {
    /// Runs the layer on `x [B, T, H]`; with the same `dropout` the same elements are dropped.
    pub fn new(
        config: &Config,
        weights: &LayerWeights,
        adapters: &LayerAdapters<'_>,
        x: &Tensor,
        rope: &Rope,
        dropout: Option<&Dropout>,
    ) -> Self {
        let adapters = adapters.leaves();
        let x = x.detach().set_requires_grad(true);
        let y = tch::with_grad(|| adapted_layer_forward(config, weights, &adapters, &x, rope, dropout));
        Self { x, adapters: adapters.tensors, y }
    }

    /// What [`adapted_layer_forward`] gives, `[B, T, H]`.
    pub fn output(&self) -> Tensor {
        self.y.detach()
    }

    /// Carries `upstream [B, T, H]` back.
    pub fn backward(self, upstream: &Tensor) -> AdaptedGradients {
        autograd::backward([(&self.y, &upstream.detach())]);
        AdaptedGradients { input: self.x.grad(), adapters: self.adapters.iter().map(Tensor::grad).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiny::tiny;
    use std::collections::BTreeMap;
    use tch::{Device, Kind};

    const DROPOUT: Dropout = Dropout { probability: 0.3, seed: 1, step: 2, micro_batch: 3, layer: 0 };

    /// In fp64, so that differences quotients are exact enough.
    fn layer() -> (Config, LayerWeights, Vec<Tensor>, Lora, Tensor, Rope) {
        let model = tiny(5);
        let lora = Lora::new(4, 8.0, 0.3, &["q_proj", "o_proj", "up_proj", "down_proj"]).unwrap();
        let doubles: BTreeMap<String, Tensor> =
            model.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.to_kind(Kind::Double))).collect();
        let weights = LayerWeights::from_map(&doubles, 0).unwrap();
        let value = |(name, shape): (String, Vec<i64>)| {
            Lora::initial(3, &name.replace("lora_B", "lora_A of B"), &shape).to_kind(Kind::Double)
        };
        let tensors = lora.layer_parameters(&model.config, 0).into_iter().map(value).collect();
        let x = Lora::initial(9, "input", &[2, 6, 64]).to_kind(Kind::Double) * 8.0;
        let rope = Rope::new(&model.config, 6, Device::Cpu, Kind::Double);
        (model.config, weights, tensors, lora, x, rope)
    }

    #[test]
    fn gradients_are_difference_quotients_with_the_same_elements_dropped() {
        let (config, weights, tensors, lora, x, rope) = layer();
        let upstream = x.flip([1]);
        let value = |tensors: &[Tensor], x: &Tensor| {
            let adapters = LayerAdapters::from_slice(&lora, tensors).unwrap();
            let y = adapted_layer_forward(&config, &weights, &adapters, x, &rope, Some(&DROPOUT));
            (y * &upstream).sum(Kind::Double).double_value(&[])
        };
        let adapters = LayerAdapters::from_slice(&lora, &tensors).unwrap();
        let run = AdaptedRun::new(&config, &weights, &adapters, &x, &rope, Some(&DROPOUT));
        let gradients = run.backward(&upstream);
        let near = |found: f64, tensor: &Tensor, what: &str| {
            let expected = tensor.reshape([-1]).double_value(&[5]);
            assert!((found - expected).abs() < 1e-5 * expected.abs().max(1.0), "{what}: {found} {expected}");
        };
        let moved = |tensor: &Tensor, by: f64| {
            let copy = tensor.copy();
            let _moved = copy.view([-1]).narrow(0, 5, 1).g_add_scalar_(by);
            copy
        };
        let step = 1e-5;
        for index in 0..tensors.len() {
            let at = |by: f64| {
                let mut tensors: Vec<Tensor> = tensors.iter().map(Tensor::shallow_clone).collect();
                tensors[index] = moved(&tensors[index], by);
                value(&tensors, &x)
            };
            near((at(step) - at(-step)) / (2.0 * step), &gradients.adapters[index], "adapter");
        }
        let at = |by: f64| value(&tensors, &moved(&x, by));
        near((at(step) - at(-step)) / (2.0 * step), &gradients.input, "input");
    }

    #[test]
    fn an_adapter_adds_its_product_to_the_weight() {
        let (config, mut weights, tensors, lora, x, rope) = layer();
        let adapters = LayerAdapters::from_slice(&lora, &tensors).unwrap();
        let adapted = adapted_layer_forward(&config, &weights, &adapters, &x, &rope, None);
        let product = |pair: usize| tensors[2 * pair + 1].matmul(&tensors[2 * pair]) * 2.0;
        weights.query = &weights.query + product(0);
        weights.output = &weights.output + product(1);
        weights.up = &weights.up + product(2);
        weights.down = &weights.down + product(3);
        assert!(adapted.allclose(&crate::layers::layer_forward(&config, &weights, &x, &rope), 1e-9, 1e-9, false));
    }
}
