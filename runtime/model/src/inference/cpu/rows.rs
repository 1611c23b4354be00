//! What is done to the numbers of one token between projections.

use super::isa::{Isa, Lanes};

const LANES: usize = 8;

/// RMS normalisation (Zhang and Sennrich 2019) of `x`, times `weight`.
/// # Safety
/// The slices are equally long; the machine has the instruction set.
#[inline(always)]
pub unsafe fn normalize<I: Isa>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let whole = x.len() / LANES * LANES;
    let mut squares = I::F::zero();
    for at in (0..whole).step_by(LANES) {
        // SAFETY: within the slice.
        let lanes = unsafe { I::F::load(x.as_ptr().add(at)) };
        squares = lanes.fused(lanes, squares);
    }
    let rest: f32 = x[whole..].iter().map(|value| value * value).sum();
    let factor = ((squares.sum() + rest) / x.len() as f32 + eps).sqrt().recip();
    for at in (0..whole).step_by(LANES) {
        // SAFETY: within the slices.
        unsafe {
            let scaled = I::F::load(x.as_ptr().add(at)).mul(I::F::splat(factor));
            scaled.mul(I::F::load(weight.as_ptr().add(at))).store(out.as_mut_ptr().add(at));
        }
    }
    for at in whole..x.len() {
        out[at] = x[at] * factor * weight[at];
    }
}

/// SwiGLU (Shazeer 2020): `silu(gate) · up` of a row that holds gate and up one after the other.
/// # Safety
/// `gate_up` is twice as long as `out`; the machine has the instruction set.
#[inline(always)]
pub unsafe fn gate<I: Isa>(gate_up: &[f32], out: &mut [f32]) {
    let (gate, up) = gate_up.split_at(out.len());
    let whole = out.len() / LANES * LANES;
    let one = I::F::splat(1.0);
    for at in (0..whole).step_by(LANES) {
        // SAFETY: within the slices.
        unsafe {
            let x = I::F::load(gate.as_ptr().add(at));
            let silu = x.div(one.add(x.mul(I::F::splat(-1.0)).exp()));
            silu.mul(I::F::load(up.as_ptr().add(at))).store(out.as_mut_ptr().add(at));
        }
    }
    for at in whole..out.len() {
        out[at] = gate[at] / (1.0 + (-gate[at]).exp()) * up[at];
    }
}

/// Rotates one head in place, pairing unit `i` with `i + head_dim / 2` as Hugging Face does.
/// `cos_sin` holds the cosines of the position, then the sines.
#[inline(always)]
pub fn rotate(head: &mut [f32], cos_sin: &[f32]) {
    let half = head.len() / 2;
    let (cos, sin) = cos_sin.split_at(half);
    let (low, high) = head.split_at_mut(half);
    for index in 0..half {
        let (a, b) = (low[index], high[index]);
        low[index] = a * cos[index] - b * sin[index];
        high[index] = b * cos[index] + a * sin[index];
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::{InstructionSet, dispatch};
    use super::*;

    unsafe fn both<I: Isa>(x: &[f32], weight: &[f32], out: &mut [f32], gated: &mut [f32]) {
        // SAFETY: lengths fit, see below.
        unsafe {
            normalize::<I>(x, weight, 1e-5, out);
            gate::<I>(x, gated);
        }
    }

    #[test]
    fn the_fast_rows_are_those_of_plain_arithmetic() {
        for length in [6usize, 16, 22, 64] {
            let x: Vec<f32> = (0..length).map(|index| (index as f32 * 0.7).sin() * 4.0).collect();
            let weight: Vec<f32> = (0..length).map(|index| 1.0 + index as f32 / 100.0).collect();
            let (mut out, mut gated) = (vec![0.0; length], vec![0.0; length / 2]);
            {
                let (x, weight, out, gated) = (&x[..], &weight[..], &mut out[..], &mut gated[..]);
                // SAFETY: the set was detected; the slices are as long as they must be.
                unsafe {
                    dispatch!(
                        InstructionSet::detect(),
                        both(x: &[f32], weight: &[f32], out: &mut [f32], gated: &mut [f32])
                    );
                }
            }
            let mean = x.iter().map(|value| f64::from(value * value)).sum::<f64>() / length as f64;
            for index in 0..length {
                let expected = f64::from(x[index]) / (mean + 1e-5).sqrt() * f64::from(weight[index]);
                assert!((f64::from(out[index]) - expected).abs() < 1e-5);
            }
            for index in 0..length / 2 {
                let (a, b) = (f64::from(x[index]), f64::from(x[index + length / 2]));
                assert!((f64::from(gated[index]) - a / (1.0 + (-a).exp()) * b).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn a_quarter_turn_moves_the_first_half_to_the_second() {
        let mut head = [1.0, 2.0, 3.0, 4.0];
        rotate(&mut head, &[0.0, 0.0, 1.0, 1.0]);
        assert_eq!(head, [-3.0, -4.0, 1.0, 2.0]);
    }
}
