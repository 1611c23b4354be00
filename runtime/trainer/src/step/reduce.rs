//! Sends partial sums to their owners, finishes the gradients of the own blocks and hands them to
//! their twins.

use super::StepError;
use super::gradients::Partial;
use crate::blocks::BlockTable;
use crate::collective::{Collective, CollectiveError, Kind, Tag};
use crate::layout::Layout;
use crate::parallel;
use crate::state::{floats, read_block};
use crate::tree::{self, Node, Summand, TreeSum};
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Elements worth a thread's while.
const AT_ONCE: usize = 1 << 18;

/// What a step's reduction is about.
#[derive(Clone, Copy)]
pub struct Task<'a> {
    pub table: &'a BlockTable,
    pub layout: &'a Layout,
    pub collective: &'a dyn Collective,
    pub abort: &'a CancellationToken,
    pub step: u64,
    /// Micro-batches by rank.
    pub shares: &'a [Range<u32>],
    /// What gradients are divided by.
    pub tokens: u64,
    /// The embedding's gradient comes in two parts.
    pub tied: bool,
}

/// One step's reduction. Peers' sums of a group are waited for one group later than they were due,
/// so that communication hides behind computing.
pub struct Reduction<'a> {
    task: Task<'a>,
    /// What each rank sends, by rank.
    nodes: Vec<Vec<Node>>,
    pending: Option<Pending>,
    /// Sums of own blocks that lack their second part.
    halves: BTreeMap<usize, Vec<f32>>,
    waited: Duration,
}

/// A group whose own blocks are not finished yet: this rank's sums of them, by block and node.
struct Pending {
    group: usize,
    part: u8,
    own: BTreeMap<usize, Vec<Vec<f32>>>,
}

impl<'a> Reduction<'a> {
    pub fn new(task: Task<'a>) -> Self {
        let nodes = task.shares.iter().map(|share| tree::nodes(share.clone())).collect();
        Self { task, nodes, pending: None, halves: BTreeMap::new(), waited: Duration::ZERO }
    }

    /// Takes this rank's sums of the next group; puts finished gradients of own blocks into `finished`.
    pub fn add(&mut self, partial: Partial, finished: &mut BTreeMap<usize, Vec<f32>>) -> Result<(), StepError> {
        // A rank alone never waits, and is to hear of the end all the same.
        if self.task.abort.is_cancelled() {
            return Err(CollectiveError::Aborted.into());
        }
        let own = self.send(&partial)?;
        self.settle(finished)?;
        self.pending = Some(Pending { group: partial.group, part: partial.part, own });
        Ok(())
    }

    /// Finishes the last group, and takes the gradients of the blocks that this rank is twin of. How
    /// long peers were waited for.
    pub fn finish(mut self, finished: &mut BTreeMap<usize, Vec<f32>>) -> Result<Duration, StepError> {
        self.settle(finished)?;
        let started = Instant::now();
        let Task { table, layout, collective, abort, step, .. } = self.task;
        let rank = collective.rank();
        for block in layout.kept(rank).filter(|block| layout.owner(*block) != rank) {
            let from = layout.owner(block);
            let gradient = floats(&collective.receive(from, Tag::new(Kind::Gradient, step).block(block), abort)?);
            if gradient.len() != table.blocks[block].elements {
                return Err(StepError::malformed(from, "a gradient of the wrong size"));
            }
            finished.insert(block, gradient);
        }
        Ok(self.waited + started.elapsed())
    }

    fn tag(&self, part: u8, block: usize, node: usize) -> Tag {
        Tag::new(Kind::Partial, self.task.step).block(block).node(part, node)
    }

    fn send(&mut self, partial: &Partial) -> Result<BTreeMap<usize, Vec<Vec<f32>>>, StepError> {
        let started = Instant::now();
        let Task { table, layout, collective, .. } = self.task;
        let rank = collective.rank();
        let first = table.group_parameters(partial.group).start;
        let mut own = BTreeMap::new();
        for index in table.group_blocks(partial.group) {
            let (block, to) = (&table.blocks[index], layout.owner(index));
            let mut kept = Vec::new();
            for (node, (_, gradients)) in partial.sums.iter().enumerate() {
                let values = read_block(block, |parameter| &gradients.tensors()[parameter - first])?;
                if to == rank {
                    kept.push(values);
                } else {
                    let tag = self.tag(partial.part, index, node);
                    collective.send(to, tag, bytemuck::cast_slice(&values))?;
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
    fn settle(&mut self, finished: &mut BTreeMap<usize, Vec<f32>>) -> Result<(), StepError> {
        let Some(Pending { group, part, mut own }) = self.pending.take() else {
            return Ok(());
        };
        let started = Instant::now();
        for index in self.task.table.group_blocks(group) {
            let Some(kept) = own.remove(&index) else { continue };
            let Some(sum) = self.sum(part, index, kept)? else { continue };
            if let Some(whole) = self.whole(group, part, index, sum) {
                finished.insert(index, self.conclude(index, whole)?);
            }
        }
        self.waited += started.elapsed();
        Ok(())
    }

    /// The block's sum, once no part of it is missing.
    fn whole(&mut self, group: usize, part: u8, block: usize, sum: Vec<f32>) -> Option<Vec<f32>> {
        if !self.task.tied || group != crate::blocks::EMBEDDING_GROUP {
            return Some(sum);
        }
        if part == 0 {
            self.halves.insert(block, sum);
            return None;
        }
        match self.halves.remove(&block) {
            Some(mut half) => {
                half.add(sum);
                Some(half)
            }
            None => Some(sum),
        }
    }

    /// Divides once by the number of trained tokens, and hands the gradient to the twin.
    fn conclude(&self, block: usize, mut sum: Vec<f32>) -> Result<Vec<f32>, StepError> {
        let tokens = self.task.tokens as f32;
        parallel::map(parallel::threads(), sum.chunks_mut(AT_ONCE).collect(), |part| {
            part.iter_mut().for_each(|value| *value /= tokens);
        });
        if let Some(twin) = self.task.layout.twin(block) {
            let tag = Tag::new(Kind::Gradient, self.task.step).block(block);
            self.task.collective.send(twin, tag, bytemuck::cast_slice(&sum))?;
        }
        Ok(sum)
    }

    fn sum(&self, part: u8, block: usize, kept: Vec<Vec<f32>>) -> Result<Option<Vec<f32>>, StepError> {
        let Task { table, collective, abort, .. } = self.task;
        let mut kept = kept.into_iter();
        let mut sum = TreeSum::default();
        for (rank, nodes) in self.nodes.iter().enumerate() {
            for (position, node) in nodes.iter().enumerate() {
                let values = if rank == collective.rank() {
                    kept.next().unwrap_or_default()
                } else {
                    floats(&collective.receive(rank, self.tag(part, block, position), abort)?)
                };
                if values.len() != table.blocks[block].elements {
                    return Err(StepError::malformed(rank, "a partial sum of the wrong size"));
                }
                sum.push(*node, values);
            }
        }
        Ok(sum.finish())
    }
}
