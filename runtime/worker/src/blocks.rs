//! Which block of the cache belongs to whom (Kwon et al. 2023, "PagedAttention"). A full block is
//! named by a digest of all tokens up to its end, so that prompts with the same beginning share it.
//! A block that nobody holds keeps its content until the room is needed.

use std::collections::{BTreeMap, HashMap};
use vicuna_model::inference::BLOCK_TOKENS;

/// All tokens up to the end of a block: BLAKE3 over the chain of blocks, cut to 128 bits.
pub type Chain = [u8; 16];

/// The chain that begins every sequence of an adapter, or of the bare model: keys and values are that
/// one's alone.
pub fn start(adapter: Option<usize>) -> Chain {
    let number = adapter.map_or(0, |adapter| adapter as u128 + 1);
    number.to_le_bytes()
}

/// The chain after one more block of tokens.
pub fn chain(before: &Chain, tokens: &[u32]) -> Chain {
    let mut hasher = blake3::Hasher::new();
    hasher.update(before);
    tokens.iter().for_each(|token| {
        hasher.update(&token.to_le_bytes());
    });
    let whole = *hasher.finalize().as_bytes();
    std::array::from_fn(|index| whole[index])
}

#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    /// Without content.
    free: Vec<u32>,
    /// With content that nobody holds, least recently held first.
    idle: BTreeMap<u64, u32>,
    named: HashMap<Chain, u32>,
    clock: u64,
}

#[derive(Clone, Debug, Default)]
struct Block {
    holders: u32,
    name: Option<Chain>,
    /// Its key in `idle`.
    released: u64,
}

impl BlockPool {
    pub fn new(blocks: usize) -> Self {
        let count = u32::try_from(blocks).unwrap_or(u32::MAX);
        Self {
            blocks: vec![Block::default(); count as usize],
            free: (0..count).rev().collect(),
            idle: BTreeMap::new(),
            named: HashMap::new(),
            clock: 0,
        }
    }

    pub fn total_tokens(&self) -> usize {
        self.blocks.len() * BLOCK_TOKENS
    }

    pub fn free_tokens(&self) -> usize {
        self.available() * BLOCK_TOKENS
    }

    /// Blocks that can be had, what is kept for reuse among them.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// A block to write to, held by the caller alone; `None` if all are held.
    pub fn take(&mut self) -> Option<u32> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => self.evict()?,
        };
        self.blocks[id as usize].holders = 1;
        Some(id)
    }

    /// Gives the longest unheld content up.
    fn evict(&mut self) -> Option<u32> {
        let (_, id) = self.idle.pop_first()?;
        if let Some(name) = self.blocks[id as usize].name.take() {
            self.named.remove(&name);
        }
        Some(id)
    }

    /// The block of that name, held by the caller too; it must not be written to.
    pub fn reuse(&mut self, name: &Chain) -> Option<u32> {
        let id = *self.named.get(name)?;
        let block = &mut self.blocks[id as usize];
        if block.holders == 0 {
            self.idle.remove(&block.released);
        }
        block.holders += 1;
        Some(id)
    }

    /// Names a full block that the caller holds. The first of equal blocks keeps the name.
    pub fn publish(&mut self, id: u32, name: Chain) {
        let block = &mut self.blocks[id as usize];
        if block.name.is_none() && !self.named.contains_key(&name) {
            block.name = Some(name);
            self.named.insert(name, id);
        }
    }

    /// Lets go of a block that the caller holds.
    pub fn release(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        debug_assert!(block.holders > 0, "block {id} is released by nobody");
        block.holders = block.holders.saturating_sub(1);
        if block.holders > 0 {
            return;
        }
        if block.name.is_none() {
            self.free.push(id);
        } else {
            self.clock += 1;
            block.released = self.clock;
            self.idle.insert(self.clock, id);
        }
    }

    /// Lets go of a sequence's blocks. The end goes first, so that beginnings are kept longest.
    pub fn release_all(&mut self, ids: &mut Vec<u32>) {
        while let Some(id) = ids.pop() {
            self.release(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn equal_beginnings_have_equal_names_and_others_do_not() {
        let first: Vec<u32> = (0..16).collect();
        let other: Vec<u32> = (1..17).collect();
        assert_eq!(chain(&start(None), &first), chain(&start(None), &first));
        assert_ne!(chain(&start(None), &first), chain(&start(None), &other));
        assert_ne!(chain(&start(None), &first), chain(&start(Some(0)), &first));
        assert_ne!(chain(&start(Some(0)), &first), chain(&start(Some(1)), &first));
        assert_ne!(chain(&chain(&start(None), &other), &first), chain(&start(None), &first));
    }

    #[test]
    fn content_outlives_its_holder_until_the_room_is_needed() {
        let mut pool = BlockPool::new(2);
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        pool.publish(a, [1; 16]);
        pool.publish(b, [2; 16]);
        assert_eq!((pool.take(), pool.available()), (None, 0));
        pool.release(a);
        pool.release(b);
        assert_eq!(pool.reuse(&[1; 16]), Some(a));
        let taken = pool.take().unwrap();
        assert_eq!(taken, b);
        assert_eq!(pool.reuse(&[2; 16]), None);
        pool.release(a);
        assert_eq!(pool.reuse(&[1; 16]), Some(a));
    }

    #[test]
    fn a_name_stays_with_the_first_block_that_got_it() {
        let mut pool = BlockPool::new(3);
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        pool.publish(a, [1; 16]);
        pool.publish(b, [1; 16]);
        pool.release(b);
        assert_eq!(pool.reuse(&[1; 16]), Some(a));
        assert_eq!(pool.available(), 2);
    }

    /// A sequence as a scheduler would run it: the blocks that it holds, and how many are full.
    #[derive(Debug, Default)]
    struct Model {
        held: Vec<u32>,
        full: usize,
        tokens: Vec<u32>,
    }

    #[derive(Clone, Debug)]
    enum Action {
        /// A sequence with so many blocks of a prompt of this kind begins.
        Begin {
            kind: u32,
            blocks: usize,
        },
        Grow {
            sequence: usize,
        },
        End {
            sequence: usize,
        },
    }

    fn actions() -> impl Strategy<Value = Vec<Action>> {
        let one = prop_oneof![
            (0..3u32, 1..6usize).prop_map(|(kind, blocks)| Action::Begin { kind, blocks }),
            (0..8usize).prop_map(|sequence| Action::Grow { sequence }),
            (0..8usize).prop_map(|sequence| Action::End { sequence }),
        ];
        prop::collection::vec(one, 1..200)
    }

    fn names(tokens: &[u32]) -> Vec<Chain> {
        let mut name = start(None);
        let next = |block: &[u32]| {
            name = chain(&name, block);
            name
        };
        tokens.chunks_exact(BLOCK_TOKENS).map(next).collect()
    }

    /// Reuses what it can, takes the rest, and "writes" the blocks that it took. `contents` is what
    /// was written last to each block.
    fn begin(pool: &mut BlockPool, contents: &mut [Vec<u32>], kind: u32, blocks: usize) -> Option<Model> {
        let tokens: Vec<u32> = (0..blocks * BLOCK_TOKENS).map(|index| kind * (index as u32 / 32)).collect();
        let mut model = Model { tokens, ..Model::default() };
        for (index, name) in names(&model.tokens).iter().enumerate() {
            match pool.reuse(name) {
                Some(id) => {
                    assert_eq!(contents[id as usize], &model.tokens[..(index + 1) * BLOCK_TOKENS], "wrong content");
                    model.held.push(id);
                    model.full += 1;
                }
                None => match pool.take() {
                    Some(id) => {
                        contents[id as usize] = model.tokens[..(index + 1) * BLOCK_TOKENS].to_vec();
                        model.held.push(id);
                        pool.publish(id, *name);
                        model.full = index + 1;
                    }
                    None => {
                        pool.release_all(&mut model.held);
                        return None;
                    }
                },
            }
        }
        Some(model)
    }

    fn check(pool: &BlockPool, running: &[Model]) {
        let mut holders = HashMap::new();
        running.iter().flat_map(|model| &model.held).for_each(|id| *holders.entry(*id).or_insert(0) += 1);
        for (id, block) in pool.blocks.iter().enumerate() {
            let held = holders.get(&(id as u32)).copied().unwrap_or(0);
            assert_eq!(block.holders, held, "block {id}");
            let free = pool.free.iter().filter(|free| **free == id as u32).count();
            let idle = pool.idle.values().filter(|idle| **idle == id as u32).count();
            assert_eq!(free + idle, usize::from(held == 0), "block {id} is lost or there twice");
        }
        assert!(pool.named.iter().all(|(name, id)| pool.blocks[*id as usize].name.as_ref() == Some(name)));
    }

    proptest! {
        #[test]
        fn no_block_is_lost_or_freed_twice_or_written_while_shared(actions in actions()) {
            let mut pool = BlockPool::new(12);
            let mut contents = vec![Vec::new(); 12];
            let mut running: Vec<Model> = Vec::new();
            for action in actions {
                match action {
                    Action::Begin { kind, blocks } => running.extend(begin(&mut pool, &mut contents, kind, blocks)),
                    Action::Grow { sequence } => {
                        let Some(model) = running.get_mut(sequence) else { continue };
                        if let Some(id) = pool.take() {
                            assert!(!model.held.contains(&id));
                            contents[id as usize] = vec![u32::MAX];
                            model.held.push(id);
                        }
                    }
                    Action::End { sequence } if sequence < running.len() => {
                        pool.release_all(&mut running.swap_remove(sequence).held);
                    }
                    Action::End { .. } => {}
                }
                check(&pool, &running);
                for model in &running {
                    for (index, id) in model.held[..model.full].iter().enumerate() {
                        let expected = &model.tokens[..(index + 1) * BLOCK_TOKENS];
                        prop_assert_eq!(&contents[*id as usize], expected, "a held block was written to");
                    }
                }
            }
        }
    }
}
