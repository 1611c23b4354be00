//! Sends partial sums to their owners and finishes the sums of the own blocks.

use super::StepError;
use super::gradients::Partial;
use crate::blocks::{BlockTable, owner};
use crate::collective::{Collective, CollectiveError, Kind, Tag};
use crate::state::{floats, read_block};
use crate::tree::{self, Node, Summand, TreeSum};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// One step's reduction. Peers' sums of a group are waited for one group later than they were due,
/// so that communication hides behind computing.
pub struct Reduction<'a> {
    table: &'a BlockTable,
    collective: &'a dyn Collective,
    abort: &'a CancellationToken,
    step: u64,
    /// What each rank sends, by rank.
    nodes: Vec<Vec<Node>>,
    pending: Option<Pending>,
    /// Finished sums of the own blocks.
    sums: BTreeMap<usize, Vec<f32>>,
    waited: Duration,
}

/// A group whose own blocks are not finished yet: this rank's sums of them, by block and node.
struct Pending {
    group: usize,
    part: u8,
    own: BTreeMap<usize, Vec<Vec<f32>>>,
}

impl<'a> Reduction<'a> {
    pub fn new(
        table: &'a BlockTable,
        collective: &'a dyn Collective,
        abort: &'a CancellationToken,
        step: u64,
        micro_batches: u32,
    ) -> Self {
        let world = collective.world();
        let nodes = (0..world).map(|rank| tree::nodes(tree::share(micro_batches, world, rank)));
        Self {
            table,
            collective,
            abort,
            step,
            nodes: nodes.collect(),
            pending: None,
            sums: BTreeMap::new(),
            waited: Duration::ZERO,
        }
    }

    /// Takes this rank's sums of the next group.
    pub fn add(&mut self, partial: Partial) -> Result<(), StepError> {
        // A rank alone never waits, and is to hear of the end all the same.
        if self.abort.is_cancelled() {
            return Err(CollectiveError::Aborted.into());
        }
        let own = self.send(&partial)?;
        self.settle()?;
        self.pending = Some(Pending { group: partial.group, part: partial.part, own });
        Ok(())
    }

    /// The sums of the own blocks, and how long they were waited for.
    pub fn finish(mut self) -> Result<(BTreeMap<usize, Vec<f32>>, Duration), StepError> {
        self.settle()?;
        Ok((self.sums, self.waited))
    }

    fn tag(&self, part: u8, block: usize, node: usize) -> Tag {
        Tag::new(Kind::Partial, self.step).block(block).node(part, node)
    }

    fn send(&mut self, partial: &Partial) -> Result<BTreeMap<usize, Vec<Vec<f32>>>, StepError> {
        let started = Instant::now();
        let (rank, world) = (self.collective.rank(), self.collective.world());
        let first = self.table.group_parameters(partial.group).start;
        let mut own = BTreeMap::new();
        for index in self.table.group_blocks(partial.group) {
            let (block, to) = (&self.table.blocks[index], owner(index, world));
            let mut kept = Vec::new();
            for (node, (_, gradients)) in partial.sums.iter().enumerate() {
                let values = read_block(block, |parameter| &gradients.0[parameter - first])?;
                if to == rank {
                    kept.push(values);
                } else {
                    let tag = self.tag(partial.part, index, node);
                    self.collective.send(to, tag, bytemuck::cast_slice(&values))?;
                }
            }
            if to == rank {
                own.insert(index, kept);
            }
        }
        self.waited += started.elapsed();
        Ok(own)
    }

    /// Finishes the pending group's own blocks.
    fn settle(&mut self) -> Result<(), StepError> {
        let Some(Pending { group, part, mut own }) = self.pending.take() else {
            return Ok(());
        };
        let started = Instant::now();
        for index in self.table.group_blocks(group) {
            let Some(kept) = own.remove(&index) else { continue };
            let Some(sum) = self.sum(part, index, kept)? else { continue };
            match self.sums.get_mut(&index) {
                Some(earlier) => earlier.add(sum),
                None => drop(self.sums.insert(index, sum)),
            }
        }
        self.waited += started.elapsed();
        Ok(())
    }

    fn sum(&self, part: u8, block: usize, kept: Vec<Vec<f32>>) -> Result<Option<Vec<f32>>, StepError> {
        let mut kept = kept.into_iter();
        let mut sum = TreeSum::default();
        for (rank, nodes) in self.nodes.iter().enumerate() {
            for (position, node) in nodes.iter().enumerate() {
                let values = if rank == self.collective.rank() {
                    kept.next().unwrap_or_default()
                } else {
                    floats(&self.collective.receive(rank, self.tag(part, block, position), self.abort)?)
                };
                if values.len() != self.table.blocks[block].elements {
                    return Err(StepError::malformed(rank, "a partial sum of the wrong size"));
                }
                sum.push(*node, values);
            }
        }
        Ok(sum.finish())
    }
}
