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

/// Applies one update.
pub fn adamw(slot: Slot<'_>, gradient: &[f32], update: Update) {
    let count = i32::try_from(update.count).unwrap_or(i32::MAX);
    let step_size = (update.learning_rate / (1.0 - BETA1.powi(count))) as f32;
    let second_root = (1.0 - BETA2.powi(count)).sqrt() as f32;
    let keep = (1.0 - update.learning_rate * update.weight_decay) as f32;
    let (beta2, one_less_beta1, one_less_beta2) = (BETA2 as f32, (1.0 - BETA1) as f32, (1.0 - BETA2) as f32);
    let state = slot.weights.iter_mut().zip(slot.first).zip(slot.second);
    for (((weight, first), second), gradient) in state.zip(gradient) {
        let gradient = gradient * update.scale;
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
    fn norms_and_clipping() {
        let gradient: Vec<f32> = (1..=20).map(|i| i as f32).collect();
        assert_eq!(squared_norm(&gradient), 2870.0);
        assert_eq!(clip_scale(0.5, 1.0), 1.0);
        assert!((clip_scale(4.0, 1.0) - 0.25).abs() < 1e-6);
    }
}
