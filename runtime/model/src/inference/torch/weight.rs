//! Weights of projections as a GPU holds them: whole, or as integers, in a half or a quarter of the memory. They save room, not
//! time: 8 bits are made bf16 for each step, 4 bits are multiplied with by torch's own kernel, which many rows make slow.

use crate::ModelError;
use crate::layers::linear;
use tch::{Device, Kind, Tensor};

/// Weights of a row that share scale and minimum in 4 bits.
const GROUP: i64 = 32;

/// What a weight is rounded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    Eight,
    Four,
}

/// Where weights are, in what precision activations are, and what projections are rounded to.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub device: Device,
    pub kind: Kind,
    pub bits: Option<Bits>,
}

/// `[out, in]`.
#[derive(Debug)]
pub enum Weight {
    Whole(Tensor),
    /// Codes `[out, in]`, a scale for each row `[out]`.
    Int8 {
        codes: Tensor,
        scales: Tensor,
    },
    /// Codes as torch's kernel has them, scales and middles `[in / GROUP, out, 2]`: a weight is `(code - 8) · scale + middle`.
    Int4 {
        codes: Tensor,
        scales: Tensor,
    },
}

impl Weight {
    /// Of a tensor in any precision; one whose sides do not fit the blocks of the 4-bit kernel is held in 8 bits.
    pub fn new(tensor: &Tensor, place: Place) -> Result<Self, ModelError> {
        let Place { device, kind, bits } = place;
        let tensor = tensor.f_to_device(device)?.detach();
        let (out, width) = tensor.size2()?;
        match bits {
            None => Ok(Self::Whole(tensor.f_to_kind(kind)?)),
            Some(Bits::Four) if device.is_cuda() && out % 8 == 0 && width % GROUP == 0 => {
                let weight = int4(&tensor.f_to_kind(Kind::Float)?, kind)?;
                // Older cards lack the kernel, which is better known now than in the midst of a stream.
                drop(weight.try_of(&Tensor::f_zeros([1, width], (kind, device))?)?);
                Ok(weight)
            }
            Some(_) => int8(&tensor.f_to_kind(Kind::Float)?, kind),
        }
    }

    /// `x [rows, in]` times the weight: `[rows, out]`.
    #[expect(
        clippy::expect_used,
        reason = "new has tried it: what is left is running out of memory, as in all of a pass"
    )]
    pub fn of(&self, x: &Tensor) -> Tensor {
        self.try_of(x).expect("a product")
    }

    fn try_of(&self, x: &Tensor) -> Result<Tensor, tch::TchError> {
        match self {
            Self::Whole(weight) => Ok(linear(x, weight)),
            // Codes are exact in bf16. (torch has a kernel for them, which took ten times as long on an H200.)
            Self::Int8 { codes, scales } => Ok(linear(x, &codes.f_to_kind(x.kind())?) * scales),
            Self::Int4 { codes, scales } => x.f_internal_weight_int4pack_mm(codes, GROUP, scales),
        }
    }
}

/// 127 is a row's largest.
fn int8(tensor: &Tensor, kind: Kind) -> Result<Weight, ModelError> {
    let scales = (tensor.f_abs()?.f_amax([1], true)? / 127.0).f_to_kind(kind)?.f_to_kind(Kind::Float)?;
    let divisors = scales.f_where_self(&scales.f_gt(0.0)?, &scales.f_ones_like()?)?;
    let codes = (tensor / divisors).f_round()?.f_clamp(-127.0, 127.0)?.f_to_kind(Kind::Int8)?;
    Ok(Weight::Int8 { codes, scales: scales.f_squeeze_dim(1)?.f_to_kind(kind)? })
}

/// Each group's range in 15 equal steps.
fn int4(tensor: &Tensor, kind: Kind) -> Result<Weight, ModelError> {
    let (out, width) = tensor.size2()?;
    let (codes, scales, middles) = rounded_to_four(tensor, kind)?;
    // Two codes a byte, the earlier one in the upper half.
    let pairs = codes.f_view([out, width / 2, 2])?;
    let packed = pairs.f_select(2, 0)?.f_mul_scalar(16)?.f_add(&pairs.f_select(2, 1)?)?.f_to_kind(Kind::Uint8)?;
    let tiles = [8, 4, 2].into_iter().find(|tiles| width % (16 * tiles) == 0).unwrap_or(2);
    let scales = Tensor::f_stack(&[scales, middles], 2)?.f_transpose(0, 1)?.f_contiguous()?;
    Ok(Weight::Int4 { codes: packed.f_internal_convert_weight_to_int4pack(tiles)?, scales })
}

/// Codes `[out, in]` from 0 to 15, scales and middles `[out, in / GROUP]`.
fn rounded_to_four(tensor: &Tensor, kind: Kind) -> Result<(Tensor, Tensor, Tensor), ModelError> {
    let (out, width) = tensor.size2()?;
    let groups = tensor.f_view([out, width / GROUP, GROUP])?;
    let (least, most) = (groups.f_amin([2], true)?, groups.f_amax([2], true)?);
    // Codes are chosen for the very scales that they are multiplied with.
    let as_held = |tensor: Tensor| tensor.f_to_kind(kind)?.f_to_kind(Kind::Float);
    let scales = as_held((most - &least) / 15.0)?;
    let middles = as_held(least + &scales * 8.0)?;
    let divisors = scales.f_where_self(&scales.f_gt(0.0)?, &scales.f_ones_like()?)?;
    let codes = ((groups - &middles) / divisors + 8.0).f_round()?.f_clamp(0.0, 15.0)?.f_view([out, width])?;
    let flat = |tensor: Tensor| tensor.f_squeeze_dim(2)?.f_to_kind(kind);
    Ok((codes.f_to_kind(Kind::Int)?, flat(scales)?, flat(middles)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(shape: [i64; 2]) -> Tensor {
        tch::manual_seed(7);
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    fn relative_error(found: &Tensor, expected: &Tensor) -> f64 {
        let norm = |tensor: &Tensor| tensor.to_kind(Kind::Float).norm().double_value(&[]);
        norm(&(found - expected)) / norm(expected)
    }

    #[test]
    fn a_weight_in_eight_bits_multiplies_nearly_as_the_whole_one() {
        let (tensor, x) = (random([48, 64]), random([5, 64]));
        let place = Place { device: Device::Cpu, kind: Kind::Float, bits: Some(Bits::Eight) };
        let weight = Weight::new(&tensor, place).unwrap();
        assert!(matches!(weight, Weight::Int8 { .. }));
        let error = relative_error(&weight.of(&x), &linear(&x, &tensor));
        assert!(error > 0.0 && error < 0.01, "{error}");
        let zeros = Weight::new(&tensor.zeros_like(), place).unwrap();
        assert_eq!(zeros.of(&x).abs().max().double_value(&[]), 0.0);
    }

    #[test]
    fn four_bits_are_within_half_a_step_of_each_group() {
        let tensor = random([16, 64]);
        let (codes, scales, middles) = rounded_to_four(&tensor, Kind::BFloat16).unwrap();
        let wide = |tensor: &Tensor| tensor.to_kind(Kind::Float).unsqueeze(2);
        let (scales, middles) = (wide(&scales), wide(&middles));
        let again = (codes.view([16, 2, GROUP]) - 8.0) * &scales + &middles;
        let far = (again - tensor.view([16, 2, GROUP])).abs() / &scales;
        // Half a step, and what bf16 has rounded of the ends.
        assert!(far.max().double_value(&[]) < 0.6, "{}", far.max().double_value(&[]));
        assert!(codes.min().int64_value(&[]) == 0 && codes.max().int64_value(&[]) == 15);
    }

    #[test]
    #[ignore = "needs a CUDA GPU"]
    fn a_gpu_multiplies_with_the_codes_that_were_chosen() {
        // First: torch looks for GPUs when it is first asked for anything, and its CUDA library has to be there by then.
        let device = crate::device::open(Some("cuda")).unwrap();
        let tensor = random([256, 512]);
        for (bits, allowed) in [(Bits::Eight, 0.02), (Bits::Four, 0.13)] {
            let weight = Weight::new(&tensor, Place { device, kind: Kind::BFloat16, bits: Some(bits) }).unwrap();
            assert_eq!(matches!(weight, Weight::Int4 { .. }), bits == Bits::Four);
            for rows in [1, 3, 32, 33, 200] {
                let x = random([rows, 512]);
                let found = weight.of(&x.to_device(device).to_kind(Kind::BFloat16)).to_device(Device::Cpu);
                let error = relative_error(&found.to_kind(Kind::Float), &linear(&x, &tensor));
                assert!(error > 0.0 && error < allowed, "{bits:?}, {rows} rows: {error}");
            }
        }
    }
}
