//! Quantised tensors as they lie in the file, for kernels that compute with them. Groups of 32
//! weights in a row share a scale, and 4-bit ones a minimum.

use super::quantization::{half_at, nibble, sub_scale};
use half::f16;

/// Weights in a group.
pub const GROUP: usize = 32;

const Q4_0: u32 = 2;
const Q4_1: u32 = 3;
const Q8_0: u32 = 8;
const Q4_K: u32 = 12;

/// A matrix in one of ggml's block formats, its rows in Hugging Face's order.
#[derive(Clone, Debug)]
pub struct Packed {
    kind: u32,
    rows: usize,
    columns: usize,
    bytes: Vec<u8>,
}

/// What a group of a tensor can be had as without rounding (Q4_K's scales are rounded to fp16).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grouping {
    Nibbles,
    Bytes,
}

/// The weight is `scale · q + minimum`, q from 0 to 15.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nibbles {
    /// fp16.
    pub scale: u16,
    pub minimum: u16,
    pub numbers: [u8; GROUP],
}

/// The weight is `scale · q`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bytes {
    /// fp16.
    pub scale: u16,
    pub numbers: [i8; GROUP],
}

impl Packed {
    /// `None` for what is not a matrix of blocks that lie within its rows. `from_row` gives the
    /// row in the file for each row of ours.
    pub(super) fn new(kind: u32, shape: &[i64], bytes: &[u8], from_row: impl Fn(usize) -> usize) -> Option<Self> {
        let [rows, columns] = *shape else { return None };
        let (rows, columns) = (rows as usize, columns as usize);
        let (values, block) = super::quantization::block(kind)?;
        if values < GROUP || !columns.is_multiple_of(values) {
            return None;
        }
        let length = columns / values * block;
        let mut ordered = Vec::with_capacity(bytes.len());
        for row in 0..rows {
            ordered.extend_from_slice(bytes.get(from_row(row) * length..)?.get(..length)?);
        }
        Some(Self { kind, rows, columns, bytes: ordered })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// `None` if its groups fit neither form.
    pub fn grouping(&self) -> Option<Grouping> {
        match self.kind {
            Q4_0 | Q4_1 | Q4_K => Some(Grouping::Nibbles),
            Q8_0 => Some(Grouping::Bytes),
            _ => None,
        }
    }

    /// Group `group` of a row of a tensor of 4-bit numbers.
    pub fn nibbles(&self, row: usize, group: usize) -> Nibbles {
        match self.kind {
            Q4_0 => {
                let block = self.block(row, group, 18);
                let minimum = f16::from_f32(-8.0 * half_at(block, 0));
                Nibbles { scale: bits(block, 0), minimum: minimum.to_bits(), numbers: numbers(&block[2..]) }
            }
            Q4_1 => {
                let block = self.block(row, group, 20);
                Nibbles { scale: bits(block, 0), minimum: bits(block, 2), numbers: numbers(&block[4..]) }
            }
            _ => sub_block(self.block(row, group / 8, 144), group % 8),
        }
    }

    /// Group `group` of a row of a tensor of 8-bit numbers.
    pub fn bytes(&self, row: usize, group: usize) -> Bytes {
        let block = self.block(row, group, 34);
        Bytes { scale: bits(block, 0), numbers: std::array::from_fn(|index| block[2 + index] as i8) }
    }

    fn block(&self, row: usize, index: usize, length: usize) -> &[u8] {
        let blocks = self.bytes.len() / length / self.rows;
        &self.bytes[(row * blocks + index) * length..][..length]
    }
}

fn bits(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

fn numbers(packed: &[u8]) -> [u8; GROUP] {
    std::array::from_fn(|index| nibble(packed, index))
}

/// One of the eight groups of a block of Q4_K.
fn sub_block(block: &[u8], index: usize) -> Nibbles {
    let (sub, sub_minimum) = sub_scale(&block[4..16], index);
    let packed = &block[16 + index / 2 * 32..];
    Nibbles {
        scale: f16::from_f32(half_at(block, 0) * sub).to_bits(),
        minimum: f16::from_f32(-half_at(block, 2) * sub_minimum).to_bits(),
        numbers: std::array::from_fn(|position| packed[position] >> (4 * (index % 2)) & 0xf),
    }
}

#[cfg(test)]
mod tests {
    use super::super::quantization::dequantize;
    use super::*;

    /// Blocks of any bytes whose scales are ordinary numbers.
    fn tensor(kind: u32, columns: usize, rows: usize) -> (Packed, Vec<f32>) {
        let (values, block) = super::super::quantization::block(kind).unwrap();
        let mut bytes: Vec<u8> = (0..rows * columns / values * block).map(|index| (index * 89 % 251) as u8).collect();
        for (index, block) in bytes.chunks_exact_mut(block).enumerate() {
            block[..2].copy_from_slice(&f16::from_f32(0.01 + index as f32 / 64.0).to_le_bytes());
            if kind == Q4_1 || kind == Q4_K {
                block[2..4].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
            }
        }
        let shape = [rows as i64, columns as i64];
        let expected = dequantize("t", kind, &bytes).unwrap();
        (Packed::new(kind, &shape, &bytes, |row| row).unwrap(), expected)
    }

    fn weight(packed: &Packed, row: usize, column: usize) -> f32 {
        let (group, within) = (column / GROUP, column % GROUP);
        let half = |bits| f16::from_bits(bits).to_f32();
        match packed.grouping().unwrap() {
            Grouping::Nibbles => {
                let found = packed.nibbles(row, group);
                half(found.scale) * f32::from(found.numbers[within]) + half(found.minimum)
            }
            Grouping::Bytes => {
                let found = packed.bytes(row, group);
                half(found.scale) * f32::from(found.numbers[within])
            }
        }
    }

    #[test]
    fn groups_are_the_weights_that_the_file_means() {
        for (kind, tolerance) in [(Q4_0, 1e-6), (Q4_1, 1e-6), (Q8_0, 1e-6), (Q4_K, 1e-3)] {
            let (packed, expected) = tensor(kind, 512, 3);
            for (index, expected) in expected.iter().enumerate() {
                let found = weight(&packed, index / 512, index % 512);
                let allowed = tolerance * (expected.abs() + 64.0);
                assert!((found - expected).abs() <= allowed, "kind {kind}, {index}: {found} instead of {expected}");
            }
        }
    }

    #[test]
    fn rows_come_in_the_order_asked_for() {
        let (straight, _) = tensor(Q4_1, 64, 4);
        let reversed = Packed::new(Q4_1, &[4, 64], &straight.bytes, |row| 3 - row).unwrap();
        assert_eq!(reversed.nibbles(0, 1), straight.nibbles(3, 1));
    }

    #[test]
    fn what_is_not_in_blocks_of_a_row_is_left_out() {
        let order = |row| row;
        assert!(Packed::new(0, &[2, 32], &[0; 256], order).is_none());
        assert!(Packed::new(Q4_1, &[64], &[0; 40], order).is_none());
        assert!(Packed::new(Q8_0, &[32, 48], &[0; 1632], order).is_none());
        assert!(Packed::new(Q8_0, &[2, 32], &[0; 40], order).is_none());
    }
}
