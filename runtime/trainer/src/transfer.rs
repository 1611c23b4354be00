//! State from memory to memory, when a generation forms or breaks up.
//!
//! Blocks travel inside authenticated frames, byte for byte; nothing is computed here but who sends
//! what to whom, and that is a pure function of what everybody knows.

use crate::batch::Dataset;
use crate::blocks::BlockTable;
use crate::collective::{Kind, Tag};
use crate::layout::{Holders, Layout};
use crate::state::BlockState;
use crate::step::{Engine, Peers, StepError};
use vicuna_protocol::coordinator as wire;
use vicuna_protocol::holding::bits;

/// Gives every block to those who keep it in the engine's layout and do not have it yet.
pub fn spread(engine: &mut Engine, holders: &Holders, peers: Peers<'_>) -> Result<(), StepError> {
    let moves: Vec<Move> = moves(&engine.layout, holders);
    carry_out(engine, &moves, peers)
}

/// Before some ranks leave: what only they have goes to those who stay.
pub fn evacuate(engine: &mut Engine, leaving: &[bool], peers: Peers<'_>) -> Result<(), StepError> {
    let moves = rescues(&engine.layout, leaving);
    carry_out(engine, &moves, peers)
}

/// In a generation that some only came along with: what nobody holds who stays goes to its owner in the engine's layout.
pub fn hand_over(
    engine: &mut Engine,
    holders: &mut Holders,
    leaves: &[bool],
    peers: Peers<'_>,
) -> Result<(), StepError> {
    let moves = rescues_of(holders, leaves, |block| engine.layout.owner(block));
    moves.iter().for_each(|it| holders[it.block].push(it.to));
    carry_out(engine, &moves, peers)
}

/// What may come upon a rank at once where it is the only one to take everything.
pub fn most_bytes(table: &BlockTable) -> usize {
    12 * table.elements()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Move {
    block: usize,
    from: usize,
    to: usize,
}

/// The owner sends where it can, since it has to be read there anyway; else holders take turns.
fn moves(layout: &Layout, holders: &Holders) -> Vec<Move> {
    let mut moves = Vec::new();
    for (block, holding) in holders.iter().enumerate() {
        let owner = layout.owner(block);
        let turn = holding.get(block % holding.len().max(1)).copied();
        let Some(from) = holding.iter().copied().find(|rank| *rank == owner).or(turn) else { continue };
        let keepers = [Some(owner), layout.twin(block)].into_iter().flatten();
        moves.extend(keepers.filter(|to| !holding.contains(to)).map(|to| Move { block, from, to }));
    }
    moves
}

fn rescues(layout: &Layout, leaving: &[bool]) -> Vec<Move> {
    let staying: Vec<usize> = (0..leaving.len()).filter(|rank| !leaving[*rank]).collect();
    if staying.is_empty() {
        return Vec::new();
    }
    let total = (0..leaving.len()).map(|rank| layout.owned(rank).count()).sum();
    let endangered = (0..total)
        .filter(|block| leaving[layout.owner(*block)] && layout.twin(*block).is_none_or(|twin| leaving[twin]));
    endangered.map(|block| Move { block, from: layout.owner(block), to: staying[block % staying.len()] }).collect()
}

/// Holders take turns.
fn rescues_of(holders: &Holders, leaves: &[bool], to: impl Fn(usize) -> usize) -> Vec<Move> {
    if leaves.iter().all(|leaves| *leaves) {
        return Vec::new();
    }
    let endangered = |(_, holding): &(usize, &Vec<usize>)| holding.iter().all(|rank| leaves[*rank]);
    let rescue = |(block, holding): (usize, &Vec<usize>)| {
        let from = *holding.get(block % holding.len().max(1))?;
        Some(Move { block, from, to: to(block) })
    };
    holders.iter().enumerate().filter(endangered).filter_map(rescue).collect()
}

fn carry_out(engine: &mut Engine, moves: &[Move], peers: Peers<'_>) -> Result<(), StepError> {
    let rank = peers.collective.rank();
    let tag = |block: usize| Tag::new(Kind::State, engine.step).block(block);
    for Move { block, to, .. } in moves.iter().filter(|it| it.from == rank) {
        let Some(state) = engine.blocks.get(block) else {
            return Err(StepError::malformed(rank, "a block is not where everybody believes it to be"));
        };
        peers.collective.send(*to, tag(*block), &state.to_bytes())?;
    }
    for Move { block, from, .. } in moves.iter().filter(|it| it.to == rank) {
        let bytes = peers.collective.receive(*from, tag(*block), peers.abort)?;
        let state = BlockState::from_bytes(&bytes, engine.table.blocks[*block].elements);
        let state = state.ok_or_else(|| StepError::malformed(*from, "a block of the wrong size"))?;
        // At once: what has come is of use even if the rest does not.
        engine.blocks.insert(*block, state);
    }
    Ok(())
}

/// What this rank could offer to a next generation.
pub fn holding(engine: &Engine, data: &Dataset) -> wire::Holding {
    let total = engine.table.blocks.len();
    // A step without trained tokens needs no gradients to be followed.
    let trains = data.plan(engine.step + 1).trained_tokens > 0;
    let follows = |block: &usize| !trains || engine.pending.contains_key(block);
    wire::Holding {
        step: engine.step,
        updates: engine.updates,
        blocks: bits(total, engine.blocks.keys().copied()),
        advancing: bits(total, engine.blocks.keys().copied().filter(follows)),
        weights: engine.has_weights(),
        last: None,
        norm: engine.committed.norm,
        updated: engine.committed.updated,
        lines: engine.has_lines,
    }
}

/// Who has each of `total` blocks once all are at `step`, by what the ranks said.
pub fn holders(holdings: &[wire::Holding], step: u64, total: usize) -> Holders {
    let holding = |block: usize| (0..holdings.len()).filter(|rank| holdings[*rank].offers(step, block)).collect();
    (0..total).map(holding).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nodes(count: usize) -> Vec<String> {
        (0..count).map(|index| format!("node-{index}")).collect()
    }

    #[test]
    fn a_rank_that_is_a_step_behind_offers_what_can_follow() {
        let level = wire::Holding { step: 5, blocks: vec![0b011], ..Default::default() };
        let behind = wire::Holding { step: 4, blocks: vec![0b110], advancing: vec![0b100], ..Default::default() };
        assert_eq!(holders(&[level, behind, wire::Holding::default()], 5, 3), [vec![0], vec![0], vec![1]]);
    }

    #[test]
    fn what_both_keepers_take_away_is_saved_first() {
        let layout = Layout::new(&vec![Vec::new(); 12], &nodes(4));
        let leaving = [true, true, false, false];
        for Move { block, from, to } in rescues(&layout, &leaving) {
            assert!(leaving[layout.owner(block)] && leaving[layout.twin(block).unwrap()]);
            assert!(from == layout.owner(block) && !leaving[to]);
        }
        assert!(!rescues(&layout, &leaving).is_empty());
        assert!(rescues(&layout, &[true; 4]).is_empty(), "there is nobody to take it");
        assert!(rescues(&layout, &[true, false, false, false]).is_empty(), "twins have it");
    }

    #[test]
    fn only_what_nobody_has_who_stays_is_handed_over() {
        let holders = vec![vec![0, 1], vec![1, 2], vec![0, 3], vec![0, 1]];
        let leaves = [true, true, false, false];
        let moves = rescues_of(&holders, &leaves, |block| 2 + block % 2);
        assert_eq!(moves, [Move { block: 0, from: 0, to: 2 }, Move { block: 3, from: 1, to: 3 }]);
        assert!(rescues_of(&holders, &[true; 4], |_| 0).is_empty(), "there is nobody to take it");
    }

    proptest! {
        #[test]
        fn after_the_moves_every_keeper_has_its_blocks(
            world in 1usize..7,
            holding in prop::collection::vec(prop::collection::btree_set(0usize..7, 1..4), 1..40),
        ) {
            let mut holders: Holders =
                holding.iter().map(|ranks| ranks.iter().map(|rank| rank % world).collect()).collect();
            holders.iter_mut().for_each(|ranks: &mut Vec<usize>| {
                ranks.sort_unstable();
                ranks.dedup();
            });
            let layout = Layout::new(&holders, &nodes(world));
            let moves = moves(&layout, &holders);
            prop_assert!(moves.iter().all(|it| holders[it.block].contains(&it.from) && it.from != it.to));
            for it in &moves {
                prop_assert!(!holders[it.block].contains(&it.to), "it is sent once, and only where it is missing");
                holders[it.block].push(it.to);
            }
            for (block, holding) in holders.iter().enumerate() {
                prop_assert!((0..world).all(|rank| !layout.keeps(rank, block) || holding.contains(&rank)));
            }
        }
    }
}
