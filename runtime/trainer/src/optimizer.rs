//! AdamW (Loshchilov and Hutter 2019) on fp32 slices.
//!
//! Plain IEEE arithmetic in a fixed order, without fused multiply-adds, so that any machine computes
//! the same bits. Moments and weights are rounded exactly where PyTorch's single-tensor AdamW does.

/// What one update needs besides the state.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    pub learning_rate: f64,
    pub weight_decay: f64,
    /// Factor on the gradient, from clipping.
    pub scale: f32,
    /// Updates including this one, for the bias correction.
    pub count: u64,
}

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f32 = 1e-8;

/// Weights and moments of some elements.
#[derive(Debug)]
pub struct Slot<'a> {
    pub weights: &'a mut [f32],
    pub first: &'a mut [f32],
    pub second: &'a mut [f32],
}

/// What is the same for all elements.
#[derive(Clone, Copy)]
struct Factors {
    scale: f32,
    step_size: f32,
    second_root: f32,
    keep: f32,
}

/// Applies one update.
pub fn adamw(slot: Slot<'_>, gradient: &[f32], update: Update) {
    let count = i32::try_from(update.count).unwrap_or(i32::MAX);
    let factors = Factors {
        scale: update.scale,
        step_size: (update.learning_rate / (1.0 - BETA1.powi(count))) as f32,
        second_root: (1.0 - BETA2.powi(count)).sqrt() as f32,
        keep: (1.0 - update.learning_rate * update.weight_decay) as f32,
    };
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has it.
        return unsafe { apply_wide(slot, gradient, factors) };
    }
    apply(slot, gradient, factors);
}

/// Four times as fast: compilers leave square roots of four numbers at a time alone, and take those of eight. Each
/// operation rounds as it does on one number.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn apply_wide(slot: Slot<'_>, gradient: &[f32], factors: Factors) {
    apply(slot, gradient, factors);
}

#[inline(always)]
fn apply(slot: Slot<'_>, gradient: &[f32], Factors { scale, step_size, second_root, keep }: Factors) {
    let (beta2, one_less_beta1, one_less_beta2) = (BETA2 as f32, (1.0 - BETA1) as f32, (1.0 - BETA2) as f32);
    let state = slot.weights.iter_mut().zip(slot.first).zip(slot.second);
    for (((weight, first), second), gradient) in state.zip(gradient) {
        let gradient = gradient * scale;
        *first += (gradient - *first) * one_less_beta1;
        *second = *second * beta2 + one_less_beta2 * gradient * gradient;
        let denominator = second.sqrt() / second_root + EPSILON;
        *weight = *weight * keep - step_size * (*first / denominator);
    }
}

/// Sum of squares in fp64, eight interleaved lanes, the lanes added in order.
pub fn squared_norm(gradient: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    for chunk in gradient.chunks(8) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*value) * f64::from(*value);
        }
    }
    lanes.iter().sum()
}

/// The factor that brings a gradient of this global norm down to `clip` (PyTorch's
/// `clip_grad_norm_`); 1 if it is short enough.
pub fn clip_scale(norm: f64, clip: f64) -> f32 {
    (clip / (norm + 1e-6)).min(1.0) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::nn::OptimizerConfig;
    use tch::{Device, Tensor, nn};

    #[test]
    fn it_follows_torchs_adamw() {
        let start: Vec<f32> = (0..50).map(|i| (i as f32 * 0.37).sin()).collect();
        let variables = nn::VarStore::new(Device::Cpu);
        let theirs = variables.root().var_copy("w", &Tensor::from_slice(&start));
        let config = nn::AdamW { beta1: BETA1, beta2: BETA2, wd: 0.1, eps: 1e-8, amsgrad: false };
        let mut optimizer = config.build(&variables, 0.01).unwrap();
        let (mut weights, mut first, mut second) = (start, vec![0f32; 50], vec![0f32; 50]);
        for count in 1..=20 {
            let gradient: Vec<f32> = (0..50).map(|i| ((i * count) as f32 * 0.11).cos() * 3.0).collect();
            optimizer.zero_grad();
            (&theirs * Tensor::from_slice(&gradient)).sum(tch::Kind::Float).backward();
            optimizer.step();
            let update = Update { learning_rate: 0.01, weight_decay: 0.1, scale: 1.0, count: count as u64 };
            let slot = Slot { weights: &mut weights, first: &mut first, second: &mut second };
            adamw(slot, &gradient, update);
        }
        let ours = Tensor::from_slice(&weights);
        let difference = (ours - &theirs).abs().max().double_value(&[]);
        assert!(difference < 1e-6, "{difference}");
    }

    #[test]
    fn the_first_update_is_the_learning_rate_in_the_gradients_direction() {
        let (mut weights, mut first, mut second) = ([1.0f32, 1.0], [0f32; 2], [0f32; 2]);
        let slot = Slot { weights: &mut weights, first: &mut first, second: &mut second };
        adamw(slot, &[8.0, -0.5], Update { learning_rate: 0.25, weight_decay: 0.0, scale: 0.5, count: 1 });
        assert!((weights[0] - 0.75).abs() < 1e-6 && (weights[1] - 1.25).abs() < 1e-6, "{weights:?}");
        assert!((first[0] - 0.4).abs() < 1e-6 && (second[0] - 0.016).abs() < 1e-6);
    }

    #[test]
    fn elements_are_updated_to_the_same_bits_together_and_alone() {
        let value = |seed: f32| (0..53).map(|i| (i as f32 * seed).sin()).collect::<Vec<f32>>();
        let (weights, first, gradient) = (value(0.37), value(0.11), value(0.71));
        let second: Vec<f32> = value(0.53).iter().map(|value| value * value).collect();
        let update = Update { learning_rate: 1e-3, weight_decay: 0.1, scale: 0.3, count: 7 };
        let run = |range: std::ops::Range<usize>| {
            let part = |all: &[f32]| all[range.clone()].to_vec();
            let [mut weights, mut first, mut second] = [part(&weights), part(&first), part(&second)];
            let slot = Slot { weights: &mut weights, first: &mut first, second: &mut second };
            adamw(slot, &gradient[range], update);
            [weights, first, second].map(|values| values.into_iter().map(f32::to_bits).collect::<Vec<_>>())
        };
        let together = run(0..53);
        for (part, together) in together.iter().enumerate() {
            let alone: Vec<u32> = (0..53).flat_map(|i| run(i..i + 1)[part].clone()).collect();
            assert_eq!(alone, *together);
        }
    }

    #[test]
    fn norms_and_clipping() {
        let gradient: Vec<f32> = (1..=20).map(|i| i as f32).collect();
        assert_eq!(squared_norm(&gradient), 2870.0);
        assert_eq!(clip_scale(0.5, 1.0), 1.0);
        assert!((clip_scale(4.0, 1.0) - 0.25).abs() < 1e-6);
    }
}
