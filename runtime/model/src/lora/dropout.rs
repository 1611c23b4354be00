//! Dropout from counters instead of a generator's state (after Salmon et al. 2011): whoever computes a
//! micro-batch, in whatever world and however often, drops the same elements.

use tch::{Device, Kind, Tensor};

/// SplitMix64's increment and multipliers (Steele et al. 2014).
const INCREMENT: u64 = 0x9e37_79b9_7f4a_7c15;
const FIRST: u64 = 0xbf58_476d_1ce4_e5b9;
const SECOND: u64 = 0x94d0_49bb_1331_11eb;
/// Bits that are compared with the probability.
const BITS: u32 = 24;

/// Where a mask is used: everything that it depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Share of the elements that become 0, from 0 to below 1.
    pub probability: f64,
    pub seed: u64,
    pub step: u64,
    /// Number of the micro-batch within the step.
    pub micro_batch: u64,
    pub layer: u64,
}

impl Dropout {
    /// Factors for the elements of an input of projection `target`: 0, or what keeps the mean.
    /// Computed with integers, so that every device comes to the same.
    pub fn factors(&self, target: u64, shape: &[i64], kind: Kind, device: Device) -> Tensor {
        let key = key(self.seed, &[self.step, self.micro_batch, self.layer, target]);
        let threshold = (self.probability * f64::from(1u32 << BITS)) as i64;
        let kept = 1.0 / (1.0 - self.probability);
        let bits = mixed(key, shape.iter().product(), device);
        let top = bits.bitwise_right_shift_tensor_scalar(64 - i64::from(BITS)).bitwise_and((1i64 << BITS) - 1);
        (top.ge(threshold).to_kind(kind) * kept).view(shape)
    }
}

/// One number for a seed and counters.
pub(super) fn key(seed: u64, counters: &[u64]) -> u64 {
    counters.iter().fold(mix(seed, 0), |key, counter| mix(key, *counter))
}

/// SplitMix64's number `index` of the stream `key`.
pub(super) fn mix(key: u64, index: u64) -> u64 {
    let mut z = key.wrapping_add(index.wrapping_add(1).wrapping_mul(INCREMENT));
    z = (z ^ (z >> 30)).wrapping_mul(FIRST);
    z = (z ^ (z >> 27)).wrapping_mul(SECOND);
    z ^ (z >> 31)
}

/// [`mix`] for indexes `0..count`, as int64 with the same bits.
fn mixed(key: u64, count: i64, device: Device) -> Tensor {
    let mut z =
        (Tensor::arange(count, (Kind::Int64, device)) + 1i64).g_mul_scalar_(INCREMENT as i64).g_add_scalar_(key as i64);
    for (shift, multiplier) in [(30, FIRST), (27, SECOND)] {
        z = folded(z, shift).g_mul_scalar_(multiplier as i64);
    }
    folded(z, 31)
}

/// `z ^ (z >> shift)`; torch's shift brings the sign in, which does not belong there.
fn folded(mut z: Tensor, shift: i64) -> Tensor {
    let shifted = z.bitwise_right_shift_tensor_scalar(shift).bitwise_and_((1i64 << (64 - shift)) - 1);
    z.bitwise_xor_tensor_(&shifted)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Dropout = Dropout { probability: 0.25, seed: 3, step: 7, micro_batch: 2, layer: 1 };

    fn factors(dropout: Dropout, target: u64) -> Tensor {
        dropout.factors(target, &[4, 50, 64], Kind::Float, Device::Cpu)
    }

    #[test]
    fn tensors_and_numbers_are_mixed_to_the_same_bits() {
        let ours: Vec<i64> = Vec::try_from(mixed(0xfeed_face_dead_beef, 1000, Device::Cpu)).unwrap();
        let expected: Vec<i64> = (0..1000).map(|index| mix(0xfeed_face_dead_beef, index) as i64).collect();
        assert_eq!(ours, expected);
    }

    #[test]
    fn the_share_is_dropped_and_the_mean_is_kept() {
        let factors = factors(HERE, 0);
        let dropped = factors.eq(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        assert!((dropped - 0.25).abs() < 0.01, "{dropped}");
        assert!((factors.max().double_value(&[]) - 4.0 / 3.0).abs() < 1e-6);
    }

    #[test]
    fn every_counter_changes_the_mask_and_nothing_else_does() {
        let here = factors(HERE, 0);
        assert_eq!(here, factors(HERE, 0));
        assert_ne!(here, factors(HERE, 1));
        for other in [
            Dropout { seed: 4, ..HERE },
            Dropout { step: 8, ..HERE },
            Dropout { micro_batch: 3, ..HERE },
            Dropout { layer: 2, ..HERE },
        ] {
            let equal = here.eq_tensor(&factors(other, 0)).to_kind(Kind::Double).mean(Kind::Double);
            // Independent masks agree in 0.75² + 0.25² of the elements.
            assert!((equal.double_value(&[]) - 0.625).abs() < 0.02, "{other:?}");
        }
    }
}
