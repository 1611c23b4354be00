//! Loss on the sequences that are not trained on.
//!
//! An evaluation belongs to a step and comes before the next one; a generation that starts at such a step makes it
//! anew. It runs in rounds of at most a step's micro-batches, shared like those. After each round the ranks tell each
//! other losses and wishes, so that all end it alike when one of them is to leave. Losses are added in the order of
//! micro-batches, whoever ran them: the sum has the same bits for every number of ranks.

use crate::batch::{MicroBatch, pad, padded_length};
use crate::collective::{Kind, Tag};
use crate::step::commit::{self, Commit, Contribution, Wishes};
use crate::step::{Engine, Peers, StepError};
use std::io;
use std::time::{Duration, Instant};
use vicuna_data::Sequences;

/// The sequences, in micro-batches of a fixed size and order.
#[derive(Debug)]
pub struct HeldOut {
    examples: Sequences,
    micro_batch: usize,
}

impl HeldOut {
    /// `micro_batch` is at least 1.
    pub fn new(examples: Sequences, micro_batch: usize) -> Self {
        Self { examples, micro_batch: micro_batch.max(1) }
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    /// The longest padded sequence; 0 if there is none.
    pub fn longest(&self) -> usize {
        padded_length(self.examples.longest())
    }

    /// Bytes that the sequences take in memory.
    pub fn bytes(&self) -> u64 {
        self.examples.bytes()
    }

    fn micro_batches(&self) -> u32 {
        self.examples.len().div_ceil(self.micro_batch) as u32
    }

    fn micro_batch(&self, index: u32) -> io::Result<MicroBatch> {
        let start = self.micro_batch * index as usize;
        let end = self.examples.len().min(start + self.micro_batch);
        Ok(pad(&(start..end).map(|number| self.examples.read(number)).collect::<io::Result<Vec<_>>>()?))
    }

    fn trained_tokens(&self) -> usize {
        (0..self.examples.len()).map(|number| self.examples.trained_tokens(number)).sum()
    }
}

/// What an evaluation came to; the same on every rank but for the time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// The step after which it was made.
    pub step: u64,
    /// Mean per predicted token.
    pub loss: f64,
    pub duration: Duration,
}

/// How far an evaluation is, in micro-batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage {
    pub step: u64,
    pub done: u32,
    pub total: u32,
}

/// How it ended; the same on every rank.
#[derive(Debug)]
pub enum Pass {
    Complete(Evaluation),
    /// Somebody wished for the end of the generation.
    Stopped(Commit),
}

/// Evaluates the engine's weights, which are complete. `wishes` is asked in every round, of at most `round`
/// micro-batches.
pub fn run(
    engine: &Engine,
    held_out: &HeldOut,
    round: u32,
    peers: Peers<'_>,
    wishes: &dyn Fn() -> Wishes,
    told: &dyn Fn(Stage),
) -> Result<Pass, StepError> {
    let started = Instant::now();
    let total = held_out.micro_batches();
    let mut loss_sum = 0.0;
    let mut done = 0;
    while done < total {
        let size = round.max(1).min(total - done);
        let commit = one_round(engine, held_out, done, size, peers, wishes())?;
        if commit.wishes.stop {
            return Ok(Pass::Stopped(commit));
        }
        loss_sum += commit.loss_sum;
        done += size;
        told(Stage { step: engine.step, done, total });
    }
    let loss = loss_sum / held_out.trained_tokens() as f64;
    Ok(Pass::Complete(Evaluation { step: engine.step, loss, duration: started.elapsed() }))
}

/// Micro-batches `first..first + size`, each by one rank.
fn one_round(
    engine: &Engine,
    held_out: &HeldOut,
    first: u32,
    size: u32,
    peers: Peers<'_>,
    wishes: Wishes,
) -> Result<Commit, StepError> {
    let shares = engine.shares_apart(size);
    let mine = shares[peers.collective.rank()].clone();
    let batches = mine.map(|index| held_out.micro_batch(first + index)).collect::<io::Result<Vec<_>>>()?;
    let own = Contribution { wishes, losses: engine.losses(first, &batches, peers)?, ..Contribution::default() };
    let tag = Tag::new(Kind::Evaluation, engine.step).block(first as usize);
    commit::tell_all(tag, peers.collective, peers.abort, &own, |rank| (shares[rank].len(), Vec::new()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vicuna_data::{Example, SequencesWriter};

    fn held_out(examples: &[Example]) -> HeldOut {
        let mut written = SequencesWriter::create(&std::env::temp_dir()).unwrap();
        examples.iter().for_each(|example| written.push(example).unwrap());
        HeldOut::new(written.finish().unwrap(), 2)
    }

    #[test]
    fn every_sequence_is_in_one_micro_batch() {
        let learned = |length: usize| std::iter::once(0..length as u32).collect();
        let example = |length: usize| Example { ids: vec![7; length], learned: learned(length), ends: Vec::new() };
        let three = held_out(&[3, 40, 5].map(example));
        assert_eq!((three.micro_batches(), three.longest(), three.trained_tokens()), (2, 48, 2 + 39 + 4));
        let batches = [0, 1].map(|index| three.micro_batch(index).unwrap());
        assert_eq!(batches.map(|batch| (batch.rows, batch.length)), [(2, 48), (1, 16)]);
        assert!(held_out(&[]).is_empty());
    }
}
