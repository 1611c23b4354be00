//! Conversations that say nearly what another said: MinHash sketches of their word 5-grams, looked
//! up in bands (Broder, "On the resemblance and containment of documents", 1997).
//!
//! About 500 bytes are kept of each conversation, whatever its length.

use super::{Candidate, Reason, Step, Verdict};
use crate::conversation::Turn;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// Words that are taken together.
const SHINGLE_WORDS: usize = 5;
/// Shorter conversations are not compared: one changed word there says something else.
const LEAST_WORDS: usize = 40;
const HASHES: usize = 128;
const BANDS: usize = 16;
const ROWS: usize = HASHES / BANDS;
/// Of [`HASHES`], how many must agree: an estimated resemblance of 0.85.
const AGREEING: usize = 109;
/// Sketches of one allocation, so that growing never copies all of them.
const CHUNK: usize = 4096;

/// The low halves of the least hashes: an eighth of the memory, and they agree by chance once in 65,536.
type Sketch = [u16; HASHES];

pub struct NearDuplicates {
    /// For each band: its hash in some conversation, and the number of the first that had it.
    bands: Vec<HashMap<u32, u32>>,
    sketches: Vec<Vec<Sketch>>,
    ids: Vec<Box<str>>,
}

impl NearDuplicates {
    pub fn new() -> Self {
        Self { bands: vec![HashMap::new(); BANDS], sketches: Vec::new(), ids: Vec::new() }
    }

    fn like(&self, sketch: &Sketch, bands: &[u32; BANDS]) -> Option<usize> {
        let candidates = self.bands.iter().zip(bands).filter_map(|(band, hash)| band.get(hash));
        let mut candidates = candidates.map(|number| *number as usize);
        candidates.find(|number| agreeing(sketch, &self.sketches[number / CHUNK][number % CHUNK]) >= AGREEING)
    }

    fn remember(&mut self, id: &str, sketch: Sketch, bands: &[u32; BANDS]) {
        let number = self.ids.len();
        if number.is_multiple_of(CHUNK) {
            self.sketches.push(Vec::with_capacity(CHUNK));
        }
        if let Some(chunk) = self.sketches.last_mut() {
            chunk.push(sketch);
        }
        self.ids.push(id.into());
        for (band, hash) in self.bands.iter_mut().zip(bands) {
            if let Entry::Vacant(free) = band.entry(*hash) {
                free.insert(number as u32);
            }
        }
    }
}

impl Step for NearDuplicates {
    fn name(&self) -> &'static str {
        "near duplicates"
    }

    fn apply(&mut self, candidate: &mut Candidate) -> Verdict {
        let words = words(candidate.conversation.exchange());
        if words.len() < LEAST_WORDS {
            return Verdict::Unchanged;
        }
        let (sketch, bands) = sketch(&words);
        if let Some(number) = self.like(&sketch, &bands) {
            let detail = Some(format!("like {}", self.ids[number]));
            return Verdict::Dropped(Reason { why: "nearly the same is there already".into(), detail });
        }
        self.remember(&candidate.conversation.id, sketch, &bands);
        Verdict::Unchanged
    }
}

/// A hash of each word, without case and punctuation.
fn words(turns: &[Turn]) -> Vec<u64> {
    let words = turns.iter().flat_map(|turn| turn.content.split(|letter: char| !letter.is_alphanumeric()));
    words.filter(|word| !word.is_empty()).map(word_hash).collect()
}

fn word_hash(word: &str) -> u64 {
    let letters = word.chars().flat_map(char::to_lowercase);
    letters.fold(0x9e37_79b9_7f4a_7c15, |hash, letter| mixed(hash ^ u64::from(letter)))
}

/// The finaliser of SplitMix64: each bit of the result depends on each bit of `word`.
fn mixed(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

fn sketch(words: &[u64]) -> (Sketch, [u32; BANDS]) {
    let mut least = [u32::MAX; HASHES];
    let seeds: [u64; HASHES] = std::array::from_fn(|index| mixed(index as u64 + 1) | 1);
    for shingle in words.windows(SHINGLE_WORDS) {
        let hash = shingle.iter().fold(0u64, |hash, word| mixed(hash.rotate_left(5) ^ word));
        for (least, seed) in least.iter_mut().zip(&seeds) {
            *least = (*least).min((hash.wrapping_mul(*seed) >> 32) as u32);
        }
    }
    let bands = std::array::from_fn(|band| {
        let rows = &least[band * ROWS..(band + 1) * ROWS];
        (rows.iter().fold(band as u64, |hash, row| mixed(hash.rotate_left(7) ^ u64::from(*row))) >> 32) as u32
    });
    (least.map(|hash| hash as u16), bands)
}

fn agreeing(one: &Sketch, other: &Sketch) -> usize {
    one.iter().zip(other).filter(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clean::tests::{S, candidate};

    /// Words that are the same for the same seed.
    fn text(seed: u64, words: usize) -> Vec<String> {
        (0..words as u64).map(|index| format!("w{}", mixed(seed * 1000 + index) % 5000)).collect()
    }

    fn kept(step: &mut NearDuplicates, words: &[String]) -> bool {
        step.apply(&mut candidate(&[S::Human("Tell me"), S::Bot(&words.join(" "))])) == Verdict::Unchanged
    }

    #[test]
    fn a_few_changed_words_make_no_other_conversation() {
        let mut step = NearDuplicates::new();
        let mut original = text(1, 400);
        assert!(kept(&mut step, &original));
        original[7] = "changed".to_owned();
        original[300] = "CHANGED,".to_owned();
        let mut again = candidate(&[S::Human("tell ME!"), S::Bot(&original.join("  "))]);
        let Verdict::Dropped(reason) = step.apply(&mut again) else { panic!("it was kept") };
        assert_eq!(reason.detail.as_deref(), Some("like id"));
    }

    #[test]
    fn different_texts_and_half_changed_ones_are_kept() {
        let mut step = NearDuplicates::new();
        let original = text(1, 400);
        assert!(kept(&mut step, &original));
        let half = [&original[..200], &text(2, 200)[..]].concat();
        assert!(kept(&mut step, &half));
        assert!((3..200).all(|seed| kept(&mut step, &text(seed, 60))));
    }

    #[test]
    fn short_conversations_are_not_compared() {
        let mut step = NearDuplicates::new();
        assert!(kept(&mut step, &text(1, 20)) && kept(&mut step, &text(1, 20)));
    }

    #[test]
    fn the_estimate_is_near_the_resemblance() {
        let original = text(9, 2000);
        let changed: Vec<String> = original
            .iter()
            .enumerate()
            .map(|(at, word)| if at % 50 == 0 { format!("x{at}") } else { word.clone() })
            .collect();
        let of = |words: &[String]| sketch(&words.iter().map(|word| word_hash(word)).collect::<Vec<_>>()).0;
        // Each changed word is in 5 of 50 shingles: 45 common ones of 55.
        let estimate = agreeing(&of(&original), &of(&changed)) as f64 / HASHES as f64;
        assert!((estimate - 45.0 / 55.0).abs() < 0.12, "{estimate}");
    }
}
