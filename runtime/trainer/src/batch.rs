//! Micro-batches: which sequences run together, and how they are padded.
//!
//! Shapes decide the last bits, so a micro-batch's shape is a function of its own sequences only.

use std::io;
use vicuna_data::template::IGNORED;
use vicuna_data::{Cursor, Example, Order, Sequences};

/// Lengths are rounded up to a multiple of this.
pub const LENGTH_STEP: usize = 16;
/// Raised when the rule changes: part of the numerics class.
pub const SHAPE_RULE: u32 = 1;

/// The encoded data and the order in which a run sees them.
#[derive(Debug)]
pub struct Dataset {
    examples: Sequences,
    order: Order,
    micro_batch: usize,
}

/// Sequences that run together: `rows` of `length` tokens each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MicroBatch {
    pub rows: usize,
    pub length: usize,
    /// Row-major; padded on the right with token 0, which no attention and no loss sees.
    pub ids: Vec<i64>,
    pub labels: Vec<i64>,
    /// Tokens of each sequence in each row, where any row has several: they do not see each other.
    pub packed: Option<Vec<Vec<usize>>>,
}

/// All of a step that does not need the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepPlan {
    pub step: u64,
    /// Sequence numbers of each micro-batch.
    pub micro_batches: Vec<Vec<u32>>,
    /// Tokens of the step, without padding.
    pub tokens: u64,
    /// Tokens whose prediction is learned: what the summed gradient is divided by.
    pub trained_tokens: u64,
}

impl Dataset {
    /// `examples` are numbered as `order` numbers its sequences. `micro_batch` is at least 1.
    pub fn new(examples: Sequences, order: Order, micro_batch: usize) -> Self {
        Self { examples, order, micro_batch: micro_batch.max(1) }
    }

    /// Steps in the run.
    pub fn steps(&self) -> u64 {
        self.order.steps()
    }

    /// Where the run stands after `step` steps.
    pub fn cursor(&self, step: u64) -> Cursor {
        self.order.cursor(step)
    }

    pub fn epochs_done(&self, step: u64) -> f64 {
        self.order.epochs_done(step)
    }

    /// The longest padded sequence.
    pub fn longest(&self) -> usize {
        padded_length(self.examples.longest())
    }

    /// Bytes that the examples take in memory.
    pub fn bytes(&self) -> u64 {
        self.examples.bytes()
    }

    /// What step `step` (from 1) consists of.
    pub fn plan(&self, step: u64) -> StepPlan {
        let sequences = self.order.step(step);
        let all = || sequences.iter().map(|number| *number as usize);
        StepPlan {
            step,
            tokens: all().map(|number| self.examples.tokens(number) as u64).sum(),
            trained_tokens: all().map(|number| self.examples.trained_tokens(number) as u64).sum(),
            micro_batches: sequences.chunks(self.micro_batch).map(<[u32]>::to_vec).collect(),
        }
    }

    /// Tokens of a micro-batch of these sequences, padding included.
    pub fn padded_tokens(&self, sequences: &[u32]) -> usize {
        let lengths = sequences.iter().map(|number| self.examples.tokens(*number as usize));
        sequences.len() * padded(lengths.max().unwrap_or(0))
    }

    /// Reads and pads the sequences of one micro-batch.
    pub fn micro_batch(&self, sequences: &[u32]) -> io::Result<MicroBatch> {
        let rows = sequences.iter().map(|number| self.examples.read(*number as usize));
        Ok(pad(&rows.collect::<io::Result<Vec<_>>>()?))
    }
}

/// A micro-batch of these sequences.
pub fn pad(rows: &[Example]) -> MicroBatch {
    let length = padded(rows.iter().map(|row| row.ids.len()).max().unwrap_or(0));
    let mut ids = vec![0; rows.len() * length];
    let mut labels = vec![IGNORED; rows.len() * length];
    for (row, example) in rows.iter().enumerate() {
        let at = row * length..row * length + example.ids.len();
        for (slot, id) in ids[at.clone()].iter_mut().zip(&example.ids) {
            *slot = i64::from(*id);
        }
        labels[at].copy_from_slice(&example.labels());
    }
    let several = rows.iter().any(|example| !example.ends.is_empty());
    let packed = several.then(|| rows.iter().map(|example| example.lengths().collect()).collect());
    MicroBatch { rows: rows.len(), length, ids, labels, packed }
}

/// Tokens of the longest sequence as it is padded; 0 if there is none.
pub fn padded_length(longest: usize) -> usize {
    if longest == 0 { 0 } else { padded(longest) }
}

fn padded(length: usize) -> usize {
    length.max(1).next_multiple_of(LENGTH_STEP)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vicuna_data::{Length, Mixture, SequencesWriter};

    fn dataset(lengths: &[usize]) -> Dataset {
        let example = |length: &usize| Example {
            ids: (1..=*length as u32).collect(),
            learned: std::iter::once(2..*length as u32).collect(),
            ends: Vec::new(),
        };
        let mut examples = SequencesWriter::create(&std::env::temp_dir()).unwrap();
        lengths.iter().map(example).for_each(|example| examples.push(&example).unwrap());
        let sets = [Mixture { sequences: lengths.len() as u32, weight: 1.0 }];
        let order = Order::new(1, 4, Length::Epochs(1), &sets).unwrap();
        Dataset::new(examples.finish().unwrap(), order, 2)
    }

    #[test]
    fn micro_batches_are_padded_by_their_own_longest_sequence() {
        let data = dataset(&[3, 70, 5]);
        let batch = data.micro_batch(&[0, 1]).unwrap();
        assert_eq!((batch.rows, batch.length), (2, 80));
        assert_eq!(batch.ids[..4], [1, 2, 3, 0]);
        assert_eq!(batch.labels[..4], [IGNORED, IGNORED, 3, IGNORED]);
        assert_eq!(batch.ids[80..82], [1, 2]);
        assert_eq!(data.micro_batch(&[2]).unwrap().length, 16);
        assert_eq!(data.longest(), 80);
    }

    #[test]
    fn what_shares_a_row_is_told_apart() {
        let row = |lengths: &[usize]| {
            let ends = lengths.iter().scan(0, |end, length| {
                *end += *length as u32;
                Some(*end)
            });
            let ends = if lengths.len() > 1 { ends.collect() } else { Vec::new() };
            Example { ids: vec![5; lengths.iter().sum()], ends, ..Example::default() }
        };
        assert_eq!(pad(&[row(&[3, 4]), row(&[6])]).packed, Some(vec![vec![3, 4], vec![6]]));
        assert_eq!(pad(&[row(&[3]), row(&[6])]).packed, None);
    }

    #[test]
    fn a_plan_counts_what_the_whole_step_trains() {
        let data = dataset(&[3, 4, 5, 6, 7]);
        let plans = [data.plan(1), data.plan(2)];
        assert_eq!(plans[0].micro_batches.len(), 2);
        assert_eq!(plans[1].micro_batches.iter().map(Vec::len).sum::<usize>(), 1);
        assert_eq!(plans.iter().map(|plan| plan.tokens).sum::<u64>(), 25);
        assert_eq!(plans.iter().map(|plan| plan.trained_tokens).sum::<u64>(), 15);
        assert!(data.plan(3).micro_batches.is_empty());
    }
}
