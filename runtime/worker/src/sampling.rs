//! The next token, as a pure function of logits, history and (seed, choice, position): the same on
//! every worker and after every resume. Sampling by temperature is an argmax over logits plus
//! Gumbel noise (Gumbel 1954; Maddison et al. 2014), so that no state of a generator has to move.

use std::collections::HashMap;
use vicuna_protocol::inference::Sampling;

/// How one completion samples.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f32,
    /// In (0, 1]; 1 keeps all.
    top_p: f32,
    /// 0 keeps all.
    top_k: usize,
    frequency_penalty: f32,
    presence_penalty: f32,
    seed: u64,
    choice: u32,
}

impl Sampler {
    /// The reason why not, in words for the client.
    pub fn new(sampling: &Sampling, choice: u32) -> Result<Self, String> {
        let within = |name: &str, value: f32, low: f32, high: f32| {
            let fits = (low..=high).contains(&value);
            fits.then_some(value).ok_or_else(|| format!("{name} is {value}; it must be from {low} to {high}"))
        };
        let top_p = within("top_p", sampling.top_p, 0.0, 1.0)?;
        Ok(Self {
            temperature: within("temperature", sampling.temperature, 0.0, 100.0)?,
            top_p: if top_p == 0.0 { 1.0 } else { top_p },
            top_k: sampling.top_k as usize,
            frequency_penalty: within("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)?,
            presence_penalty: within("presence_penalty", sampling.presence_penalty, -2.0, 2.0)?,
            seed: sampling.seed,
            choice,
        })
    }

    /// Chooses the token at `position` of the completion; `counts` are those of the tokens before
    /// it. `None` if the logits are not numbers. Ties go to the smaller id.
    pub fn choose(&self, logits: &mut [f32], counts: &HashMap<u32, u32>, position: u32) -> Option<u32> {
        self.penalize(logits, counts);
        let (best, highest) = argmax(logits.iter().copied().enumerate())?;
        if !highest.is_finite() || self.temperature == 0.0 {
            return highest.is_finite().then_some(best);
        }
        let noisy = |(id, logit): (usize, f32)| {
            let noise = gumbel(self.seed, self.choice, position, id as u32);
            (id, (f64::from(logit) / f64::from(self.temperature) + noise) as f32)
        };
        let candidates = self.candidates(logits, highest);
        argmax(candidates.into_iter().map(noisy)).map(|(id, _)| id)
    }

    /// OpenAI's penalties for tokens that the completion already has.
    fn penalize(&self, logits: &mut [f32], counts: &HashMap<u32, u32>) {
        for (id, count) in counts {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit -= self.presence_penalty + self.frequency_penalty * *count as f32;
            }
        }
    }

    /// Ids and logits that top-k and top-p leave (Fan et al. 2018; Holtzman et al. 2020).
    fn candidates(&self, logits: &[f32], highest: f32) -> Vec<(usize, f32)> {
        let mut all: Vec<(usize, f32)> = logits.iter().copied().enumerate().collect();
        if self.top_k > 0 && self.top_k < all.len() {
            all.select_nth_unstable_by(self.top_k - 1, by_rank);
            all.truncate(self.top_k);
        }
        if self.top_p < 1.0 { self.nucleus(all, highest) } else { all }
    }

    /// The likeliest tokens that together have probability `top_p`.
    fn nucleus(&self, mut all: Vec<(usize, f32)>, highest: f32) -> Vec<(usize, f32)> {
        let weight = |logit: f32| (f64::from(logit - highest) / f64::from(self.temperature)).exp();
        let total: f64 = all.iter().map(|(_, logit)| weight(*logit)).sum();
        // What is this unlikely cannot belong to it, all of it together: spares most of the sorting.
        let least = total * f64::from(1.0 - self.top_p) / all.len() as f64;
        all.retain(|(_, logit)| weight(*logit) >= least);
        all.sort_unstable_by(by_rank);
        let mut mass = 0.0;
        let needed = all.iter().take_while(|(_, logit)| {
            let missing = mass < f64::from(self.top_p) * total;
            mass += weight(*logit);
            missing
        });
        let count = needed.count().max(1);
        all.truncate(count);
        all
    }
}

/// Higher logits first, then smaller ids.
fn by_rank(a: &(usize, f32), b: &(usize, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The first of the highest; NaN counts as highest, so that the caller sees it.
fn argmax(values: impl Iterator<Item = (usize, f32)>) -> Option<(u32, f32)> {
    values.min_by(by_rank).map(|(id, value)| (id as u32, value))
}

/// Standard Gumbel noise for one token at one position.
fn gumbel(seed: u64, choice: u32, position: u32, token: u32) -> f64 {
    let mut state = mix(seed);
    state = mix(state ^ u64::from(choice));
    state = mix(state ^ u64::from(position));
    state = mix(state ^ u64::from(token));
    // In (0, 1), never either end.
    let uniform = ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    -(-uniform.ln()).ln()
}

/// SplitMix64's finaliser (Steele, Lea and Flood 2014).
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(change: impl FnOnce(&mut Sampling)) -> Sampler {
        let mut sampling = Sampling { temperature: 1.0, seed: 11, ..Sampling::default() };
        change(&mut sampling);
        Sampler::new(&sampling, 0).unwrap()
    }

    fn draw(sampler: &Sampler, logits: &[f32], positions: u32) -> Vec<u32> {
        (0..positions)
            .map(|position| sampler.choose(&mut logits.to_vec(), &HashMap::new(), position).unwrap())
            .collect()
    }

    fn share(drawn: &[u32], id: u32) -> f64 {
        drawn.iter().filter(|token| **token == id).count() as f64 / drawn.len() as f64
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [1.0f32, 0.0, -1.0, 2.0];
        let drawn = draw(&sampler(|_| {}), &logits, 40_000);
        let total: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        for (id, logit) in logits.iter().enumerate() {
            let expected = f64::from(*logit).exp() / total;
            assert!((share(&drawn, id as u32) - expected).abs() < 0.01, "token {id}");
        }
    }

    #[test]
    fn the_same_seed_repeats_and_another_seed_or_choice_differs() {
        let logits = vec![0.0; 50];
        let first = draw(&sampler(|_| {}), &logits, 100);
        assert_eq!(first, draw(&sampler(|_| {}), &logits, 100));
        assert_ne!(first, draw(&sampler(|sampling| sampling.seed = 12), &logits, 100));
        let other = Sampler::new(&Sampling { temperature: 1.0, seed: 11, ..Sampling::default() }, 1).unwrap();
        assert_ne!(first, draw(&other, &logits, 100));
    }

    #[test]
    fn top_k_and_top_p_leave_only_the_likeliest() {
        let logits = [3.0f32, 2.9, 0.0, 2.8, -1.0];
        let kept = |sampler: Sampler| {
            let mut drawn = draw(&sampler, &logits, 2000);
            drawn.sort_unstable();
            drawn.dedup();
            drawn
        };
        assert_eq!(kept(sampler(|sampling| sampling.top_k = 2)), [0, 1]);
        assert_eq!(kept(sampler(|sampling| sampling.top_p = 0.6)), [0, 1]);
        assert_eq!(kept(sampler(|sampling| sampling.top_p = 0.01)), [0]);
        assert_eq!(kept(sampler(|sampling| sampling.top_p = 0.9)), [0, 1, 3]);
    }

    #[test]
    fn temperature_zero_is_greedy_and_ties_go_to_the_smaller_id() {
        let greedy = sampler(|sampling| sampling.temperature = 0.0);
        assert_eq!(draw(&greedy, &[0.5, 2.0, 2.0], 3), [1, 1, 1]);
    }

    #[test]
    fn penalties_push_repeated_tokens_back() {
        let greedy = sampler(|sampling| {
            sampling.temperature = 0.0;
            sampling.frequency_penalty = 1.0;
            sampling.presence_penalty = 0.5;
        });
        let counts = HashMap::from([(0, 2)]);
        assert_eq!(greedy.choose(&mut [2.0, 0.0], &counts, 0), Some(1));
        assert_eq!(greedy.choose(&mut [2.6, 0.0], &counts, 0), Some(0));
    }

    #[test]
    fn logits_that_are_not_numbers_are_noticed() {
        assert_eq!(sampler(|_| {}).choose(&mut [0.0, f32::NAN], &HashMap::new(), 0), None);
    }

    #[test]
    fn impossible_settings_are_refused_by_name() {
        let message = Sampler::new(&Sampling { top_p: 1.5, ..Sampling::default() }, 0).unwrap_err();
        assert!(message.contains("top_p is 1.5"), "{message}");
        assert!(Sampler::new(&Sampling { temperature: f32::NAN, ..Sampling::default() }, 0).is_err());
    }
}
