//! Which rank owns a block, and which is its twin: a pure function of who already holds what, so that
//! every member of a generation comes to the same answer and as little as possible is moved.

use crate::blocks::BlockTable;

/// Ranks that have a block at the base of a generation, for every block; empty where the state comes
/// from the store, and then every rank is as good as any other.
pub type Holders = Vec<Vec<usize>>;

/// Owner and twin of every block in one generation.
///
/// The owner finishes the block's gradient, updates and checkpoints it. The twin repeats the update
/// on its own copy, so that a lost owner costs no step; it exists wherever there are two ranks, and
/// sits on another node wherever there are two nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    world: usize,
    owners: Vec<usize>,
    twins: Vec<Option<usize>>,
}

impl Layout {
    /// `nodes` are the members' nodes, by rank.
    pub fn new(holders: &Holders, nodes: &[String]) -> Self {
        let world = nodes.len();
        let owners = assign_owners(holders, world);
        let twins = assign_twins(holders, &owners, nodes);
        Self { world, owners, twins }
    }

    /// As [`Layout::new`], with roles for those only who stay, if anybody does.
    pub fn among(holders: &Holders, nodes: &[String], leaves: &[bool]) -> Self {
        let staying: Vec<usize> = (0..nodes.len()).filter(|rank| !leaves[*rank]).collect();
        if staying.is_empty() {
            return Self::new(holders, nodes);
        }
        let place = |rank: &usize| staying.binary_search(rank).ok();
        let holders = holders.iter().map(|ranks| ranks.iter().filter_map(place).collect()).collect();
        let nodes: Vec<String> = staying.iter().map(|rank| nodes[*rank].clone()).collect();
        let Self { owners, twins, .. } = Self::new(&holders, &nodes);
        let rank = |place: usize| staying[place];
        let twins = twins.into_iter().map(|twin| twin.map(rank)).collect();
        Self { world: leaves.len(), owners: owners.into_iter().map(rank).collect(), twins }
    }

    /// Where each block is wanted once: to be written down.
    pub fn without_twins(self) -> Self {
        Self { twins: vec![None; self.owners.len()], ..self }
    }

    /// For state that nobody holds yet.
    pub fn fresh(table: &BlockTable, nodes: &[String]) -> Self {
        Self::new(&vec![Vec::new(); table.blocks.len()], nodes)
    }

    pub fn world(&self) -> usize {
        self.world
    }

    pub fn owner(&self, block: usize) -> usize {
        self.owners[block]
    }

    pub fn twin(&self, block: usize) -> Option<usize> {
        self.twins[block]
    }

    /// The rank that vouches for a block's gradient: it publishes its norm once it has it, and the
    /// owner has had it before.
    pub fn witness(&self, block: usize) -> usize {
        self.twins[block].unwrap_or(self.owners[block])
    }

    /// Blocks that a rank owns, in order.
    pub fn owned(&self, rank: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.owners.len()).filter(move |block| self.owner(*block) == rank)
    }

    /// Blocks that a rank is witness of, in order.
    pub fn witnessed(&self, rank: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.owners.len()).filter(move |block| self.witness(*block) == rank)
    }

    /// Blocks that a rank keeps, as owner or twin, in order.
    pub fn kept(&self, rank: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.owners.len()).filter(move |block| self.keeps(rank, *block))
    }

    pub fn keeps(&self, rank: usize, block: usize) -> bool {
        self.owner(block) == rank || self.twin(block) == Some(rank)
    }
}

/// Holders first, the less loaded before the more loaded, nobody above an even share.
fn assign_owners(holders: &Holders, world: usize) -> Vec<usize> {
    let most = holders.len().div_ceil(world.max(1));
    let mut load = vec![0; world];
    let mut owners = Vec::with_capacity(holders.len());
    for holding in holders {
        let by_load = |rank: &usize| (load[*rank], *rank);
        let holder = holding.iter().copied().filter(|rank| load[*rank] < most).min_by_key(by_load);
        let owner = holder.or_else(|| (0..world).min_by_key(by_load)).unwrap_or(0);
        load[owner] += 1;
        owners.push(owner);
    }
    owners
}

/// Another node before anything else; then an even share, then who has the block already.
fn assign_twins(holders: &Holders, owners: &[usize], nodes: &[String]) -> Vec<Option<usize>> {
    let world = nodes.len();
    let most = holders.len().div_ceil(world.max(1));
    let mut load = vec![0; world];
    let mut twins = Vec::with_capacity(holders.len());
    for (holding, owner) in holders.iter().zip(owners) {
        let cost = |rank: &usize| {
            let same_node = nodes[*rank] == nodes[*owner];
            (same_node, load[*rank] >= most, !holding.contains(rank), load[*rank], *rank)
        };
        let twin = (0..world).filter(|rank| rank != owner).min_by_key(cost);
        if let Some(twin) = twin {
            load[twin] += 1;
        }
        twins.push(twin);
    }
    twins
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nodes(count: usize) -> Vec<String> {
        (0..count).map(|index| format!("node-{index}")).collect()
    }

    fn holders_of(layout: &Layout, renamed: impl Fn(usize) -> Option<usize>) -> Holders {
        let both = |block: usize| [Some(layout.owner(block)), layout.twin(block)];
        (0..layout.owners.len()).map(|block| both(block).into_iter().flatten().filter_map(&renamed).collect()).collect()
    }

    fn even(layout: &Layout) {
        let owned: Vec<usize> = (0..layout.world).map(|rank| layout.owned(rank).count()).collect();
        let most = layout.owners.len().div_ceil(layout.world);
        assert!(owned.iter().all(|count| *count <= most), "{owned:?}");
    }

    #[test]
    fn a_fresh_layout_is_even_with_twins_elsewhere() {
        for world in 1..7 {
            let layout = Layout::new(&vec![Vec::new(); 23], &nodes(world));
            even(&layout);
            for block in 0..23 {
                assert_eq!(layout.twin(block).is_some(), world > 1);
                assert_ne!(layout.twin(block), Some(layout.owner(block)));
            }
        }
    }

    #[test]
    fn twins_sit_on_another_node_where_there_is_one() {
        let nodes: Vec<String> = ["a", "a", "a", "b"].map(str::to_owned).into();
        let layout = Layout::new(&vec![Vec::new(); 40], &nodes);
        for block in 0..40 {
            let twin = layout.twin(block).unwrap();
            assert_ne!(nodes[twin], nodes[layout.owner(block)]);
        }
    }

    #[test]
    fn who_leaves_has_no_role_and_what_is_held_stays_where_it_is() {
        let before = Layout::new(&vec![Vec::new(); 24], &nodes(4));
        let holders = holders_of(&before, Some);
        let leaves = [false, true, true, false];
        let after = Layout::among(&holders, &nodes(4), &leaves);
        assert_eq!(after.world(), 4);
        for block in 0..24 {
            let (owner, twin) = (after.owner(block), after.twin(block).unwrap());
            assert!(!leaves[owner] && !leaves[twin] && owner != twin);
        }
        let owned = |rank: usize| after.owned(rank).count();
        assert_eq!([owned(0), owned(3)], [12, 12]);
        assert_eq!(Layout::among(&holders, &nodes(4), &[true; 4]), Layout::new(&holders, &nodes(4)));
    }

    #[test]
    fn after_two_become_one_nothing_has_to_move() {
        let before = Layout::new(&vec![Vec::new(); 9], &nodes(2));
        let holders = holders_of(&before, |rank| (rank == 1).then_some(0));
        assert!(holders.iter().all(|holding| holding == &[0]));
        assert_eq!(Layout::new(&holders, &nodes(1)).owned(0).count(), 9);
    }

    #[test]
    fn an_unchanged_membership_changes_nothing() {
        let before = Layout::new(&vec![Vec::new(); 31], &nodes(4));
        let after = Layout::new(&holders_of(&before, Some), &nodes(4));
        let kept = |layout: &Layout, rank| layout.kept(rank).collect::<Vec<_>>();
        for rank in 0..4 {
            assert_eq!(kept(&after, rank), kept(&before, rank), "what a rank keeps stays where it is");
        }
    }

    proptest! {
        #[test]
        fn any_loss_of_one_rank_leaves_a_holder_and_moves_little(world in 2usize..8, blocks in 1usize..60, lost in 0usize..8) {
            let lost = lost % world;
            let before = Layout::new(&vec![Vec::new(); blocks], &nodes(world));
            let renamed = |rank: usize| match rank.cmp(&lost) {
                std::cmp::Ordering::Less => Some(rank),
                std::cmp::Ordering::Equal => None,
                std::cmp::Ordering::Greater => Some(rank - 1),
            };
            let holders = holders_of(&before, renamed);
            prop_assert!(holders.iter().all(|holding| !holding.is_empty()));
            let after = Layout::new(&holders, &nodes(world - 1));
            even(&after);
            let kept: usize = (0..world - 1).map(|rank| after.kept(rank).count()).sum();
            let there: usize = (0..world - 1)
                .map(|rank| after.kept(rank).filter(|block| holders[*block].contains(&rank)).count())
                .sum();
            // What was lost has to be copied once; evening out takes some more.
            let touched = before.kept(lost).count();
            prop_assert!(kept - there <= 2 * touched + world, "{} of {kept} move, {touched} were touched", kept - there);
        }
    }
}
