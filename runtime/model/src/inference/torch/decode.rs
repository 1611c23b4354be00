//! Steps of one new token for each sequence, as CUDA graphs: a launch for each of a step's thousand
//! kernels would take longer than the kernels.
//!
//! A graph is recorded for a number of rows and a length of context, both rounded up; what a step has
//! less is filled with rows that write into a block of nobody's. All that changes from step to step
//! goes into one small tensor.

use super::{Batch, NONE, Net, Singles, number};
use crate::ModelError;
use crate::cuda::{Capture, Graph};
use crate::inference::{BLOCK_TOKENS, Outputs, Piece};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use tch::{Device, Kind, Tensor};

/// Shortest context that a graph is made for: 16 blocks.
const SHORTEST: usize = 256;

/// With more rows a step is limited by its arithmetic, not by launches.
const MOST_ROWS: usize = 128;

#[derive(Debug)]
pub struct Decoder {
    capture: Capture,
    graphs: HashMap<Shape, Step>,
    rounding: Rounding,
}

/// How steps are brought to few shapes.
#[derive(Clone, Copy, Debug)]
struct Rounding {
    max_length: usize,
    /// The block of nobody's.
    spare: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    rows: usize,
    /// Blocks of context of each row.
    blocks: usize,
    /// Some row has an adapter.
    adapted: bool,
}

/// What comes before a row's blocks among its numbers: token, position and adapter.
const BEFORE_BLOCKS: usize = 3;

#[derive(Debug)]
struct Step {
    graph: Graph,
    /// See [`Rounding::numbers`].
    inputs: Tensor,
    /// `[rows, V]`, fp32.
    logits: Tensor,
}

impl Decoder {
    pub fn new(max_length: usize, blocks: usize) -> Result<Self, ModelError> {
        let rounding = Rounding { max_length, spare: blocks as i64 };
        Ok(Self { capture: Capture::new()?, graphs: HashMap::new(), rounding })
    }

    /// Each piece is one token, whose logits are wanted.
    pub fn step(&mut self, net: &Net, pieces: &[Piece<'_>], outputs: &mut Outputs) -> Result<(), ModelError> {
        let Some(shape) = self.rounding.shape(pieces) else { return net.step(pieces, outputs) };
        let inputs = self.rounding.numbers(pieces, shape);
        let step = match self.graphs.entry(shape) {
            Entry::Occupied(recorded) => recorded.into_mut(),
            Entry::Vacant(place) => place.insert(Step::record(&mut self.capture, net, &inputs, shape.adapted)?),
        };
        step.inputs.f_copy_(&inputs)?;
        step.graph.replay()?;
        let count = outputs.logits.len();
        let logits = step.logits.f_narrow(0, 0, pieces.len() as i64)?.f_to_device(Device::Cpu)?;
        Ok(logits.f_copy_data(&mut outputs.logits, count)?)
    }
}

impl Step {
    /// For numbers of the shape of `example`.
    fn record(capture: &mut Capture, net: &Net, example: &Tensor, adapted: bool) -> Result<Self, ModelError> {
        let inputs = example.f_to_device(net.embedding.device())?;
        let (graph, logits) = capture.record(|| {
            let batch = batch(net, &inputs, adapted)?;
            let ids = inputs.f_select(1, 0)?.f_contiguous()?;
            let x = net.forward(&ids, &batch);
            Ok(net.logits(&x))
        })?;
        tracing::debug!(shape = ?example.size(), "decoding recorded");
        Ok(Self { graph, inputs, logits })
    }
}

impl Rounding {
    /// `None` if there are too many rows.
    fn shape(&self, pieces: &[Piece<'_>]) -> Option<Shape> {
        let longest = pieces.iter().map(|piece| piece.past + 1).max()?;
        let context = longest.max(SHORTEST).next_power_of_two().min(self.max_length.max(longest));
        let rows = pieces.len().next_power_of_two();
        let adapted = pieces.iter().any(|piece| piece.adapter.is_some());
        (rows <= MOST_ROWS).then_some(Shape { rows, blocks: context.div_ceil(BLOCK_TOKENS), adapted })
    }

    /// `[rows, 3 + blocks]`: token, position, adapter and the blocks of the context.
    fn numbers(&self, pieces: &[Piece<'_>], shape: Shape) -> Tensor {
        let mut numbers = Vec::with_capacity(shape.rows * (BEFORE_BLOCKS + shape.blocks));
        for row in 0..shape.rows {
            let (before, blocks) = match pieces.get(row) {
                Some(piece) => ([i64::from(piece.tokens[0]), piece.past as i64, number(piece)], piece.blocks),
                None => ([0, 0, NONE], &[][..]),
            };
            numbers.extend(before);
            let known = blocks.iter().take(shape.blocks).map(|block| i64::from(*block));
            numbers.extend(known.chain(std::iter::repeat(self.spare)).take(shape.blocks));
        }
        Tensor::from_slice(&numbers).view([shape.rows as i64, -1])
    }
}

/// What [`Net::batch`] makes of pieces, computed on the device from [`Rounding::numbers`]' numbers.
fn batch(net: &Net, inputs: &Tensor, adapted: bool) -> Result<Batch, ModelError> {
    let (rows, width) = inputs.size2()?;
    let (size, before) = (BLOCK_TOKENS as i64, BEFORE_BLOCKS as i64);
    let context = (width - before) * size;
    let numbers = |count| Tensor::f_arange(count, (Kind::Int64, inputs.device()));
    let positions = inputs.f_select(1, 1)?.f_contiguous()?;
    let starts = inputs.f_narrow(1, before, width - before)?.f_mul_scalar(size)?;
    let slots = starts.f_unsqueeze(2)?.f_add(&numbers(size)?)?.f_view([rows, context])?;
    let (places, last) = (numbers(context)?.f_unsqueeze(0)?, positions.f_unsqueeze(1)?);
    let mut seen = places.f_le_tensor(&last)?;
    if let Some(window) = net.config.sliding_window {
        seen = seen.f_logical_and(&places.f_gt_tensor(&last.f_sub_scalar(window as i64)?)?)?;
    }
    Ok(Batch {
        rope: net.rope.at(&positions),
        slots: slots.f_gather(1, &positions.f_unsqueeze(1)?, false)?.f_view([-1])?,
        singles: Some(Singles { rows: numbers(rows)?, slots, seen: seen.f_view([rows, 1, 1, context])? }),
        adapters: if adapted { Some(inputs.f_narrow(1, 2, 1)?.f_contiguous()?) } else { None },
        prompts: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::Want;
    use crate::inference::tests::adapter;
    use crate::inference::torch::Place;
    use crate::tiny::tiny;

    #[test]
    fn a_filled_up_step_computes_what_a_plain_one_does() {
        let place = Place { device: Device::Cpu, kind: Kind::Float, bits: None };
        let net = Net::new(&tiny(3), &[adapter()], place, 512, 40).unwrap();
        let adapters = [None, Some(0), None];
        let tables: [Vec<u32>; 3] = [vec![7, 1, 30], vec![4, 39], (10..30).collect()];
        let lengths = [33usize, 20, 300];
        let mut outputs = Outputs::default();
        for (blocks, length) in tables.iter().zip(lengths) {
            let ids: Vec<u32> = (0..length as u32).map(|index| 3 + index * 37 % 280).collect();
            let prompt = Piece { tokens: &ids, past: 0, blocks, want: Want::Nothing, adapter: None };
            outputs.begin(net.config.vocab, &[prompt]);
            net.step(&[prompt], &mut outputs).unwrap();
        }
        let next = [[5u32], [77], [200]];
        let pieces: Vec<Piece<'_>> = (0..3)
            .map(|row| Piece {
                tokens: &next[row],
                past: lengths[row],
                blocks: &tables[row],
                want: Want::Last,
                adapter: adapters[row],
            })
            .collect();
        let rounding = Rounding { max_length: 512, spare: 40 };
        let shape = rounding.shape(&pieces).unwrap();
        assert_eq!(shape, Shape { rows: 4, blocks: 32, adapted: true });
        let inputs = rounding.numbers(&pieces, shape);
        let x = net.forward(&inputs.select(1, 0).contiguous(), &batch(&net, &inputs, shape.adapted).unwrap());
        let filled = net.logits(&x);
        outputs.begin(net.config.vocab, &pieces);
        net.step(&pieces, &mut outputs).unwrap();
        for row in 0..3 {
            let plain = Tensor::from_slice(outputs.logits(row).next().unwrap());
            assert!(filled.get(row as i64).allclose(&plain, 1e-4, 1e-5, false), "row {row}");
        }
    }

    #[test]
    fn contexts_are_rounded_up_to_no_more_than_the_model_has() {
        let rounding = Rounding { max_length: 300, spare: 40 };
        let blocks: Vec<u32> = (0..20).collect();
        let of = |past| {
            let piece = Piece { tokens: &[1], past, blocks: &blocks, want: Want::Last, adapter: None };
            rounding.shape(&[piece, piece, piece]).unwrap()
        };
        assert_eq!(of(3), Shape { rows: 4, blocks: 16, adapted: false });
        assert_eq!(of(299), Shape { rows: 4, blocks: 19, adapted: false });
    }
}
