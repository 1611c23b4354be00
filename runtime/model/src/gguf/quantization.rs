//! ggml's block formats, unpacked to fp32 (`ggml-common.h` and `ggml-quants.c` describe them). A
//! block shares scales among 32 or 256 values; within a block, low nibbles come before high ones.

use crate::ModelError;
use half::{bf16, f16};

const SUPPORTED: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K";

/// One format: how many values a block holds, in how many bytes, and how it unpacks.
struct Format {
    values: usize,
    bytes: usize,
    unpack: Unpack,
}

/// From the bytes of a block to its values.
type Unpack = fn(&[u8], &mut [f32]);

/// By ggml's type number.
fn format(name: &str, kind: u32) -> Result<Format, ModelError> {
    let (values, bytes, unpack): (_, _, Unpack) = match kind {
        0 => (1, 4, f32_value),
        1 => (1, 2, f16_value),
        2 => (32, 18, q4_0),
        3 => (32, 20, q4_1),
        6 => (32, 22, q5_0),
        7 => (32, 24, q5_1),
        8 => (32, 34, q8_0),
        12 => (256, 144, q4_k),
        13 => (256, 176, q5_k),
        14 => (256, 210, q6_k),
        30 => (1, 2, bf16_value),
        other => {
            return Err(ModelError::UnsupportedType {
                name: name.to_owned(),
                found: format!("number {other} of ggml"),
                supported: SUPPORTED,
            });
        }
    };
    Ok(Format { values, bytes, unpack })
}

/// Values and bytes of a block; `None` for an unknown type.
pub(super) fn block(kind: u32) -> Option<(usize, usize)> {
    format("", kind).ok().map(|format| (format.values, format.bytes))
}

/// Bytes that `elements` values of tensor `name` take.
pub fn packed_length(name: &str, kind: u32, elements: usize) -> Result<usize, ModelError> {
    let format = format(name, kind)?;
    if !elements.is_multiple_of(format.values) {
        return Err(ModelError::Gguf(format!(
            "tensor {name} has {elements} values, not a multiple of its blocks' {}",
            format.values
        )));
    }
    Ok(elements / format.values * format.bytes)
}

/// Unpacks whole blocks.
pub fn dequantize(name: &str, kind: u32, packed: &[u8]) -> Result<Vec<f32>, ModelError> {
    let format = format(name, kind)?;
    let mut values = vec![0.0; packed.len() / format.bytes * format.values];
    let blocks = packed.chunks_exact(format.bytes).zip(values.chunks_exact_mut(format.values));
    blocks.for_each(|(block, out)| (format.unpack)(block, out));
    Ok(values)
}

pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn f32_value(block: &[u8], out: &mut [f32]) {
    out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
}

fn f16_value(block: &[u8], out: &mut [f32]) {
    out[0] = half_at(block, 0);
}

fn bf16_value(block: &[u8], out: &mut [f32]) {
    out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32();
}

/// The 4-bit number `index` of 32: 16 low nibbles, then 16 high ones.
pub(super) fn nibble(packed: &[u8], index: usize) -> u8 {
    if index < 16 { packed[index] & 0xf } else { packed[index - 16] >> 4 }
}

/// The fifth bit of number `index`, as 0 or 16.
fn fifth_bit(block: &[u8], at: usize, index: usize) -> u8 {
    (block[at + index / 8] >> (index % 8) & 1) << 4
}

fn q4_0(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 0);
    for (index, out) in out.iter_mut().enumerate() {
        *out = (f32::from(nibble(&block[2..], index)) - 8.0) * scale;
    }
}

fn q4_1(block: &[u8], out: &mut [f32]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    for (index, out) in out.iter_mut().enumerate() {
        *out = f32::from(nibble(&block[4..], index)) * scale + minimum;
    }
}

fn q5_0(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 0);
    for (index, out) in out.iter_mut().enumerate() {
        let number = nibble(&block[6..], index) | fifth_bit(block, 2, index);
        *out = (f32::from(number) - 16.0) * scale;
    }
}

fn q5_1(block: &[u8], out: &mut [f32]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    for (index, out) in out.iter_mut().enumerate() {
        let number = nibble(&block[8..], index) | fifth_bit(block, 4, index);
        *out = f32::from(number) * scale + minimum;
    }
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 0);
    for (byte, out) in block[2..].iter().zip(out) {
        *out = f32::from(*byte as i8) * scale;
    }
}

/// Scale and minimum of sub-block `index` of 8, 6 bits each, packed into 12 bytes.
pub(super) fn sub_scale(packed: &[u8], index: usize) -> (f32, f32) {
    let (scale, minimum) = if index < 4 {
        (packed[index] & 63, packed[index + 4] & 63)
    } else {
        let low = packed[index + 4];
        ((low & 0xf) | ((packed[index - 4] >> 6) << 4), (low >> 4) | ((packed[index] >> 6) << 4))
    };
    (scale.into(), minimum.into())
}

/// Q4_K and Q5_K: eight sub-blocks of 32; `high_bit` gives the fifth bit (0 or 16) or nothing.
fn sub_blocks(block: &[u8], numbers: &[u8], out: &mut [f32], high_bit: impl Fn(usize, usize) -> u8) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    for (index, out) in out.chunks_exact_mut(32).enumerate() {
        let (sub, sub_minimum) = sub_scale(&block[4..16], index);
        let shift = 4 * (index % 2);
        let numbers = &numbers[index / 2 * 32..];
        for (position, out) in out.iter_mut().enumerate() {
            let number = (numbers[position] >> shift & 0xf) | high_bit(index, position);
            *out = scale * sub * f32::from(number) - minimum * sub_minimum;
        }
    }
}

fn q4_k(block: &[u8], out: &mut [f32]) {
    sub_blocks(block, &block[16..], out, |_, _| 0);
}

fn q5_k(block: &[u8], out: &mut [f32]) {
    let high = &block[16..48];
    sub_blocks(block, &block[48..], out, |index, position| (high[position] >> index & 1) << 4);
}

/// Two halves of 128 values; 4 low bits, 2 high bits, an 8-bit scale for 16 values each.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 208);
    for (index, out) in out.iter_mut().enumerate() {
        let (half, within) = (index / 128, index % 128);
        let (quarter, position) = (within / 32, within % 32);
        let low = block[half * 64 + position + 32 * (quarter % 2)] >> (4 * (quarter / 2)) & 0xf;
        let high = block[128 + half * 32 + position] >> (2 * quarter) & 3;
        let sub = f32::from(block[192 + half * 8 + 2 * quarter + position / 16] as i8);
        *out = scale * sub * (f32::from(low | high << 4) - 32.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn half_bytes(value: f32) -> [u8; 2] {
        f16::from_f32(value).to_le_bytes()
    }

    /// Bytes 0x10, 0x32, 0x54, …: low nibbles even, high nibbles odd.
    fn nibbles() -> Vec<u8> {
        (0..16u8).map(|index| (index % 8 * 2) | ((index % 8 * 2 + 1) << 4)).collect()
    }

    fn unpack(kind: u32, block: &[u8]) -> Vec<f32> {
        assert_eq!(format("t", kind).unwrap().bytes, block.len());
        dequantize("t", kind, block).unwrap()
    }

    #[test]
    fn blocks_of_32_unpack_low_nibbles_first() {
        let q4_0 = unpack(2, &[&half_bytes(0.5)[..], &nibbles()].concat());
        assert_eq!(q4_0[..3], [-4.0, -3.0, -2.0]);
        assert_eq!(q4_0[16..19], [-3.5, -2.5, -1.5]);
        let q4_1 = unpack(3, &[&half_bytes(0.5)[..], &half_bytes(10.0), &nibbles()].concat());
        assert_eq!(q4_1[..2], [10.0, 11.0]);
        assert_eq!(q4_1[16..18], [10.5, 11.5]);
    }

    #[test]
    fn the_fifth_bit_adds_sixteen() {
        let bits = [0b10, 0, 0b1, 0];
        let q5_0 = unpack(6, &[&half_bytes(1.0)[..], &bits, &nibbles()].concat());
        assert_eq!(q5_0[..3], [-16.0, 2.0, -12.0]);
        assert_eq!(q5_0[16..18], [1.0, -13.0]);
        let q5_1 = unpack(7, &[&half_bytes(1.0)[..], &half_bytes(0.0), &bits, &nibbles()].concat());
        assert_eq!(q5_1[..3], [0.0, 18.0, 4.0]);
        assert_eq!(q5_1[16..18], [17.0, 3.0]);
    }

    #[test]
    fn eight_bit_blocks_are_signed() {
        let mut block = half_bytes(0.25).to_vec();
        block.extend((0..32).map(|index| (index - 16i8) as u8));
        assert_eq!(unpack(8, &block)[..2], [-4.0, -3.75]);
    }

    #[test]
    fn sub_block_scales_are_unpacked_from_six_bits() {
        let mut packed = [0u8; 12];
        packed[1] = 5 | (2 << 6); // scale 1 = 5; high bits of scale 5 = 2
        packed[5] = 7 | (3 << 6); // minimum 1 = 7; high bits of minimum 5 = 3
        packed[9] = 0x4b; // low bits: scale 5 = 11, minimum 5 = 4
        assert_eq!(sub_scale(&packed, 1), (5.0, 7.0));
        assert_eq!(sub_scale(&packed, 5), (43.0, 52.0));
    }

    #[test]
    fn super_blocks_apply_scale_and_minimum_per_sub_block() {
        let mut block = [&half_bytes(2.0)[..], &half_bytes(1.0)].concat();
        let mut scales = [0u8; 12];
        scales[0] = 3;
        scales[4] = 1;
        block.extend(scales);
        block.extend([0x21; 128]);
        let values = unpack(12, &block);
        assert_eq!(values[0], 2.0 * 3.0 * 1.0 - 1.0);
        assert_eq!(values[32], 0.0);
        let mut block = block[..16].to_vec();
        block.extend([0b1; 32]);
        block.extend([0x21; 128]);
        assert_eq!(unpack(13, &block)[0], 2.0 * 3.0 * 17.0 - 1.0);
    }

    #[test]
    fn six_bit_blocks_join_low_and_high_bits() {
        let mut block = vec![0x21; 128];
        block.extend([0b11_10_01_00; 64]);
        block.extend((1..=16).map(|scale| scale as u8));
        block.extend(half_bytes(0.5));
        let values = unpack(14, &block);
        assert_eq!(values[0], 0.5 * 1.0 * (1.0 - 32.0));
        assert_eq!(values[32], 0.5 * 3.0 * (1.0 + 16.0 - 32.0));
        assert_eq!(values[64 + 16], 0.5 * 6.0 * (2.0 + 32.0 - 32.0));
        assert_eq!(values[128 + 96], 0.5 * 15.0 * (2.0 + 48.0 - 32.0));
    }

    #[test]
    fn unknown_types_and_partial_blocks_are_refused() {
        assert!(matches!(packed_length("t", 99, 32), Err(ModelError::UnsupportedType { .. })));
        assert!(matches!(packed_length("t", 2, 33), Err(ModelError::Gguf(_))));
    }
}
