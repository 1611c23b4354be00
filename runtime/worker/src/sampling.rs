//! The next token, as a pure function of logits, history and (seed, choice, position): the same on
//! every worker and after every resume. Sampling by temperature is an argmax over logits plus
//! Gumbel noise (Gumbel 1954; Maddison et al. 2014), so that no state of a generator has to move.

use std::collections::{HashMap, HashSet};
use vicuna_protocol::inference::Sampling;

/// Tokens that one request may bias.
const MAX_BIASES: usize = 4096;

/// How one completion samples.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f32,
    /// In (0, 1]; 1 keeps all.
    top_p: f32,
    /// 0 keeps all.
    top_k: usize,
    /// Share of the likeliest token's probability that keeps a token; 0 keeps all.
    min_p: f32,
    frequency_penalty: f32,
    presence_penalty: f32,
    /// 1 for none.
    repetition_penalty: f32,
    biases: Vec<(u32, f32)>,
    seed: u64,
    choice: u32,
}

/// The tokens before the next one, as the penalties want them.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Of the completion.
    pub counts: HashMap<u32, u32>,
    /// Of the prompt; empty unless there is a repetition penalty.
    pub prompt: HashSet<u32>,
}

impl Sampler {
    /// The reason why not, in words for the client.
    pub fn new(sampling: &Sampling, choice: u32) -> Result<Self, String> {
        let within = |name: &str, value: f32, low: f32, high: f32| {
            let fits = (low..=high).contains(&value);
            fits.then_some(value).ok_or_else(|| format!("{name} is {value}; it must be from {low} to {high}"))
        };
        let one_if_zero = |value: f32| if value == 0.0 { 1.0 } else { value };
        Ok(Self {
            temperature: within("temperature", sampling.temperature, 0.0, 100.0)?,
            top_p: one_if_zero(within("top_p", sampling.top_p, 0.0, 1.0)?),
            top_k: sampling.top_k as usize,
            min_p: within("min_p", sampling.min_p, 0.0, 1.0)?,
            frequency_penalty: within("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)?,
            presence_penalty: within("presence_penalty", sampling.presence_penalty, -2.0, 2.0)?,
            repetition_penalty: one_if_zero(within("repetition_penalty", sampling.repetition_penalty, 0.0, 10.0)?),
            biases: biases(&sampling.logit_bias)?,
            seed: sampling.seed,
            choice,
        })
    }

    /// Whether [`History::prompt`] is needed.
    pub fn looks_at_the_prompt(&self) -> bool {
        self.repetition_penalty != 1.0
    }

    /// Chooses the token at `position` of the completion. `None` if the logits are not numbers. Ties
    /// go to the smaller id.
    pub fn choose(&self, logits: &mut [f32], history: &History, position: u32) -> Option<u32> {
        self.penalize(logits, history);
        let (best, highest) = likeliest(logits)?;
        if self.temperature == 0.0 {
            return Some(best);
        }
        let noise = Noise::new(self.seed, self.choice, position);
        if self.keeps_all() {
            return noise.winner(logits.iter().copied().enumerate(), highest, self.temperature);
        }
        noise.winner(self.candidates(logits, highest).into_iter(), highest, self.temperature)
    }

    /// Biases; penalties of OpenAI for tokens that the completion has, and CTRL's (Keskar et al.
    /// 2019) for tokens that prompt or completion have.
    fn penalize(&self, logits: &mut [f32], history: &History) {
        if self.looks_at_the_prompt() {
            let completion = history.counts.keys().filter(|id| !history.prompt.contains(id));
            for id in history.prompt.iter().chain(completion) {
                if let Some(logit) = logits.get_mut(*id as usize) {
                    let factor = if *logit > 0.0 { self.repetition_penalty.recip() } else { self.repetition_penalty };
                    *logit *= factor;
                }
            }
        }
        if self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 {
            for (id, count) in &history.counts {
                if let Some(logit) = logits.get_mut(*id as usize) {
                    *logit -= self.presence_penalty + self.frequency_penalty * *count as f32;
                }
            }
        }
        for (id, bias) in &self.biases {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit += bias;
            }
        }
    }

    fn keeps_all(&self) -> bool {
        self.top_k == 0 && self.top_p == 1.0 && self.min_p == 0.0
    }

    /// Ids and logits that top-k, top-p and min-p leave (Fan et al. 2018; Holtzman et al. 2020;
    /// Nguyen et al. 2024).
    fn candidates(&self, logits: &[f32], highest: f32) -> Vec<(usize, f32)> {
        // -∞ where everything stays.
        let least = highest + self.temperature * self.min_p.ln();
        let mut all: Vec<(usize, f32)> =
            logits.iter().copied().enumerate().filter(|(_, logit)| *logit >= least).collect();
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

/// In the order of ids, so that equal requests add alike.
fn biases(map: &HashMap<u32, f32>) -> Result<Vec<(u32, f32)>, String> {
    if map.len() > MAX_BIASES {
        return Err(format!("logit_bias names {} tokens; at most {MAX_BIASES} are allowed", map.len()));
    }
    if let Some((id, bias)) = map.iter().find(|(_, bias)| !(-100.0..=100.0).contains(*bias)) {
        return Err(format!("logit_bias of token {id} is {bias}; it must be from -100 to 100"));
    }
    let mut biases: Vec<(u32, f32)> = map.iter().map(|(id, bias)| (*id, *bias)).collect();
    biases.sort_unstable_by_key(|(id, _)| *id);
    Ok(biases)
}

/// Higher logits first, then smaller ids.
fn by_rank(a: &(usize, f32), b: &(usize, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The first of the highest; `None` if there is a NaN or no finite number.
fn likeliest(logits: &[f32]) -> Option<(u32, f32)> {
    const LANES: usize = 16;
    let mut highest = [f32::NEG_INFINITY; LANES];
    let mut broken = [false; LANES];
    let (whole, rest) = logits.as_chunks::<LANES>();
    for chunk in whole {
        for lane in 0..LANES {
            highest[lane] = if chunk[lane] > highest[lane] { chunk[lane] } else { highest[lane] };
            broken[lane] |= chunk[lane].is_nan();
        }
    }
    if broken.contains(&true) || rest.iter().any(|logit| logit.is_nan()) {
        return None;
    }
    let highest = highest.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    let best = logits.iter().position(|logit| *logit == highest)?;
    highest.is_finite().then_some((best as u32, highest))
}

/// Of one position: a number for each token, from (seed, choice, position, token) alone.
struct Noise(u64);

impl Noise {
    fn new(seed: u64, choice: u32, position: u32) -> Self {
        let state = mix(mix(seed) ^ u64::from(choice));
        Self(mix(state ^ u64::from(position)))
    }

    /// In (0, 1), never either end.
    fn uniform(&self, token: u32) -> f64 {
        let state = mix(self.0 ^ u64::from(token));
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// The token with the highest `logit / temperature` plus Gumbel noise -ln(-ln u). That is the
    /// one with the least -ln u · e^((highest - logit) / temperature), which needs far fewer
    /// logarithms: -ln u is at least 1 - u, and most tokens lose by that alone.
    fn winner(&self, tokens: impl Iterator<Item = (usize, f32)>, highest: f32, temperature: f32) -> Option<u32> {
        let mut best = None;
        let mut least = f64::INFINITY;
        for (id, logit) in tokens {
            let uniform = self.uniform(id as u32);
            let behind = (highest - logit) / temperature;
            // The margin is for the rounding of the exponential in fp32.
            if (1.0 - uniform) * 0.999 > least * f64::from((-behind).exp()) {
                continue;
            }
            let value = -uniform.ln() * f64::from(behind).exp();
            if value < least {
                (least, best) = (value, Some(id as u32));
            }
        }
        best
    }
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
            .map(|position| sampler.choose(&mut logits.to_vec(), &History::default(), position).unwrap())
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
        let counts = History { counts: HashMap::from([(0, 2)]), ..History::default() };
        assert_eq!(greedy.choose(&mut [2.0, 0.0], &counts, 0), Some(1));
        assert_eq!(greedy.choose(&mut [2.6, 0.0], &counts, 0), Some(0));
    }

    #[test]
    fn tokens_of_prompt_and_completion_are_repeated_less() {
        let greedy = sampler(|sampling| {
            sampling.temperature = 0.0;
            sampling.repetition_penalty = 2.0;
        });
        assert!(greedy.looks_at_the_prompt());
        let history = History { counts: HashMap::from([(2, 1)]), prompt: HashSet::from([0, 2]) };
        let mut logits = [3.0, 1.6, -1.0, -1.5];
        assert_eq!(greedy.choose(&mut logits, &history, 0), Some(1));
        assert_eq!(logits, [1.5, 1.6, -2.0, -1.5]);
    }

    #[test]
    fn min_p_drops_what_is_unlikely_beside_the_likeliest() {
        let logits = [2.0f32, 1.5, 0.0, -3.0];
        let mut drawn = draw(&sampler(|sampling| sampling.min_p = 0.3), &logits, 2000);
        drawn.sort_unstable();
        drawn.dedup();
        assert_eq!(drawn, [0, 1]);
    }

    #[test]
    fn a_bias_makes_or_forbids_a_token() {
        let biased = sampler(|sampling| sampling.logit_bias = HashMap::from([(1, 100.0), (0, -100.0), (9999, 5.0)]));
        assert_eq!(draw(&biased, &[5.0, 0.0, 4.0], 50), [1; 50]);
        let many = (0..5000).map(|id| (id, 1.0)).collect();
        assert!(Sampler::new(&Sampling { logit_bias: many, ..Sampling::default() }, 0).is_err());
        let strong = HashMap::from([(7, 101.0)]);
        let message = Sampler::new(&Sampling { logit_bias: strong, ..Sampling::default() }, 0).unwrap_err();
        assert!(message.contains("token 7"), "{message}");
    }

    #[test]
    fn the_quick_choice_is_that_of_gumbel_noise() {
        let logits: Vec<f32> = (0..2000).map(|id| ((id * 7919) % 997) as f32 / 60.0).collect();
        let sampler = sampler(|sampling| sampling.temperature = 1.3);
        let gumbel = |position: u32, id: usize| {
            let uniform = Noise::new(11, 0, position).uniform(id as u32);
            f64::from(logits[id]) / f64::from(1.3f32) - (-uniform.ln()).ln()
        };
        for (position, drawn) in draw(&sampler, &logits, 200).into_iter().enumerate() {
            let score = |id: &usize| gumbel(position as u32, *id);
            let best = (0..logits.len()).max_by(|a, b| score(a).total_cmp(&score(b))).unwrap();
            assert_eq!(drawn as usize, best, "at {position}");
        }
    }

    #[test]
    fn logits_that_are_not_numbers_are_noticed() {
        assert_eq!(sampler(|_| {}).choose(&mut [0.0, f32::NAN], &History::default(), 0), None);
        let nothing = [f32::NEG_INFINITY; 20];
        assert_eq!(sampler(|_| {}).choose(&mut nothing.clone(), &History::default(), 0), None);
    }

    #[test]
    fn impossible_settings_are_refused_by_name() {
        let message = Sampler::new(&Sampling { top_p: 1.5, ..Sampling::default() }, 0).unwrap_err();
        assert!(message.contains("top_p is 1.5"), "{message}");
        assert!(Sampler::new(&Sampling { temperature: f32::NAN, ..Sampling::default() }, 0).is_err());
    }
}
