//! Which sequence is in which step: a pure function of (seed, epoch), so that any rank can start at
//! any step and no sequence is skipped or repeated.

use serde::{Deserialize, Serialize};

/// A place in the run: `offset` sequences of `epoch` are done. Both count from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    pub epoch: u64,
    pub offset: u64,
}

/// How long to train.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    Epochs(u32),
    Steps(u64),
}

/// One dataset's part in an epoch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mixture {
    /// Sequences in the dataset.
    pub sequences: u32,
    /// How often it is seen in an epoch: 2.5 is every sequence twice and half of them, another half
    /// in each epoch, once more.
    pub weight: f64,
}

#[derive(Debug, thiserror::Error, PartialEq)]
pub enum OrderError {
    #[error("dataset {dataset} has weight {weight}: give a number of at least 0 and at most 1000")]
    Weight { dataset: usize, weight: f64 },
    #[error("an epoch has no sequences: give a dataset that is not empty a weight above 0")]
    Empty,
    #[error("an epoch has {0} sequences, more than 2^32: lower the weights")]
    TooLong(u64),
    #[error("globalBatch is 0: a step needs at least one sequence")]
    NoBatch,
}

/// The order of all sequences of a run. Sequences are numbered through all datasets, in their order.
#[derive(Clone, Debug)]
pub struct Order {
    seed: u64,
    global_batch: u32,
    length: Length,
    parts: Vec<Part>,
    per_epoch: u64,
}

#[derive(Clone, Copy, Debug)]
struct Part {
    first: u32,
    sequences: u32,
    whole: u32,
    extra: u32,
}

impl Part {
    fn per_epoch(&self) -> u64 {
        u64::from(self.whole) * u64::from(self.sequences) + u64::from(self.extra)
    }
}

const MOST_REPETITIONS: f64 = 1000.0;

impl Order {
    pub fn new(seed: u64, global_batch: u32, length: Length, datasets: &[Mixture]) -> Result<Self, OrderError> {
        let mut parts = Vec::with_capacity(datasets.len());
        let mut first = 0u32;
        for (dataset, mixture) in datasets.iter().enumerate() {
            parts.push(part(dataset, first, mixture)?);
            let next = u64::from(first) + u64::from(mixture.sequences);
            first = u32::try_from(next).map_err(|_| OrderError::TooLong(next))?;
        }
        let per_epoch = parts.iter().map(Part::per_epoch).sum();
        match (per_epoch, global_batch) {
            (0, _) => Err(OrderError::Empty),
            (_, 0) => Err(OrderError::NoBatch),
            (1..=0xffff_ffff, _) => Ok(Self { seed, global_batch, length, parts, per_epoch }),
            _ => Err(OrderError::TooLong(per_epoch)),
        }
    }

    /// Sequences in an epoch: the same in each.
    pub fn per_epoch(&self) -> u64 {
        self.per_epoch
    }

    /// Steps in the run.
    pub fn steps(&self) -> u64 {
        match self.length {
            Length::Epochs(epochs) => steps(self.per_epoch, self.global_batch, epochs),
            Length::Steps(steps) => steps,
        }
    }

    /// Where the run stands after `step` steps, 0 being the start.
    pub fn cursor(&self, step: u64) -> Cursor {
        let done = self.sequences_until(step);
        Cursor { epoch: done / self.per_epoch, offset: done % self.per_epoch }
    }

    /// Epochs done after `step` steps, with the fraction of the current one.
    pub fn epochs_done(&self, step: u64) -> f64 {
        self.sequences_until(step) as f64 / self.per_epoch as f64
    }

    /// The sequences of a step, which count from 1. `globalBatch` of them, except that the last step
    /// of a run in epochs may have fewer; none outside the run.
    pub fn step(&self, step: u64) -> Vec<u32> {
        let (from, to) = match step {
            0 => (0, 0),
            _ => (self.sequences_until(step - 1), self.sequences_until(step)),
        };
        let mut batch = Vec::with_capacity((to - from) as usize);
        let mut at = from;
        while at < to {
            let (epoch, offset) = (at / self.per_epoch, at % self.per_epoch);
            let take = (to - at).min(self.per_epoch - offset);
            let order = self.epoch(epoch);
            batch.extend_from_slice(&order[offset as usize..(offset + take) as usize]);
            at += take;
        }
        batch
    }

    /// The sequences of an epoch (which count from 0) in order.
    pub fn epoch(&self, epoch: u64) -> Vec<u32> {
        let mut sequences = Vec::with_capacity(self.per_epoch as usize);
        for (index, part) in self.parts.iter().enumerate() {
            let all = part.first..part.first + part.sequences;
            for _ in 0..part.whole {
                sequences.extend(all.clone());
            }
            if part.extra > 0 {
                let mut extra: Vec<u32> = all.collect();
                shuffle(&mut extra, self.stream(epoch, 1 + index as u64));
                sequences.extend_from_slice(&extra[..part.extra as usize]);
            }
        }
        shuffle(&mut sequences, self.stream(epoch, 0));
        sequences
    }

    fn sequences_until(&self, step: u64) -> u64 {
        let wanted = step.min(self.steps()) * u64::from(self.global_batch);
        match self.length {
            Length::Epochs(epochs) => wanted.min(self.per_epoch * u64::from(epochs)),
            Length::Steps(_) => wanted,
        }
    }

    /// Random bytes for one purpose in one epoch.
    fn stream(&self, epoch: u64, purpose: u64) -> blake3::OutputReader {
        let mut hasher = blake3::Hasher::new_derive_key("vicuna-operator 2026 order of sequences");
        for word in [self.seed, epoch, purpose] {
            hasher.update(&word.to_le_bytes());
        }
        hasher.finalize_xof()
    }
}

fn part(dataset: usize, first: u32, mixture: &Mixture) -> Result<Part, OrderError> {
    let weight = mixture.weight;
    if !(0.0..=MOST_REPETITIONS).contains(&weight) {
        return Err(OrderError::Weight { dataset, weight });
    }
    Ok(Part {
        first,
        sequences: mixture.sequences,
        whole: weight.floor() as u32,
        extra: (weight.fract() * f64::from(mixture.sequences)).round() as u32,
    })
}

/// Steps in which `epochs` times `per_epoch` sequences pass, the last one perhaps not full.
pub fn steps(per_epoch: u64, global_batch: u32, epochs: u32) -> u64 {
    (per_epoch * u64::from(epochs)).div_ceil(u64::from(global_batch.max(1)))
}

/// Fisher and Yates; the bias of the multiplication is below 2^-32.
fn shuffle(items: &mut [u32], mut random: blake3::OutputReader) {
    for last in (1..items.len()).rev() {
        let mut word = [0u8; 8];
        random.fill(&mut word);
        let wide = u128::from(u64::from_le_bytes(word)) * (last as u128 + 1);
        items.swap(last, (wide >> 64) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn once(sequences: u32) -> Mixture {
        Mixture { sequences, weight: 1.0 }
    }

    fn counts(order: &Order) -> HashMap<u32, usize> {
        let mut counts = HashMap::new();
        for step in 1..=order.steps() {
            for sequence in order.step(step) {
                *counts.entry(sequence).or_default() += 1;
            }
        }
        counts
    }

    proptest! {
        #[test]
        fn no_sequence_is_skipped_or_repeated(
            seed: u64, sequences in 1u32..60, batch in 1u32..20, epochs in 1u32..4,
        ) {
            let order = Order::new(seed, batch, Length::Epochs(epochs), &[once(sequences)]).unwrap();
            let counts = counts(&order);
            prop_assert_eq!(counts.len() as u32, sequences);
            prop_assert!(counts.values().all(|count| *count == epochs as usize));
        }

        #[test]
        fn every_set_is_seen_by_its_weight_whatever_the_others(
            seed: u64,
            sets in proptest::collection::vec((1u32..30, 0u32..=12), 1..5),
            batch in 1u32..9,
            epochs in 1u32..4,
        ) {
            let mixtures: Vec<_> = sets
                .iter()
                .map(|(sequences, quarters)| Mixture { sequences: *sequences, weight: f64::from(*quarters) / 4.0 })
                .collect();
            let Ok(order) = Order::new(seed, batch, Length::Epochs(epochs), &mixtures) else {
                prop_assert!(mixtures.iter().all(|set| (set.weight * f64::from(set.sequences)).round() == 0.0));
                return Ok(());
            };
            let seen: Vec<u32> = (1..=order.steps()).flat_map(|step| order.step(step)).collect();
            let whole: Vec<u32> = (0..u64::from(epochs)).flat_map(|epoch| order.epoch(epoch)).collect();
            prop_assert_eq!(&seen, &whole);
            let mut first = 0;
            for set in &mixtures {
                let of_set = seen.iter().filter(|sequence| (first..first + set.sequences).contains(*sequence)).count();
                let whole = set.weight.floor() * f64::from(set.sequences);
                let extra = (set.weight.fract() * f64::from(set.sequences)).round();
                prop_assert_eq!(of_set as f64, (whole + extra) * f64::from(epochs));
                first += set.sequences;
            }
        }

        #[test]
        fn a_step_is_what_lies_between_its_cursors(seed: u64, sequences in 1u32..30, step in 1u64..50) {
            let order = Order::new(seed, 4, Length::Steps(50), &[once(sequences)]).unwrap();
            let before = order.cursor(step - 1);
            let batch = order.step(step);
            prop_assert_eq!(batch.len(), 4);
            prop_assert_eq!(batch[0], order.epoch(before.epoch)[before.offset as usize]);
        }
    }

    #[test]
    fn a_fraction_is_another_part_of_the_set_in_each_epoch() {
        let sets = [once(10), Mixture { sequences: 20, weight: 1.5 }];
        let order = Order::new(7, 8, Length::Epochs(1), &sets).unwrap();
        assert_eq!(order.per_epoch(), 40);
        let twice = |epoch| -> Vec<u32> {
            let all = order.epoch(epoch);
            (10..30).filter(|sequence| all.iter().filter(|other| *other == sequence).count() == 2).collect()
        };
        assert_eq!(twice(0).len(), 10);
        assert_ne!(twice(0), twice(1));
        assert_eq!(twice(0), twice(0));
    }

    #[test]
    fn epochs_and_seeds_differ() {
        let order = |seed| Order::new(seed, 1, Length::Epochs(2), &[once(100)]).unwrap();
        assert_ne!(order(1).epoch(0), order(1).epoch(1));
        assert_ne!(order(1).epoch(0), order(2).epoch(0));
    }

    #[test]
    fn the_last_step_of_an_epoch_run_may_be_short_and_nothing_follows_it() {
        let order = Order::new(1, 4, Length::Epochs(1), &[once(10)]).unwrap();
        assert_eq!(order.steps(), 3);
        let sizes: Vec<_> = (0..5).map(|step| order.step(step).len()).collect();
        assert_eq!(sizes, [0, 4, 4, 2, 0]);
        assert_eq!(order.cursor(3), Cursor { epoch: 1, offset: 0 });
    }

    #[test]
    fn impossible_orders_are_refused() {
        let refused = |batch, set| Order::new(0, batch, Length::Epochs(1), &[set]).unwrap_err();
        assert_eq!(refused(4, once(0)), OrderError::Empty);
        assert_eq!(refused(0, once(1)), OrderError::NoBatch);
        let negative = Mixture { sequences: 1, weight: -1.0 };
        assert!(matches!(refused(4, negative), OrderError::Weight { .. }));
    }
}
