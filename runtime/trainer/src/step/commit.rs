//! What every rank tells every other before anyone applies a step.
//!
//! A block's norm is published by its witness (the twin, where there is one), which has the finished
//! gradient by then, as the owner has. So holding all of these *is* the commit: whoever applies the
//! step knows that every block of it survives the loss of either holder. And all ranks then know the
//! same norms, losses and wishes, and so decide alike, whether to skip the update, to write a
//! checkpoint, to stop.

use super::StepError;
use crate::collective::{Collective, Kind, Tag};
use crate::layout::Layout;
use std::collections::BTreeMap;
use std::ops::Range;
use tokio_util::sync::CancellationToken;

/// What a rank wants to happen after the step; any rank's wish counts for all, but for `leave`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// End the generation after this step.
    pub stop: bool,
    /// A checkpoint is due.
    pub checkpoint: bool,
    /// The previous checkpoint is still on its way to the store: not yet another.
    pub uploading: bool,
    /// The rank will not be in the next generation.
    pub leave: bool,
    /// The end is to be kept in the store, because memory will not be enough.
    pub save: bool,
    /// … by the checkpoint that is on its way, since a new one would be too late.
    pub finish: bool,
}

impl Wishes {
    fn bits(self) -> u64 {
        let flags = [self.stop, self.checkpoint, self.uploading, self.leave, self.save, self.finish];
        flags.into_iter().enumerate().map(|(at, flag)| u64::from(flag) << at).sum()
    }

    fn from_bits(bits: u64) -> Self {
        let flag = |at: u32| bits >> at & 1 != 0;
        let [stop, checkpoint, uploading, leave, save, finish] = [0, 1, 2, 3, 4, 5].map(flag);
        Self { stop, checkpoint, uploading, leave, save, finish }
    }

    fn or(self, other: Self) -> Self {
        Self::from_bits(self.bits() | other.bits())
    }
}

/// The same on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Commit {
    /// Sum of the loss over all trained tokens.
    pub loss_sum: f64,
    /// L2 norm of the whole gradient.
    pub norm: f64,
    pub wishes: Wishes,
    /// Who leaves, by rank.
    pub leaving: Vec<bool>,
    /// How long each rank computed.
    pub seconds: Vec<f64>,
}

impl Commit {
    pub fn is_finite(&self) -> bool {
        self.loss_sum.is_finite() && self.norm.is_finite()
    }
}

/// One rank's part.
#[derive(Clone, Debug, Default)]
pub struct Contribution {
    pub wishes: Wishes,
    /// Forward and backward passes of its micro-batches, waiting not included.
    pub seconds: f64,
    /// Loss sums of its micro-batches, in order.
    pub losses: Vec<f64>,
    /// Squared norms of the gradients that it is witness of, by block; none if the step trained no token.
    pub norms: BTreeMap<usize, f64>,
}

/// What all ranks know of a step before it is committed.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    pub step: u64,
    pub layout: &'a Layout,
    /// Micro-batches by rank.
    pub shares: &'a [Range<u32>],
    /// The step trains at least one token.
    pub trains: bool,
}

impl Terms<'_> {
    fn losses_of(&self, rank: usize) -> usize {
        if self.trains { self.shares[rank].len() } else { 0 }
    }

    fn blocks_of(&self, rank: usize) -> Vec<usize> {
        if self.trains { self.layout.witnessed(rank).collect() } else { Vec::new() }
    }
}

/// Exchanges contributions. Norms are added in the order of blocks, losses in that of micro-batches.
pub fn exchange(
    terms: Terms<'_>,
    collective: &dyn Collective,
    abort: &CancellationToken,
    own: &Contribution,
) -> Result<Commit, StepError> {
    let expected = |rank: usize| (terms.losses_of(rank), terms.blocks_of(rank));
    tell_all(Tag::new(Kind::Commit, terms.step), collective, abort, own, expected)
}

/// Every rank's contribution, on every rank. `expected` says how many losses a rank sends, and the norms of which
/// blocks.
pub fn tell_all(
    tag: Tag,
    collective: &dyn Collective,
    abort: &CancellationToken,
    own: &Contribution,
    expected: impl Fn(usize) -> (usize, Vec<usize>),
) -> Result<Commit, StepError> {
    collective.broadcast(tag, bytemuck::cast_slice(&words(own)))?;
    let mut all = Vec::with_capacity(collective.world());
    for rank in 0..collective.world() {
        if rank == collective.rank() {
            all.push(own.clone());
            continue;
        }
        let payload = collective.receive(rank, tag, abort)?;
        let (losses, blocks) = expected(rank);
        let said = parse(&payload, losses, &blocks);
        all.push(said.ok_or_else(|| StepError::malformed(rank, "a commit of the wrong size"))?);
    }
    Ok(conclude(&all))
}

fn conclude(all: &[Contribution]) -> Commit {
    let norms: BTreeMap<usize, f64> =
        all.iter().flat_map(|one| &one.norms).map(|(block, norm)| (*block, *norm)).collect();
    Commit {
        loss_sum: all.iter().flat_map(|one| &one.losses).sum(),
        norm: norms.values().sum::<f64>().sqrt(),
        wishes: all.iter().map(|one| one.wishes).fold(Wishes::default(), Wishes::or),
        leaving: all.iter().map(|one| one.wishes.leave).collect(),
        seconds: all.iter().map(|one| one.seconds).collect(),
    }
}

fn words(own: &Contribution) -> Vec<u64> {
    let numbers = std::iter::once(&own.seconds).chain(&own.losses).chain(own.norms.values());
    std::iter::once(own.wishes.bits()).chain(numbers.map(|number| number.to_bits())).collect()
}

fn parse(payload: &[u8], losses: usize, blocks: &[usize]) -> Option<Contribution> {
    if payload.len() != 8 * (2 + losses + blocks.len()) {
        return None;
    }
    let (words, _rest) = payload.as_chunks();
    let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
    let [wishes, seconds, numbers @ ..] = &words[..] else { return None };
    let (losses, norms) = numbers.split_at(losses);
    Some(Contribution {
        wishes: Wishes::from_bits(*wishes),
        seconds: f64::from_bits(*seconds),
        losses: losses.iter().map(|bits| f64::from_bits(*bits)).collect(),
        norms: blocks.iter().copied().zip(norms.iter().map(|bits| f64::from_bits(*bits))).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contributions_come_back_and_wrong_sizes_do_not() {
        let own = Contribution {
            wishes: Wishes { stop: true, uploading: true, finish: true, ..Wishes::default() },
            seconds: 0.25,
            losses: vec![1.5, f64::NAN],
            norms: BTreeMap::from([(1, 2.0), (3, 4.0)]),
        };
        let words = words(&own);
        let payload: &[u8] = bytemuck::cast_slice(&words);
        let back = parse(payload, 2, &[1, 3]).unwrap();
        assert_eq!((back.wishes, back.seconds, back.norms), (own.wishes, own.seconds, own.norms));
        assert!(back.losses[1].is_nan());
        assert!(parse(payload, 1, &[1, 3]).is_none());
        assert!(parse(&[], 0, &[]).is_none());
    }

    #[test]
    fn a_leaver_speaks_for_itself_alone() {
        let leaver =
            Contribution { wishes: Wishes { stop: true, leave: true, ..Wishes::default() }, ..Default::default() };
        let commit = conclude(&[Contribution::default(), leaver]);
        assert!(commit.wishes.stop);
        assert_eq!(commit.leaving, [false, true]);
    }
}
