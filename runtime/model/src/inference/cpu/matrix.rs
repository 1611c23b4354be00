//! Weight matrices in the order in which the kernels read them. Outputs are cut into *panels*, 8 of
//! quantised weights and 16 of others, which a kernel computes side by side; within a panel the
//! inputs come one after another. So a step reads each weight once, front to back.

pub use crate::gguf::packed::GROUP;
use crate::gguf::packed::{Bytes, Grouping, Nibbles, Packed};
use half::{bf16, f16};

/// Outputs of a panel of quantised weights.
pub const NARROW: usize = 8;
/// Outputs of a panel of fp32 or bf16 weights.
pub const WIDE: usize = 16;

/// 8 outputs × 32 inputs of 4-bit numbers q: the weight is `scale · q + minimum`, q from 0 to 15.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub struct Block4 {
    /// fp16, one an output.
    pub scales: [u16; NARROW],
    pub minima: [u16; NARROW],
    /// Inputs `4 · quad ..` of all outputs in the low halves, inputs `16 + 4 · quad ..` in the high ones.
    pub nibbles: [[u8; 32]; 4],
}

/// 8 outputs × 32 inputs of 8-bit numbers q: the weight is `scale · q`.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub struct Block8 {
    /// fp16, one an output.
    pub scales: [u16; NARROW],
    /// Inputs `4 · quad ..` of all outputs.
    pub numbers: [[i8; 32]; 8],
}

impl Block4 {
    pub fn number(&self, output: usize, input: usize) -> u8 {
        let byte = self.nibbles[input % 16 / 4][4 * output + input % 4];
        if input < 16 { byte & 0xf } else { byte >> 4 }
    }
}

impl Block8 {
    pub fn number(&self, output: usize, input: usize) -> i8 {
        self.numbers[input / 4][4 * output + input % 4]
    }
}

/// How a matrix holds its numbers.
#[derive(Debug)]
pub enum Panels {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
    Int8(Vec<Block8>),
    Int4(Vec<Block4>),
}

/// What a matrix is to hold them as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    F32,
    Bf16,
    Int8,
    Int4,
}

/// A projection from `inputs` to `outputs`.
#[derive(Debug)]
pub struct Matrix {
    pub outputs: usize,
    pub inputs: usize,
    pub panels: Panels,
}

impl Matrix {
    /// From fp32 weights `[outputs, inputs]`. Rows that are not whole groups stay fp32.
    pub fn new(weights: &[f32], inputs: usize, format: Format) -> Self {
        let outputs = weights.len() / inputs;
        let row = |output: usize| &weights[output * inputs..][..inputs];
        let panels = match format {
            Format::Int8 if inputs.is_multiple_of(GROUP) => {
                Panels::Int8(narrow(outputs, inputs, |output, group| round_to_bytes(group_of(row(output), group))))
            }
            Format::Int4 if inputs.is_multiple_of(GROUP) => {
                Panels::Int4(narrow(outputs, inputs, |output, group| round_to_nibbles(group_of(row(output), group))))
            }
            Format::Bf16 => Panels::Bf16(wide_panels(outputs, inputs, |at| bf16::from_f32(weights[at]).to_bits())),
            _ => Panels::F32(wide_panels(outputs, inputs, |at| weights[at])),
        };
        Self { outputs, inputs, panels }
    }

    /// From a GGUF tensor whose blocks fit, without rounding again; `None` where they do not.
    pub fn from_packed(packed: &Packed) -> Option<Self> {
        let (outputs, inputs) = (packed.rows(), packed.columns());
        let panels = match packed.grouping()? {
            Grouping::Nibbles => Panels::Int4(narrow(outputs, inputs, |output, group| packed.nibbles(output, group))),
            Grouping::Bytes => Panels::Int8(narrow(outputs, inputs, |output, group| packed.bytes(output, group))),
        };
        Some(Self { outputs, inputs, panels })
    }

    /// Whether the kernels want the activations rounded to 8 bits.
    pub fn is_quantized(&self) -> bool {
        matches!(self.panels, Panels::Int8(_) | Panels::Int4(_))
    }

    /// Outputs of a panel.
    pub fn width(&self) -> usize {
        if self.is_quantized() { NARROW } else { WIDE }
    }

    /// The weights of one output: a row of the embedding.
    pub fn row(&self, output: usize, to: &mut [f32]) {
        let (narrow, lane) = (output / NARROW * (self.inputs / GROUP), output % NARROW);
        let wide = |input: usize| (output / WIDE * self.inputs + input) * WIDE + output % WIDE;
        for (input, to) in to.iter_mut().enumerate() {
            let (group, within) = (input / GROUP, input % GROUP);
            *to = match &self.panels {
                Panels::F32(values) => values[wide(input)],
                Panels::Bf16(values) => bf16::from_bits(values[wide(input)]).to_f32(),
                Panels::Int8(blocks) => {
                    let block = &blocks[narrow + group];
                    f16::from_bits(block.scales[lane]).to_f32() * f32::from(block.number(lane, within))
                }
                Panels::Int4(blocks) => {
                    let block = &blocks[narrow + group];
                    let (scale, minimum) = (f16::from_bits(block.scales[lane]), f16::from_bits(block.minima[lane]));
                    scale.to_f32() * f32::from(block.number(lane, within)) + minimum.to_f32()
                }
            };
        }
    }

    /// Bytes that a step reads.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(values) => size_of_val(values.as_slice()),
            Panels::Bf16(values) => size_of_val(values.as_slice()),
            Panels::Int8(blocks) => size_of_val(blocks.as_slice()),
            Panels::Int4(blocks) => size_of_val(blocks.as_slice()),
        }
    }
}

fn group_of(row: &[f32], group: usize) -> &[f32] {
    &row[group * GROUP..][..GROUP]
}

/// Scale and numbers closest to the weights.
fn round_to_bytes(weights: &[f32]) -> Bytes {
    let largest = weights.iter().fold(0.0, |largest: f32, weight| largest.max(weight.abs()));
    let scale = f16::from_f32(largest / 127.0);
    let inverse = inverse_of(scale);
    let number = |index: usize| (weights[index] * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
    Bytes { scale: scale.to_bits(), numbers: std::array::from_fn(number) }
}

/// The range from least to largest in 15 equal steps.
fn round_to_nibbles(weights: &[f32]) -> Nibbles {
    let least = weights.iter().copied().fold(f32::INFINITY, f32::min);
    let largest = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let minimum = f16::from_f32(least);
    let scale = f16::from_f32((largest - minimum.to_f32()) / 15.0);
    let inverse = inverse_of(scale);
    let number =
        |index: usize| ((weights[index] - minimum.to_f32()) * inverse).round_ties_even().clamp(0.0, 15.0) as u8;
    Nibbles { scale: scale.to_bits(), minimum: minimum.to_bits(), numbers: std::array::from_fn(number) }
}

fn inverse_of(scale: f16) -> f32 {
    let scale = scale.to_f32();
    if scale == 0.0 { 0.0 } else { scale.recip() }
}

/// Panels of 16 outputs from a matrix `[outputs, inputs]`, filled up with zeros.
pub fn wide_panels<T: Copy + Default>(outputs: usize, inputs: usize, at: impl Fn(usize) -> T) -> Vec<T> {
    let mut panels = vec![T::default(); outputs.div_ceil(WIDE) * WIDE * inputs];
    for (index, panel) in panels.chunks_exact_mut(WIDE * inputs).enumerate() {
        for lane in 0..WIDE.min(outputs - index * WIDE) {
            let row = (index * WIDE + lane) * inputs;
            for input in 0..inputs {
                panel[input * WIDE + lane] = at(row + input);
            }
        }
    }
    panels
}

/// Groups of eight outputs.
trait Block: Clone {
    type Group;
    const EMPTY: Self;
    fn put(&mut self, lane: usize, group: &Self::Group);
}

impl Block for Block4 {
    type Group = Nibbles;
    const EMPTY: Self = Self { scales: [0; NARROW], minima: [0; NARROW], nibbles: [[0; 32]; 4] };

    fn put(&mut self, lane: usize, group: &Nibbles) {
        self.scales[lane] = group.scale;
        self.minima[lane] = group.minimum;
        for (input, number) in group.numbers.iter().enumerate() {
            let byte = &mut self.nibbles[input % 16 / 4][4 * lane + input % 4];
            *byte |= if input < 16 { *number } else { *number << 4 };
        }
    }
}

impl Block for Block8 {
    type Group = Bytes;
    const EMPTY: Self = Self { scales: [0; NARROW], numbers: [[0; 32]; 8] };

    fn put(&mut self, lane: usize, group: &Bytes) {
        self.scales[lane] = group.scale;
        for (input, number) in group.numbers.iter().enumerate() {
            self.numbers[input / 4][4 * lane + input % 4] = *number;
        }
    }
}

fn narrow<B: Block>(outputs: usize, inputs: usize, group_at: impl Fn(usize, usize) -> B::Group) -> Vec<B> {
    let groups = inputs / GROUP;
    let mut blocks = vec![B::EMPTY; outputs.div_ceil(NARROW) * groups];
    for output in 0..outputs {
        for group in 0..groups {
            blocks[output / NARROW * groups + group].put(output % NARROW, &group_at(output, group));
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(outputs: usize, inputs: usize) -> Vec<f32> {
        (0..outputs * inputs).map(|index| ((index * 37 % 101) as f32 - 50.0) / 400.0).collect()
    }

    fn rows(matrix: &Matrix) -> Vec<f32> {
        let mut all = vec![0.0; matrix.outputs * matrix.inputs];
        all.chunks_exact_mut(matrix.inputs).enumerate().for_each(|(output, row)| matrix.row(output, row));
        all
    }

    #[test]
    fn a_matrix_gives_back_its_rows_as_exactly_as_its_format_allows() {
        let expected = weights(21, 96);
        for (format, tolerance) in
            [(Format::F32, 0.0), (Format::Bf16, 0.0005), (Format::Int8, 0.0006), (Format::Int4, 0.009)]
        {
            let found = rows(&Matrix::new(&expected, 96, format));
            let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= tolerance, "{format:?}: {worst}");
        }
    }

    #[test]
    fn rows_that_are_not_whole_groups_stay_fp32() {
        let expected = weights(5, 40);
        let matrix = Matrix::new(&expected, 40, Format::Int4);
        assert!(!matrix.is_quantized());
        assert_eq!(rows(&matrix), expected);
    }

    #[test]
    fn a_quarter_of_a_byte_more_than_half_is_what_4_bits_cost() {
        let matrix = Matrix::new(&weights(16, 64), 64, Format::Int4);
        assert_eq!(matrix.bytes(), 16 * 64 * 5 / 8);
    }
}
