//! Where the weights come from that passes compute with.
//!
//! Replicated, every rank has all of them, and owners bring what they updated to everyone after each step. Sharded, a
//! rank has the masters of its blocks and nothing else: a thread beside each pass gathers one group of parameters (the
//! embedding, a layer, the head) after the other from its owners, one ahead of the pass, which lets each go when it is
//! through with it. It is the same masters, rounded alike: the pass computes the same bits.

use super::{Peers, StepError};
use crate::blocks::{BlockTable, EMBEDDING_GROUP};
use crate::collective::{CollectiveError, Kind as Message, Tag};
use crate::layout::Layout;
use crate::state::{BlockState, Weights, rounded, write_block};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// What a rank has between passes.
#[derive(Debug)]
pub enum Held {
    /// All that is trained, complete at this step; `None` while owners' parts are missing.
    All { weights: Weights, step: Option<u64> },
    /// Its blocks.
    Own,
}

/// What weights are sent for: what is meant for one is not taken for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Replicated weights, to ranks that lack them.
    Update,
    Step,
    Canary,
    Digest,
    /// A round's first micro-batch.
    Evaluation(u32),
    Result,
    /// Not weights, but that those of the result's group are written.
    Written(u32),
}

impl Purpose {
    pub fn tag(self, step: u64, way: u8) -> Tag {
        let (number, round) = match self {
            Self::Update => (0, 0),
            Self::Step => (1, 0),
            Self::Canary => (2, 0),
            Self::Digest => (3, 0),
            Self::Evaluation(first) => (4, first),
            Self::Result => (5, 0),
            Self::Written(group) => (6, group),
        };
        Tag::new(Message::Weights, step).node(2 * number + way, round as usize)
    }
}

/// A group that a pass needs. What it needs on the way forward and on the way back it gathers twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Leg {
    group: usize,
    way: u8,
}

/// The groups that a pass needs, in its order; the same on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route(Vec<Leg>);

impl Route {
    /// To the loss; a tied embedding comes again before the head.
    pub fn forward(table: &BlockTable, tied: bool) -> Self {
        let head = table.head_group();
        let forward = (EMBEDDING_GROUP..head).map(|group| Leg { group, way: 0 });
        let tied = tied.then_some(EMBEDDING_GROUP);
        let top = tied.into_iter().chain([head]).map(|group| Leg { group, way: 1 });
        Self::of(table, forward.chain(top))
    }

    /// … and back through the first `again` layers, which run again; of the rest what their way back needs was kept.
    pub fn there_and_back(table: &BlockTable, tied: bool, again: usize) -> Self {
        let back = (0..again).rev().map(|layer| Leg { group: BlockTable::layer_group(layer), way: 1 });
        Self::of(table, Self::forward(table, tied).0.into_iter().chain(back))
    }

    /// Everything once.
    pub fn everything(table: &BlockTable) -> Self {
        Self::of(table, (EMBEDDING_GROUP..=table.head_group()).map(|group| Leg { group, way: 0 }))
    }

    pub fn groups(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().map(|leg| leg.group)
    }

    /// Of adapters not every group has any.
    fn of(table: &BlockTable, legs: impl Iterator<Item = Leg>) -> Self {
        Self(legs.filter(|leg| !table.group_blocks(leg.group).is_empty()).collect())
    }
}

/// Gives a pass the weights of each group when it comes to it.
pub enum Source<'a> {
    Here(&'a BlockTable, &'a Weights),
    Gathered { owners: Owners<'a>, groups: mpsc::Receiver<Result<Values<'a>, StepError>>, waited: Duration },
}

/// Of a group's blocks, in order, each as [`rounded`].
type Values<'a> = Vec<Cow<'a, [u8]>>;

impl Source<'_> {
    /// Tensors of the group's parameters, in order. Groups are taken in the order of the pass's route.
    pub fn take(&mut self, group: usize) -> Result<Vec<Tensor>, StepError> {
        match self {
            Self::Here(table, weights) => {
                let tensors = &weights.tensors[table.group_parameters(group)];
                Ok(tensors.iter().map(Tensor::shallow_clone).collect())
            }
            Self::Gathered { owners, groups, waited } => {
                let started = Instant::now();
                let gathered = groups.recv();
                *waited += started.elapsed();
                // Its thread ends early only after an error, which the pass would have ended with.
                let values = gathered.unwrap_or_else(|_| Err(CollectiveError::Aborted.into()))?;
                // Here and not in that thread, whose memory the C library would keep apart.
                owners.tensors(group, &values)
            }
        }
    }

    /// How long the pass had to wait.
    pub fn waited(&self) -> Duration {
        match self {
            Self::Here(..) => Duration::ZERO,
            Self::Gathered { waited, .. } => *waited,
        }
    }
}

/// The blocks that a rank keeps, and those who have the others.
#[derive(Clone, Copy)]
pub struct Owners<'a> {
    pub table: &'a BlockTable,
    pub layout: &'a Layout,
    pub blocks: &'a BTreeMap<usize, BlockState>,
    /// The step that all blocks are at.
    pub step: u64,
    pub kind: Kind,
    pub device: Device,
    pub peers: Peers<'a>,
}

impl<'a> Owners<'a> {
    /// Runs a pass along `route`, which every rank does at the same time where weights are sharded.
    pub fn pass<T>(
        &self,
        held: &Held,
        purpose: Purpose,
        route: &Route,
        work: impl FnOnce(&mut Source<'_>) -> Result<T, StepError>,
    ) -> Result<T, StepError> {
        match held {
            Held::All { weights, .. } => work(&mut Source::Here(self.table, weights)),
            Held::Own => self.gathering(purpose, route, work),
        }
    }

    fn gathering<T>(
        &self,
        purpose: Purpose,
        route: &Route,
        work: impl FnOnce(&mut Source<'_>) -> Result<T, StepError>,
    ) -> Result<T, StepError> {
        let threads = tch::get_num_threads();
        let ended = self.peers.abort.child_token();
        // Without room: a group is handed over when the pass comes to it, and the next one begun then.
        let (hand_over, groups) = mpsc::sync_channel(0);
        std::thread::scope(|scope| {
            let owners = Owners { peers: Peers { abort: &ended, ..self.peers }, ..*self };
            scope.spawn(move || {
                // OpenMP keeps this per thread.
                tch::set_num_threads(threads);
                for Leg { group, way } in &route.0 {
                    let gathered = owners.gather(*group, purpose.tag(owners.step, *way));
                    let failed = gathered.is_err();
                    if hand_over.send(gathered).is_err() || failed {
                        return;
                    }
                }
            });
            // However the pass ends, the thread does not wait for peers beyond it.
            let _ended = ended.clone().drop_guard();
            let mut source = Source::Gathered { owners, groups, waited: Duration::ZERO };
            work(&mut source)
        })
    }

    /// A group's weights, from whoever has them, while others get this rank's.
    fn gather(&self, group: usize, tag: Tag) -> Result<Values<'a>, StepError> {
        let blocks = self.table.group_blocks(group);
        self.send(blocks.clone(), tag, |_| true)?;
        blocks.map(|index| self.block(index, tag)).collect()
    }

    /// A group's parameters on the device.
    fn tensors(&self, group: usize, values: &Values<'_>) -> Result<Vec<Tensor>, StepError> {
        let parameters = self.table.group_parameters(group);
        let empty = |shape: &Vec<i64>| Tensor::f_empty(shape, (self.kind, self.device));
        let tensors = self.table.parameters[parameters.clone()].iter().map(|parameter| empty(&parameter.shape));
        let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
        for (index, values) in self.table.group_blocks(group).zip(values) {
            write_block(&self.table.blocks[index], values, |parameter| &tensors[parameter - parameters.start])?;
        }
        Ok(tensors)
    }

    /// Brings all weights to the ranks that lack them; `into` are this rank's, if it does.
    pub fn bring(&self, lacking: &[bool], into: Option<&mut Weights>) -> Result<(), StepError> {
        let tag = Purpose::Update.tag(self.step, 0);
        self.send(0..self.table.blocks.len(), tag, |to| lacking[to])?;
        let Some(weights) = into else { return Ok(()) };
        for (index, block) in self.table.blocks.iter().enumerate() {
            weights.write(block, &self.block(index, tag)?)?;
        }
        Ok(())
    }

    /// Own blocks, to those who do not keep them themselves.
    fn send(&self, blocks: Range<usize>, tag: Tag, wanted: impl Fn(usize) -> bool) -> Result<(), StepError> {
        let (rank, world) = (self.peers.collective.rank(), self.peers.collective.world());
        for index in blocks.filter(|index| self.layout.owner(*index) == rank) {
            // Not all to the same rank at once.
            let others = (1..world).map(|distance| (rank + distance) % world);
            let receivers: Vec<usize> = others.filter(|to| wanted(*to) && !self.layout.keeps(*to, index)).collect();
            if receivers.is_empty() {
                continue;
            }
            let values = self.own(index)?;
            receivers.into_iter().try_for_each(|to| self.peers.collective.send(to, tag.block(index), &values))?;
        }
        Ok(())
    }

    /// A block's values: owner and twin have them, the others get them from the owner.
    fn block(&self, index: usize, tag: Tag) -> Result<Cow<'a, [u8]>, StepError> {
        let Peers { collective, abort } = self.peers;
        if self.layout.keeps(collective.rank(), index) {
            return self.own(index);
        }
        let from = self.layout.owner(index);
        let values = collective.receive(from, tag.block(index), abort)?;
        if values.len() != self.table.blocks[index].elements * self.kind.elt_size_in_bytes() {
            return Err(StepError::malformed(from, "weights of the wrong size"));
        }
        Ok(Cow::Owned(values))
    }

    fn own(&self, index: usize) -> Result<Cow<'a, [u8]>, StepError> {
        let Some(state) = self.blocks.get(&index) else {
            let rank = self.peers.collective.rank();
            return Err(StepError::malformed(rank, "a block is not where everybody believes it to be"));
        };
        Ok(rounded(&state.weights, self.kind)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(route: &Route) -> Vec<usize> {
        route.groups().collect()
    }

    #[test]
    fn a_pass_needs_each_group_once_on_each_way() {
        let table = BlockTable::new(&vicuna_model::tiny::config());
        assert_eq!(groups(&Route::there_and_back(&table, true, 2)), [0, 1, 2, 0, 3, 2, 1]);
        assert_eq!(groups(&Route::there_and_back(&table, false, 1)), [0, 1, 2, 3, 1]);
        assert_eq!(groups(&Route::everything(&table)), [0, 1, 2, 3]);
        let Route(mut legs) = Route::there_and_back(&table, true, 2);
        legs.sort_unstable_by_key(|leg| (leg.group, leg.way));
        assert!(legs.windows(2).all(|pair| pair[0] != pair[1]), "no message is sent twice");
    }

    #[test]
    fn of_adapters_only_layers_are_gathered() {
        let lora = vicuna_model::lora::Lora::new(8, 16.0, 0.0, &["q_proj"]).unwrap();
        let table = BlockTable::adapters(&vicuna_model::tiny::config(), &lora);
        assert_eq!(groups(&Route::there_and_back(&table, true, 2)), [1, 2, 2, 1]);
    }
}
