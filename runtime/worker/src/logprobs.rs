//! Log probabilities of tokens, as the model gives them: before temperature, penalties and grammar.

use crate::detokenize::TokenBytes;
use vicuna_protocol::inference::TokenLogprob;

/// As many alternatives as OpenAI allows.
pub const MAX_ALTERNATIVES: u32 = 20;

/// `token` and the `count` likeliest by these logits `[V]`, likeliest first.
pub fn scored(logits: &[f32], token: u32, count: u32, bytes: &TokenBytes) -> TokenLogprob {
    let shift = log_sum(logits);
    let one = |id: u32| TokenLogprob {
        token: id,
        bytes: bytes.get(id).to_vec(),
        logprob: logits.get(id as usize).map_or(0.0, |logit| (f64::from(*logit) - shift) as f32),
        top: Vec::new(),
    };
    TokenLogprob { top: likeliest(logits, count as usize).into_iter().map(one).collect(), ..one(token) }
}

/// A prompt's first token, which nothing predicts.
pub fn unscored(token: u32, bytes: &TokenBytes) -> TokenLogprob {
    TokenLogprob { token, bytes: bytes.get(token).to_vec(), ..TokenLogprob::default() }
}

/// ln Σ e^logit.
fn log_sum(logits: &[f32]) -> f64 {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - highest).exp())).sum();
    f64::from(highest) + sum.ln()
}

/// Ids of the highest logits; equal ones by id.
fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    let rank = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if count == 0 {
        return Vec::new();
    }
    if count < ids.len() {
        ids.select_nth_unstable_by(count - 1, rank);
        ids.truncate(count);
    }
    ids.sort_unstable_by(rank);
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_add_up_and_the_likeliest_come_first() {
        let bytes = TokenBytes::of(&vicuna_model::tiny::tokenizer(), &[]);
        let logits: Vec<f32> = (0..50).map(|id| ((id * 37) % 50) as f32 / 10.0).collect();
        let all = scored(&logits, 7, 50, &bytes);
        let total: f64 = all.top.iter().map(|entry| f64::from(entry.logprob).exp()).sum();
        assert!((total - 1.0).abs() < 1e-5, "{total}");
        assert!(all.top.windows(2).all(|pair| pair[0].logprob >= pair[1].logprob));
        assert_eq!(all.top.iter().find(|entry| entry.token == 7).unwrap().logprob, all.logprob);
        let few = scored(&logits, 7, 3, &bytes);
        assert_eq!(few.top, all.top[..3]);
        assert_eq!(few.bytes, bytes.get(7));
        assert!(scored(&logits, 7, 0, &bytes).top.is_empty());
    }
}
