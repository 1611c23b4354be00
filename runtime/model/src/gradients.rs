//! Backward passes, one piece of the model at a time: the piece runs again with gradients and is
//! forgotten. Nothing of the graph outlives a call, which is what makes recomputation free of hooks.

use crate::Config;
use crate::autograd::{self, rms_norm};
use crate::layers::{LayerWeights, Rope, layer_middle, layer_output, linear, loss_chunks, predicting_rows};
use tch::{Kind, Tensor};

/// Gradients of one layer.
#[derive(Debug)]
pub struct LayerGradients {
    /// With respect to the layer's input, `[B, T, H]`.
    pub input: Tensor,
    pub weights: LayerWeights,
}

/// Loss and gradients of final norm and output projection.
#[derive(Debug)]
pub struct HeadGradients {
    /// Sum over the trained tokens, fp32 scalar.
    pub loss_sum: Tensor,
    /// Number of those tokens.
    pub tokens: i64,
    /// With respect to the last layer's output, `[B, T, H]`.
    pub hidden: Tensor,
    pub norm: Tensor,
    /// With respect to the output projection; where that is tied, a summand of the embedding's.
    pub lm_head: Tensor,
}

/// A layer's way forward with everything that its way back needs. Bits are the same whether it is kept
/// from the one to the other or made again.
#[derive(Debug)]
pub struct LayerRun {
    x: Tensor,
    leaves: LayerWeights,
    middle: Tensor,
    gated: Tensor,
}

impl LayerRun {
    /// Runs the layer on `x [B, T, H]` up to its last projection.
    pub fn new(config: &Config, weights: &LayerWeights, x: &Tensor, rope: &Rope) -> Self {
        let mut leaves = weights.map(leaf);
        leaves.down = weights.down.detach();
        let x = leaf(x);
        let (middle, gated) = tch::with_grad(|| layer_middle(config, &leaves, &x, rope));
        Self { x, leaves, middle, gated }
    }

    /// What [`crate::layers::layer_forward`] gives, `[B, T, H]`.
    pub fn output(&self) -> Tensor {
        layer_output(&self.middle.detach(), &self.gated.detach(), &self.leaves.down)
    }

    /// Carries `upstream [B, T, H]` back. The last projection is not run for it: its gradients need its
    /// input only, and the layer's output nobody.
    pub fn backward(self, upstream: &Tensor) -> LayerGradients {
        let Self { x, leaves, middle, gated } = self;
        let upstream = upstream.detach();
        let gated_upstream = linear(&upstream, &leaves.down.tr());
        autograd::backward([(&middle, &upstream), (&gated, &gated_upstream)]);
        let down = linear(&flat(&upstream).tr(), &flat(&gated.detach()).tr());
        let mut gradients = leaves.map(Tensor::grad);
        gradients.down = down;
        LayerGradients { input: x.grad(), weights: gradients }
    }
}

/// Runs a layer again on its kept input `x` and carries `upstream [B, T, H]` back through it.
pub fn layer_backward(
    config: &Config,
    weights: &LayerWeights,
    x: &Tensor,
    rope: &Rope,
    upstream: &Tensor,
) -> LayerGradients {
    LayerRun::new(config, weights, x, rope).backward(upstream)
}

/// Summed loss and its gradients, in pieces of bounded memory added in a fixed order. Arguments are
/// those of [`crate::layers::cross_entropy_sum`].
pub fn head_backward(
    config: &Config,
    hidden: &Tensor,
    norm: &Tensor,
    lm_head: &Tensor,
    labels: &Tensor,
) -> HeadGradients {
    let norm = leaf(norm);
    let mut projection = None;
    let loss = loss_backward(config, hidden, &norm, lm_head, labels, |logits, normed| match &mut projection {
        None => projection = Some(linear(&logits.tr(), &normed.tr())),
        // In place: a sum of the size of the embedding is not allocated again.
        Some(sum) => *sum = sum.addmm_(&logits.tr(), normed),
    });
    HeadGradients {
        loss_sum: loss.sum,
        tokens: loss.tokens,
        hidden: loss.hidden,
        norm: gradient_or_zeros(&norm),
        lm_head: projection.unwrap_or_else(|| lm_head.detach().zeros_like()),
    }
}

/// Loss, and its gradient with respect to the last layer's output alone.
#[derive(Debug)]
pub struct Loss {
    /// Over the trained tokens, fp32 scalar.
    pub sum: Tensor,
    /// Number of those tokens.
    pub tokens: i64,
    /// With respect to the last layer's output, `[B, T, H]`.
    pub hidden: Tensor,
}

/// [`head_backward`] where norm and projection are not trained: nothing of their size is allocated.
pub fn frozen_head_backward(
    config: &Config,
    hidden: &Tensor,
    norm: &Tensor,
    lm_head: &Tensor,
    labels: &Tensor,
) -> Loss {
    loss_backward(config, hidden, &norm.detach(), lm_head, labels, |_, _| {})
}

/// Takes the gradients of a piece's logits `[N, V]` and its normed rows `[N, H]` to `project`.
fn loss_backward(
    config: &Config,
    hidden: &Tensor,
    norm: &Tensor,
    lm_head: &Tensor,
    labels: &Tensor,
    mut project: impl FnMut(&Tensor, &Tensor),
) -> Loss {
    let (rows, targets) = predicting_rows(labels);
    let flat = hidden.detach().reshape([-1, config.hidden as i64]);
    let mut upstream = flat.zeros_like();
    let mut sum = Tensor::zeros([], (Kind::Float, hidden.device()));
    for (rows, targets) in loss_chunks(&rows, &targets) {
        let piece = leaf(&flat.index_select(0, &rows));
        let normed = tch::with_grad(|| rms_norm(&piece, norm, config.eps));
        let (loss, logits) = cross_entropy_backward(&linear(&normed.detach(), lm_head), &targets);
        autograd::backward([(&normed, &linear(&logits, &lm_head.tr()))]);
        project(&logits, &normed.detach());
        upstream = upstream.index_copy_(0, &rows, &piece.grad());
        sum += loss;
    }
    Loss { sum, tokens: rows.size()[0], hidden: upstream.view_as(hidden) }
}

/// Summed cross entropy of `logits [N, V]` against `targets [N]` and its gradient, the softmax less one at the target;
/// computed in fp32, by hand, since autograd has four tensors of that size where two do.
fn cross_entropy_backward(logits: &Tensor, targets: &Tensor) -> (Tensor, Tensor) {
    let mut probabilities = logits.log_softmax(-1, Kind::Float);
    let targets = targets.unsqueeze(1);
    let chosen = probabilities.gather(1, &targets, false);
    let gradient = probabilities.exp_().scatter_(1, &targets, &(chosen.exp() - 1.0));
    (-chosen.sum(Kind::Float), gradient.to_kind(logits.kind()))
}

/// Gradient of the embedding `[V, H]` for `ids [B, T]`, given that of its output `[B, T, H]`.
pub fn embedding_backward(config: &Config, ids: &Tensor, upstream: &Tensor) -> Tensor {
    Tensor::embedding_dense_backward(upstream, ids, config.vocab as i64, -1, false)
}

/// `[B · T, width]`.
fn flat(x: &Tensor) -> Tensor {
    x.reshape([-1, x.size().last().copied().unwrap_or(1)])
}

fn leaf(tensor: &Tensor) -> Tensor {
    tensor.detach().set_requires_grad(true)
}

/// Without any trained token nothing ran, and there is no gradient to read.
fn gradient_or_zeros(tensor: &Tensor) -> Tensor {
    let gradient = tensor.grad();
    if gradient.defined() { gradient } else { tensor.detach().zeros_like() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::{IGNORED, cross_entropy_sum, embed, layer_forward};
    use crate::parameters::{EMBEDDING, FINAL_NORM};
    use crate::tiny::tiny;
    use std::collections::BTreeMap;
    use tch::Device;

    fn batch() -> (Tensor, Tensor) {
        let ids: Vec<i64> = (0..24).map(|index| 3 + index * 31 % 250).collect();
        let mut labels = ids.clone();
        labels[0..5].fill(IGNORED);
        labels[20..24].fill(IGNORED);
        let shaped = |values: &[i64]| Tensor::from_slice(values).view([2, 12]);
        (shaped(&ids), shaped(&labels))
    }

    fn whole_graph(config: &Config, tensors: &BTreeMap<String, Tensor>, ids: &Tensor, labels: &Tensor) -> Tensor {
        let rope = Rope::new(config, 12, Device::Cpu, Kind::Float);
        let mut x = embed(&tensors[EMBEDDING], ids);
        for index in 0..config.layers {
            x = layer_forward(config, &LayerWeights::from_map(tensors, index).unwrap(), &x, &rope);
        }
        cross_entropy_sum(config, &x, &tensors[FINAL_NORM], &tensors[EMBEDDING], labels)
    }

    #[test]
    fn piecewise_gradients_equal_those_of_the_whole_graph() {
        let model = tiny(5);
        let (config, (ids, labels)) = (&model.config, batch());
        let leaves: BTreeMap<String, Tensor> =
            model.tensors.iter().map(|(name, tensor)| (name.clone(), leaf(tensor))).collect();
        let loss = whole_graph(config, &leaves, &ids, &labels);
        loss.backward();

        let tensors = &model.tensors;
        let rope = Rope::new(config, 12, Device::Cpu, Kind::Float);
        let layers: Vec<LayerWeights> =
            (0..config.layers).map(|index| LayerWeights::from_map(tensors, index).unwrap()).collect();
        let mut inputs = vec![embed(&tensors[EMBEDDING], &ids)];
        for weights in &layers {
            inputs.push(layer_forward(config, weights, inputs.last().unwrap(), &rope));
        }
        let head = head_backward(config, &inputs[config.layers], &tensors[FINAL_NORM], &tensors[EMBEDDING], &labels);
        assert_eq!(head.tokens, 14);
        assert!((head.loss_sum.double_value(&[]) - loss.double_value(&[])).abs() < 1e-4);
        let mut upstream = head.hidden;
        for index in (0..config.layers).rev() {
            let gradients = layer_backward(config, &layers[index], &inputs[index], &rope, &upstream);
            for (name, ours) in crate::layer_parameter_names(config, index).iter().zip(gradients.weights.as_vec()) {
                assert!(leaves[name].grad().allclose(ours, 1e-4, 1e-5, false), "{name}");
            }
            upstream = gradients.input;
        }
        let embedding = embedding_backward(config, &ids, &upstream) + head.lm_head;
        assert!(leaves[EMBEDDING].grad().allclose(&embedding, 1e-4, 1e-5, false));
        assert!(leaves[FINAL_NORM].grad().allclose(&head.norm, 1e-4, 1e-5, false));
    }

    /// Loss, its gradients by parameter of layer 0, and the layer's output, of rows that sequences share or not.
    fn one_layer(config: &Config, tensors: &BTreeMap<String, Tensor>, ids: &Tensor, rope: &Rope) -> (f64, Vec<Tensor>) {
        let (batch, length) = ids.size2().unwrap();
        let x = embed(&tensors[EMBEDDING], ids);
        let weights = LayerWeights::from_map(tensors, 0).unwrap();
        let run = LayerRun::new(config, &weights, &x, rope);
        let hidden = run.output();
        assert_eq!(hidden.size(), [batch, length, config.hidden as i64]);
        let labels = ids.where_self(&ids.gt(2), &ids.full_like(IGNORED));
        let head = head_backward(config, &hidden, &tensors[FINAL_NORM], &tensors[EMBEDDING], &labels);
        let layer = run.backward(&head.hidden);
        let mut all = layer.weights.into_vec();
        all.extend([head.lm_head, embedding_backward(config, ids, &layer.input)]);
        (head.loss_sum.double_value(&[]), all)
    }

    /// So many tokens; the first is one that no label is made of.
    fn sequence(number: i64, length: i64) -> Vec<i64> {
        std::iter::once(1).chain((1..length).map(|index| 3 + (number * 57 + index * 31) % 250)).collect()
    }

    #[test]
    fn sequences_that_share_a_row_learn_as_if_each_were_alone() {
        for sliding_window in [None, Some(4)] {
            let model = tiny(5);
            let config = Config { sliding_window, ..model.config };
            let tensors = model.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.to_kind(Kind::Double)));
            let tensors: BTreeMap<String, Tensor> = tensors.collect();
            let rope = Rope::new(&config, 16, Device::Cpu, Kind::Double);
            let rows = [vec![7, 3, 5], vec![9]];
            let (mut ids, mut apart) = (Vec::new(), (0.0, Vec::new()));
            for (number, length) in (0..).zip(rows.iter().flatten()) {
                let sequence = sequence(number, *length as i64);
                let (loss, gradients) =
                    one_layer(&config, &tensors, &Tensor::from_slice(&sequence).view([1, -1]), &rope);
                apart.0 += loss;
                match apart.1.as_slice() {
                    [] => apart.1 = gradients,
                    sums => apart.1 = sums.iter().zip(gradients).map(|(sum, gradient)| sum + gradient).collect(),
                }
                ids.extend(sequence);
            }
            ids.insert(15, 0);
            ids.extend([0; 7]);
            let packed = one_layer(&config, &tensors, &Tensor::from_slice(&ids).view([2, 16]), &rope.packed(&rows, 16));
            assert!((packed.0 - apart.0).abs() < 1e-6 * apart.0);
            for (packed, apart) in packed.1.iter().zip(&apart.1) {
                assert!(packed.allclose(apart, 1e-5, 1e-6, false), "{}", (packed - apart).abs().max());
            }
        }
    }

    #[test]
    fn the_same_micro_batch_gives_the_same_bits() {
        let model = tiny(5);
        let (ids, labels) = batch();
        let tensors = &model.tensors;
        let once = || {
            let x = embed(&tensors[EMBEDDING], &ids);
            let head = head_backward(&model.config, &x, &tensors[FINAL_NORM], &tensors[EMBEDDING], &labels);
            let rope = Rope::new(&model.config, 12, Device::Cpu, Kind::Float);
            let weights = LayerWeights::from_map(tensors, 0).unwrap();
            let layer = layer_backward(&model.config, &weights, &x, &rope, &head.hidden);
            [head.lm_head, layer.input, layer.weights.query]
        };
        for (first, second) in once().iter().zip(once()) {
            assert_eq!(*first, second);
        }
    }

    #[test]
    fn a_batch_without_labels_has_zero_loss_and_zero_gradients() {
        let model = tiny(5);
        let (ids, labels) = batch();
        let x = embed(&model.tensors[EMBEDDING], &ids);
        let none = labels.full_like(IGNORED);
        let head = head_backward(&model.config, &x, &model.tensors[FINAL_NORM], &model.tensors[EMBEDDING], &none);
        assert_eq!((head.tokens, head.loss_sum.double_value(&[])), (0, 0.0));
        assert_eq!(head.lm_head.abs().sum(Kind::Float).double_value(&[]), 0.0);
        assert_eq!(head.hidden.size(), x.size());
    }
}
