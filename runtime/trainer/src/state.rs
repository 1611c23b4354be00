//! What a rank holds: masters and moments of the blocks that it owns or is twin of, and, where they are replicated,
//! the compute weights of all that is trained (ZeRO, Rajbhandari et al. 2020, with one spare copy of each block).

use crate::blocks::{Block, BlockTable, Segment};
use crate::optimizer::{Slot, Update, adamw};
use std::borrow::Cow;
use tch::{Device, Kind, TchError, Tensor};

/// Master weights and AdamW's moments of one block, in the order of its elements.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockState {
    pub weights: Vec<f32>,
    pub first: Vec<f32>,
    pub second: Vec<f32>,
}

impl BlockState {
    /// Fresh moments.
    pub fn new(weights: Vec<f32>) -> Self {
        let zeros = vec![0.0; weights.len()];
        Self { first: zeros.clone(), second: zeros, weights }
    }

    /// Weights, first and second moments, little-endian: a block as the store keeps it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(12 * self.weights.len());
        for part in [&self.weights, &self.first, &self.second] {
            bytes.extend_from_slice(bytemuck::cast_slice(part));
        }
        bytes
    }

    /// `None` if the length is not that of `elements`.
    pub fn from_bytes(bytes: &[u8], elements: usize) -> Option<Self> {
        if bytes.len() != 12 * elements {
            return None;
        }
        let part = |index: usize| floats(&bytes[index * 4 * elements..(index + 1) * 4 * elements]);
        Some(Self { weights: part(0), first: part(1), second: part(2) })
    }

    /// Applies a finished gradient.
    pub fn update(&mut self, table: &BlockTable, block: &Block, gradient: &[f32], update: Update) {
        let mut start = 0;
        for segment in &block.segments {
            let range = start..start + segment.elements;
            start = range.end;
            let decays = table.parameters[segment.parameter].decays();
            let weight_decay = if decays { update.weight_decay } else { 0.0 };
            let slot = Slot {
                weights: &mut self.weights[range.clone()],
                first: &mut self.first[range.clone()],
                second: &mut self.second[range.clone()],
            };
            adamw(slot, &gradient[range], Update { weight_decay, ..update });
        }
    }
}

/// fp32 values of little-endian bytes; all platforms of libtorch are little-endian.
pub fn floats(bytes: &[u8]) -> Vec<f32> {
    let (values, _rest) = bytes.as_chunks();
    values.iter().map(|value| f32::from_le_bytes(*value)).collect()
}

/// Compute weights of all that is trained, in canonical order: fp32, or masters rounded to bf16.
#[derive(Debug)]
pub struct Weights {
    pub tensors: Vec<Tensor>,
}

impl Weights {
    /// Uninitialised but for what [`Weights::write`] will put there: zeros.
    pub fn zeros(table: &BlockTable, kind: Kind, device: Device) -> Self {
        let zeros = |shape: &Vec<i64>| Tensor::zeros(shape, (kind, device));
        Self { tensors: table.parameters.iter().map(|p| zeros(&p.shape)).collect() }
    }

    /// Replaces a block's elements by values of [`rounded`].
    pub fn write(&mut self, block: &Block, values: &[u8]) -> Result<(), TchError> {
        write_block(block, values, |parameter| &self.tensors[parameter])
    }

    /// A block's elements.
    pub fn read(&self, block: &Block) -> Result<Vec<f32>, TchError> {
        read_block(block, |parameter| &self.tensors[parameter])
    }
}

/// A block's masters as passes compute with them: little-endian, in the order of its elements.
pub fn rounded(masters: &[f32], kind: Kind) -> Result<Cow<'_, [u8]>, TchError> {
    if kind == Kind::Float {
        return Ok(Cow::Borrowed(bytemuck::cast_slice(masters)));
    }
    let mut bytes = vec![0; masters.len() * kind.elt_size_in_bytes()];
    Tensor::f_from_slice(masters)?.f_to_kind(kind)?.f_copy_data_u8(&mut bytes, masters.len())?;
    Ok(Cow::Owned(bytes))
}

/// Puts a block's values, as [`rounded`] to the tensors' kind, into tensors, given by parameter index.
pub fn write_block<'a>(block: &Block, values: &[u8], tensor: impl Fn(usize) -> &'a Tensor) -> Result<(), TchError> {
    let mut rest = values;
    for segment in &block.segments {
        let flat = tensor(segment.parameter).f_view([-1])?;
        let values;
        (values, rest) = rest.split_at(segment.elements * flat.kind().elt_size_in_bytes());
        let values = Tensor::f_from_data_size(values, &[segment.elements as i64], flat.kind())?;
        flat.f_narrow(0, segment.offset as i64, segment.elements as i64)?.f_copy_(&values)?;
    }
    Ok(())
}

/// Puts a parameter's part of a block where it belongs among the block's values.
pub fn fill_block(block: &Block, parameter: usize, tensor: &Tensor, values: &mut [f32]) -> Result<(), TchError> {
    let mut start = 0;
    for segment in &block.segments {
        let range = start..start + segment.elements;
        start = range.end;
        if segment.parameter == parameter {
            copy_segment(segment, tensor, &mut values[range])?;
        }
    }
    Ok(())
}

fn copy_segment(segment: &Segment, tensor: &Tensor, values: &mut [f32]) -> Result<(), TchError> {
    let place = tensor.f_view([-1])?.f_narrow(0, segment.offset as i64, segment.elements as i64)?;
    place.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_copy_data(values, segment.elements)
}

/// Collects a block from tensors, given by parameter index.
pub fn read_block<'a>(block: &Block, tensor: impl Fn(usize) -> &'a Tensor) -> Result<Vec<f32>, TchError> {
    let mut values = vec![0f32; block.elements];
    let mut start = 0;
    for segment in &block.segments {
        let range = start..start + segment.elements;
        start = range.end;
        copy_segment(segment, tensor(segment.parameter), &mut values[range])?;
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(table: &BlockTable, model: &vicuna_model::Pretrained) -> Weights {
        Weights { tensors: table.parameters.iter().map(|it| model.tensors[&it.name].shallow_clone()).collect() }
    }

    #[test]
    fn a_block_survives_the_store_bit_for_bit() {
        let mut block = BlockState::new(vec![1.5, -0.0, f32::MIN_POSITIVE / 2.0]);
        block.second[1] = 3.25;
        let bytes = block.to_bytes();
        let back = BlockState::from_bytes(&bytes, 3).unwrap();
        assert_eq!(back.to_bytes(), bytes);
        assert!(BlockState::from_bytes(&bytes, 2).is_none());
    }

    #[test]
    fn computing_in_bf16_rounds_the_masters_and_keeps_them() {
        let model = vicuna_model::tiny::tiny(3);
        let table = BlockTable::new(&model.config);
        let masters = weights(&table, &model);
        let block = &table.blocks[1];
        let state = BlockState::new(masters.read(block).unwrap());
        let rounded =
            Weights { tensors: masters.tensors.iter().map(|tensor| tensor.to_kind(Kind::BFloat16)).collect() };
        let mut written = Weights::zeros(&table, Kind::BFloat16, Device::Cpu);
        written.write(block, &super::rounded(&state.weights, Kind::BFloat16).unwrap()).unwrap();
        let read = written.read(block).unwrap();
        assert_eq!(read, rounded.read(block).unwrap());
        assert_ne!(read, state.weights);
        assert!(read.iter().zip(&state.weights).all(|(low, full)| (low - full).abs() <= full.abs() / 256.0));
    }

    #[test]
    fn blocks_read_from_the_weights_write_back_the_same_model() {
        let model = vicuna_model::tiny::tiny(3);
        let table = BlockTable::new(&model.config);
        let weights = weights(&table, &model);
        let mut copy = Weights::zeros(&table, Kind::Float, Device::Cpu);
        for block in &table.blocks {
            copy.write(block, &rounded(&weights.read(block).unwrap(), Kind::Float).unwrap()).unwrap();
        }
        assert_eq!(copy.tensors, weights.tensors);
    }

    #[test]
    fn a_block_is_filled_parameter_by_parameter_in_any_order() {
        let model = vicuna_model::tiny::tiny(3);
        let table = BlockTable::new(&model.config);
        let weights = weights(&table, &model);
        for block in &table.blocks {
            let mut values = vec![0.0; block.elements];
            for (index, tensor) in weights.tensors.iter().enumerate().rev() {
                let before = values.clone();
                fill_block(block, index, tensor, &mut values).unwrap();
                assert!(block.has(index) || values == before, "{} has nothing of parameter {index}", block.name);
            }
            assert_eq!(values, weights.read(block).unwrap(), "{}", block.name);
        }
    }
}
