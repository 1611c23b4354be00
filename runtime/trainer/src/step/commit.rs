//! What every rank tells every other before anyone applies a step.
//!
//! Holding all of these *is* the commit: all ranks then know the same norms, losses and wishes, and
//! so decide alike, whether to skip the update, to write a checkpoint, to stop.

use super::StepError;
use crate::blocks::BlockTable;
use crate::collective::{Collective, Kind, Tag};
use crate::tree;
use std::collections::BTreeMap;
use tokio_util::sync::CancellationToken;

/// What a rank wants to happen after the step; any rank's wish counts for all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// End the generation after this step.
    pub stop: bool,
    /// A checkpoint is due.
    pub checkpoint: bool,
    /// The previous checkpoint is still on its way to the store: not yet another.
    pub uploading: bool,
}

impl Wishes {
    fn bits(self) -> u64 {
        u64::from(self.stop) | u64::from(self.checkpoint) << 1 | u64::from(self.uploading) << 2
    }

    fn from_bits(bits: u64) -> Self {
        Self { stop: bits & 1 != 0, checkpoint: bits & 2 != 0, uploading: bits & 4 != 0 }
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
}

impl Commit {
    pub fn is_finite(&self) -> bool {
        self.loss_sum.is_finite() && self.norm.is_finite()
    }
}

/// One rank's part.
#[derive(Clone, Debug)]
pub struct Contribution {
    pub wishes: Wishes,
    /// Loss sums of its micro-batches, in order.
    pub losses: Vec<f64>,
    /// Squared norms of its blocks' gradients, by block; none if the step trained no token.
    pub norms: BTreeMap<usize, f64>,
}

/// Exchanges contributions. Norms are added in the order of blocks, losses in that of micro-batches.
pub fn exchange(
    table: &BlockTable,
    collective: &dyn Collective,
    abort: &CancellationToken,
    step: u64,
    trains: bool,
    micro_batches: u32,
    own: &Contribution,
) -> Result<Commit, StepError> {
    let tag = Tag::new(Kind::Commit, step);
    collective.broadcast(tag, bytemuck::cast_slice(&words(own)))?;
    let world = collective.world();
    let mut norms = own.norms.clone();
    let mut losses = Vec::with_capacity(micro_batches as usize);
    let mut wishes = own.wishes;
    for rank in 0..world {
        if rank == collective.rank() {
            losses.extend_from_slice(&own.losses);
            continue;
        }
        let payload = collective.receive(rank, tag, abort)?;
        let count = if trains { tree::share(micro_batches, world, rank).len() } else { 0 };
        let blocks: Vec<usize> = if trains { table.owned(rank, world).collect() } else { Vec::new() };
        let said =
            parse(&payload, count, &blocks).ok_or_else(|| StepError::malformed(rank, "a commit of the wrong size"))?;
        wishes = wishes.or(said.wishes);
        losses.extend(said.losses);
        norms.extend(said.norms);
    }
    Ok(Commit { loss_sum: losses.iter().sum(), norm: norms.values().sum::<f64>().sqrt(), wishes })
}

fn words(own: &Contribution) -> Vec<u64> {
    let numbers = own.losses.iter().chain(own.norms.values());
    std::iter::once(own.wishes.bits()).chain(numbers.map(|number| number.to_bits())).collect()
}

fn parse(payload: &[u8], losses: usize, blocks: &[usize]) -> Option<Contribution> {
    if payload.len() != 8 * (1 + losses + blocks.len()) {
        return None;
    }
    let (words, _rest) = payload.as_chunks();
    let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
    let (wishes, numbers) = words.split_first()?;
    let (losses, norms) = numbers.split_at(losses);
    Some(Contribution {
        wishes: Wishes::from_bits(*wishes),
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
            wishes: Wishes { stop: true, checkpoint: false, uploading: true },
            losses: vec![1.5, f64::NAN],
            norms: BTreeMap::from([(1, 2.0), (3, 4.0)]),
        };
        let words = words(&own);
        let payload: &[u8] = bytemuck::cast_slice(&words);
        let back = parse(payload, 2, &[1, 3]).unwrap();
        assert_eq!((back.wishes, back.norms), (own.wishes, own.norms));
        assert!(back.losses[1].is_nan());
        assert!(parse(payload, 1, &[1, 3]).is_none());
        assert!(parse(&[], 0, &[]).is_none());
    }
}
