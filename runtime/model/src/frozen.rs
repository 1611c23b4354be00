//! Weights that are only read: whole, or with their projections in 4 or 8 bits and one layer at a time
//! given back in the compute precision (QLoRA, Dettmers et al. 2023).

use crate::layers::{LayerWeights, Projection};
use crate::parameters::{self, EMBEDDING, FINAL_NORM, LM_HEAD, layer_bias_names, layer_weight_names, parameter_names};
use crate::{Config, ModelError};
use std::collections::{BTreeMap, BTreeSet};
use tch::{Device, Kind, Tensor};

/// Values that share a scale in NF4.
const NF4_BLOCK: i64 = 64;

/// Quantiles of a normal distribution, scaled to [-1, 1] (Dettmers et al. 2023, appendix E).
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// How projections are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantization {
    /// 4-bit NormalFloat, one fp32 scale for 64 values: 4.5 bits a weight.
    Nf4,
    /// 8-bit integers, one fp32 scale a row.
    Int8,
}

/// A model's weights on the device, without gradients.
#[derive(Debug)]
pub struct Frozen {
    tensors: BTreeMap<String, Held>,
    kind: Kind,
}

#[derive(Debug)]
enum Held {
    Whole(Tensor),
    /// Codes `[n / 2]` uint8, the earlier value in the upper half; scales `[n / 64]`; the shape.
    Nf4(Tensor, Tensor, Vec<i64>),
    /// Codes `[out, in]` int8, scales `[out, 1]`.
    Int8(Tensor, Tensor),
}

impl Frozen {
    /// Asks for a model's weights one by one, in the order of their names, letting each go as soon as it is converted.
    pub fn new(
        config: &Config,
        mut weight: impl FnMut(&str) -> Result<Tensor, ModelError>,
        quantization: Option<Quantization>,
        device: Device,
        kind: Kind,
    ) -> Result<Self, ModelError> {
        let projections: Vec<String> = (0..config.layers)
            .flat_map(|layer| Projection::ALL.map(|projection| projection.weight_name(layer)))
            .collect();
        let mut held = BTreeMap::new();
        for name in BTreeSet::from_iter(parameter_names(config)) {
            let tensor = weight(&name)?;
            parameters::check_shape(config, &name, &tensor.size())?;
            let quantization = quantization.filter(|_| projections.contains(&name));
            held.insert(name, Held::new(&tensor, quantization, device, kind)?);
        }
        Ok(Self { tensors: held, kind })
    }

    /// The same memory for another thread.
    pub fn share(&self) -> Self {
        let tensors = self.tensors.iter().map(|(name, held)| (name.clone(), held.share())).collect();
        Self { tensors, kind: self.kind }
    }

    /// A tensor in the compute precision; `None` if there is none of that name.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.tensors.get(name).map(|held| held.whole(self.kind))
    }

    pub fn embedding(&self) -> Tensor {
        self.known(EMBEDDING)
    }

    pub fn final_norm(&self) -> Tensor {
        self.known(FINAL_NORM)
    }

    /// The output projection, which may be the embedding.
    pub fn head(&self) -> Tensor {
        if self.tensors.contains_key(LM_HEAD) { self.known(LM_HEAD) } else { self.embedding() }
    }

    /// The weights of layer `index` of the model, in the compute precision.
    #[expect(clippy::expect_used, reason = "new has seen that every layer is complete")]
    pub fn layer(&self, index: usize) -> LayerWeights {
        let names = layer_weight_names(index).into_iter().chain(layer_bias_names(index));
        let named = names.filter_map(|name| self.get(&name).map(|tensor| (name, tensor))).collect();
        LayerWeights::from_map(&named, index).expect("a complete layer")
    }

    #[expect(clippy::expect_used, reason = "new has seen that every tensor is there")]
    fn known(&self, name: &str) -> Tensor {
        self.get(name).expect("a tensor of the model")
    }

    /// Bytes that the weights take.
    pub fn bytes(&self) -> usize {
        let size = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
        let held = |held: &Held| match held {
            Held::Whole(tensor) => size(tensor),
            Held::Nf4(codes, scales, _) | Held::Int8(codes, scales) => size(codes) + size(scales),
        };
        self.tensors.values().map(held).sum()
    }
}

impl Held {
    fn new(
        tensor: &Tensor,
        quantization: Option<Quantization>,
        device: Device,
        kind: Kind,
    ) -> Result<Self, ModelError> {
        Ok(match quantization {
            None => Self::Whole(tensor.f_to_kind(kind)?.f_to_device(device)?.f_contiguous()?),
            Some(Quantization::Nf4) => {
                let (codes, scales) = nf4(tensor);
                Self::Nf4(codes.f_to_device(device)?, scales.f_to_device(device)?, tensor.size())
            }
            Some(Quantization::Int8) => {
                let (codes, scales) = int8(tensor);
                Self::Int8(codes.f_to_device(device)?, scales.f_to_device(device)?)
            }
        })
    }

    fn share(&self) -> Self {
        match self {
            Self::Whole(tensor) => Self::Whole(tensor.shallow_clone()),
            Self::Nf4(codes, scales, shape) => Self::Nf4(codes.shallow_clone(), scales.shallow_clone(), shape.clone()),
            Self::Int8(codes, scales) => Self::Int8(codes.shallow_clone(), scales.shallow_clone()),
        }
    }

    fn whole(&self, kind: Kind) -> Tensor {
        match self {
            Self::Whole(tensor) => tensor.shallow_clone(),
            Self::Nf4(codes, scales, shape) => from_nf4(codes, scales, shape, kind),
            Self::Int8(codes, scales) => (codes.to_kind(Kind::Float) * scales).to_kind(kind),
        }
    }
}

/// Codes and scales of `tensor`: each value becomes the nearest of [`NF4`], times its block's largest.
fn nf4(tensor: &Tensor) -> (Tensor, Tensor) {
    let flat = tensor.to_kind(Kind::Float).reshape([-1]);
    let count = flat.size()[0];
    let padding = (-count).rem_euclid(NF4_BLOCK);
    let blocks = flat.constant_pad_nd([0, padding]).view([-1, NF4_BLOCK]);
    let scales = blocks.abs().amax([1], true);
    let relative = &blocks / scales.where_self(&scales.gt(0.0), &scales.ones_like());
    let middles: Vec<f32> = NF4.windows(2).map(|pair| f32::midpoint(pair[0], pair[1])).collect();
    let codes = relative.bucketize(&Tensor::from_slice(&middles), true, false).view([-1, 2]);
    let packed = codes.select(1, 0) * 16i64 + codes.select(1, 1);
    (packed.to_kind(Kind::Uint8), scales.reshape([-1]))
}

fn from_nf4(codes: &Tensor, scales: &Tensor, shape: &[i64], kind: Kind) -> Tensor {
    let pairs: Vec<f32> = (0..256).flat_map(|code| [NF4[code / 16], NF4[code % 16]]).collect();
    let pairs = Tensor::from_slice(&pairs).view([256, 2]).to_device(codes.device());
    let relative = pairs.index_select(0, &codes.to_kind(Kind::Int)).view([-1, NF4_BLOCK]);
    let values = (relative * scales.unsqueeze(1)).reshape([-1]);
    values.narrow(0, 0, shape.iter().product()).view(shape).to_kind(kind)
}

/// Codes and scales of `tensor [out, in]`: 127 is a row's largest.
fn int8(tensor: &Tensor) -> (Tensor, Tensor) {
    let tensor = tensor.to_kind(Kind::Float);
    let scales = tensor.abs().amax([1], true) / 127.0;
    let divisors = scales.where_self(&scales.gt(0.0), &scales.ones_like());
    ((tensor / divisors).round().to_kind(Kind::Int8), scales)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiny::tiny;

    fn frozen(quantization: Option<Quantization>) -> (Frozen, crate::Pretrained) {
        let model = tiny(5);
        let weight = |name: &str| Ok(model.tensors[name].shallow_clone());
        (Frozen::new(&model.config, weight, quantization, Device::Cpu, Kind::Float).unwrap(), model)
    }

    #[test]
    fn whole_weights_stay_as_they_are_and_are_not_copied() {
        let (frozen, model) = frozen(None);
        for (name, tensor) in &model.tensors {
            assert_eq!(frozen.get(name).unwrap().data_ptr(), tensor.data_ptr(), "{name}");
        }
    }

    #[test]
    fn only_projections_are_quantised_and_each_value_is_near_its_own() {
        // Half of NF4's widest gap, and half a step of 127, relative to the largest value.
        for (quantization, allowed) in [(Quantization::Nf4, 0.1520), (Quantization::Int8, 0.5 / 127.0 + 1e-6)] {
            let (frozen, model) = frozen(Some(quantization));
            for (name, tensor) in &model.tensors {
                let again = frozen.get(name).unwrap();
                assert_eq!(again.size(), tensor.size());
                let largest = (&again - tensor).abs().max().double_value(&[]) / tensor.abs().max().double_value(&[]);
                if name.contains("proj") {
                    assert!(largest > 0.0 && largest <= allowed, "{name}: {largest}");
                } else {
                    assert_eq!(largest, 0.0, "{name}");
                }
            }
        }
    }

    #[test]
    fn what_nf4_can_express_survives_it_exactly() {
        let values: Vec<f32> = (0..192).map(|index| NF4[index * 7 % 16] * [0.5, 3.0, 0.0][index / 64]).collect();
        let tensor = Tensor::from_slice(&values[..190]).view([19, 10]);
        let (codes, scales) = nf4(&tensor);
        assert_eq!((codes.size(), scales.size()), (vec![96], vec![3]));
        assert_eq!(from_nf4(&codes, &scales, &[19, 10], Kind::Float), tensor);
    }

    #[test]
    fn four_bit_projections_take_four_and_a_half_bits_a_weight() {
        let (frozen, model) = frozen(Some(Quantization::Nf4));
        let (mut projections, mut others) = (0, 0);
        for (name, tensor) in &model.tensors {
            *if name.contains("proj") { &mut projections } else { &mut others } += tensor.numel();
        }
        assert_eq!(frozen.bytes(), projections * 9 / 16 + 4 * others);
    }
}
