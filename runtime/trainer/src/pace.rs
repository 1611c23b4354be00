//! Who runs how many micro-batches: shares follow measured speed.
//!
//! Every rank publishes with its commit how long its micro-batches took, so that all know the same
//! figures and cut the next step alike. The cut never touches a bit of the result: sums follow the
//! canonical tree whatever it is.

use std::ops::Range;

/// Weight of the newest measurement.
const WEIGHT: f64 = 0.3;
/// A new cut must promise to be this much faster than the present one.
const GAIN: f64 = 0.9;

/// Measured speed of every rank of a generation.
#[derive(Clone, Debug, PartialEq)]
pub struct Pace {
    /// Seconds a micro-batch, by rank; `None` until it has run one.
    seconds: Vec<Option<f64>>,
    counts: Vec<u32>,
}

impl Pace {
    /// Even shares until something is known.
    pub fn new(world: usize) -> Self {
        Self { seconds: vec![None; world], counts: Vec::new() }
    }

    /// The micro-batches of every rank, contiguous and in rank order.
    pub fn shares(&mut self, micro_batches: u32) -> Vec<Range<u32>> {
        let world = self.seconds.len();
        if self.counts.iter().sum::<u32>() != micro_batches || self.counts.len() != world {
            self.counts = even(micro_batches, world);
        }
        if let Some(seconds) = self.known() {
            let better = fastest(micro_batches, &seconds);
            if longest(&better, &seconds) < GAIN * longest(&self.counts, &seconds) {
                self.counts = better;
            }
        }
        ranges(&self.counts)
    }

    /// Shares of a pass of its own, which leaves the steps' shares as they are.
    pub fn shares_apart(&self, micro_batches: u32) -> Vec<Range<u32>> {
        let counts = match self.known() {
            Some(seconds) => fastest(micro_batches, &seconds),
            None => even(micro_batches, self.seconds.len()),
        };
        ranges(&counts)
    }

    /// Seconds a micro-batch, once all ranks have run one.
    fn known(&self) -> Option<Vec<f64>> {
        self.seconds.iter().copied().collect()
    }

    /// Takes what a step's commit says: seconds that each rank computed for.
    pub fn learn(&mut self, computed: &[f64]) {
        for ((known, computed), count) in self.seconds.iter_mut().zip(computed).zip(&self.counts) {
            let each = computed / f64::from(*count);
            if each.is_finite() && each > 0.0 {
                *known = Some(known.map_or(each, |known| known + WEIGHT * (each - known)));
            }
        }
    }
}

/// Contiguous ranges of these lengths, from 0.
fn ranges(counts: &[u32]) -> Vec<Range<u32>> {
    let mut start = 0;
    let range = |count: &u32| {
        let range = start..start + count;
        start = range.end;
        range
    };
    counts.iter().map(range).collect()
}

fn even(micro_batches: u32, world: usize) -> Vec<u32> {
    let bound = |rank: usize| (u64::from(micro_batches) * rank as u64 / world as u64) as u32;
    (0..world).map(|rank| bound(rank + 1) - bound(rank)).collect()
}

/// How long the slowest rank takes.
fn longest(counts: &[u32], seconds: &[f64]) -> f64 {
    counts.iter().zip(seconds).map(|(count, seconds)| f64::from(*count) * seconds).fold(0.0, f64::max)
}

/// Gives micro-batch after micro-batch to whoever would be done with it first, which is optimal for
/// equal pieces. Each rank runs at least one if there are enough, so that it stays measured.
fn fastest(micro_batches: u32, seconds: &[f64]) -> Vec<u32> {
    let world = seconds.len() as u32;
    let least = u32::from(micro_batches >= world);
    let mut counts = vec![least; seconds.len()];
    for _ in least * world..micro_batches {
        let done = |rank: &usize| f64::from(counts[*rank] + 1) * seconds[*rank];
        if let Some(first) = (0..seconds.len()).min_by(|a, b| done(a).total_cmp(&done(b))) {
            counts[first] += 1;
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sizes(shares: &[Range<u32>]) -> Vec<usize> {
        shares.iter().map(ExactSizeIterator::len).collect()
    }

    #[test]
    fn shares_are_even_until_something_is_measured() {
        let mut pace = Pace::new(3);
        assert_eq!(pace.shares(8), [0..2, 2..5, 5..8]);
        assert_eq!(pace.shares(2), [0..0, 0..1, 1..2]);
    }

    #[test]
    fn a_rank_three_times_slower_does_not_make_the_step_three_times_longer() {
        let mut pace = Pace::new(2);
        pace.shares(16);
        pace.learn(&[8.0, 24.0]);
        let shares = pace.shares(16);
        assert_eq!(sizes(&shares), [12, 4]);
        assert_eq!(longest(&[12, 4], &[1.0, 3.0]), 12.0);
    }

    #[test]
    fn small_differences_move_nothing() {
        let mut pace = Pace::new(2);
        pace.shares(16);
        pace.learn(&[8.0, 8.6]);
        assert_eq!(sizes(&pace.shares(16)), [8, 8]);
    }

    #[test]
    fn a_rank_without_micro_batches_is_not_measured() {
        let mut pace = Pace::new(3);
        pace.shares(2);
        pace.learn(&[0.0, 1.0, 1.0]);
        assert_eq!(pace.seconds, [None, Some(1.0), Some(1.0)]);
    }

    proptest! {
        #[test]
        fn every_micro_batch_is_run_once(count in 0u32..200, seconds in prop::collection::vec(0.01f64..100.0, 1..9)) {
            let mut pace = Pace::new(seconds.len());
            for _ in 0..3 {
                let shares = pace.shares(count);
                prop_assert_eq!(shares[0].start, 0);
                prop_assert_eq!(shares[shares.len() - 1].end, count);
                prop_assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start));
                if count >= seconds.len() as u32 {
                    prop_assert!(shares.iter().all(|share| !share.is_empty()));
                }
                let computed: Vec<f64> = shares.iter().zip(&seconds).map(|(share, s)| share.len() as f64 * s).collect();
                pace.learn(&computed);
            }
        }
    }
}
