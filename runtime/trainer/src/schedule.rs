//! The learning rate as a function of the step.

use vicuna_protocol::job::{Recipe, Schedule};

/// Learning rate of `step`, which counts from 1 to `steps`. It rises linearly from 0 and reaches the
/// peak with the last step of the warm-up; then it falls so that it would reach 0 one step after the
/// last: no step is spent at a rate of 0.
pub fn learning_rate(recipe: &Recipe, step: u64, steps: u64) -> f64 {
    let warmup = (recipe.warmup_ratio * steps as f64).ceil() as u64;
    if step <= warmup {
        return recipe.learning_rate * step as f64 / warmup as f64;
    }
    let progress = (step - 1).saturating_sub(warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
    let progress = progress.min(1.0);
    let factor = match recipe.schedule {
        Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        Schedule::Linear => 1.0 - progress,
        Schedule::Constant => 1.0,
    };
    recipe.learning_rate * factor
}

#[cfg(test)]
mod tests {
    use super::*;
    use vicuna_protocol::job::{Method, Parameters, Precision, Recompute, Reproducibility, RunLength};

    fn recipe(schedule: Schedule, warmup_ratio: f64) -> Recipe {
        Recipe {
            method: Method::Full,
            global_batch: 4,
            micro_batch: 1,
            length: RunLength::Steps(100),
            learning_rate: 2.0,
            schedule,
            warmup_ratio,
            weight_decay: 0.0,
            gradient_clip: 1.0,
            max_length: 64,
            seed: 0,
            evaluate_every: None,
            precision: Precision::Fp32,
            recompute: Recompute::Auto,
            parameters: Parameters::Auto,
            offload: false,
            packing: false,
            rope_scaling: None,
            reproducibility: Reproducibility::default(),
        }
    }

    #[test]
    fn it_rises_to_the_peak_and_falls() {
        let rate = |schedule, step| learning_rate(&recipe(schedule, 0.1), step, 100);
        assert_eq!(rate(Schedule::Cosine, 1), 0.2);
        assert_eq!(rate(Schedule::Cosine, 10), 2.0);
        assert_eq!(rate(Schedule::Cosine, 11), 2.0);
        assert!((rate(Schedule::Cosine, 56) - 1.0).abs() < 1e-12);
        assert!((rate(Schedule::Linear, 56) - 1.0).abs() < 1e-12);
        assert_eq!(rate(Schedule::Constant, 100), 2.0);
        assert!(rate(Schedule::Cosine, 100) > 0.0);
        assert!(rate(Schedule::Linear, 100) < 0.03);
    }

    #[test]
    fn without_warmup_the_first_step_has_the_peak() {
        assert_eq!(learning_rate(&recipe(Schedule::Linear, 0.0), 1, 100), 2.0);
        assert_eq!(learning_rate(&recipe(Schedule::Cosine, 1.0), 100, 100), 2.0);
    }
}
