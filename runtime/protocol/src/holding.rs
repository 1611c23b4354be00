//! What a rank says it keeps in memory, and what that is worth at the base of a generation. The coordinator plans by
//! this and ranks move state by it: one rule for both.

use crate::coordinator::Holding;

impl Holding {
    /// Whether the rank has `block` once it stands at `step`: there already, or a step short of it with the finished
    /// gradient.
    pub fn offers(&self, step: u64, block: usize) -> bool {
        let bits = match step.checked_sub(self.step) {
            Some(0) => &self.blocks,
            Some(1) => &self.advancing,
            _ => return false,
        };
        bits.get(block / 8).is_some_and(|byte| byte >> (block % 8) & 1 != 0)
    }
}

/// A bit map of `total` blocks, lowest bit first.
pub fn bits(total: usize, set: impl Iterator<Item = usize>) -> Vec<u8> {
    let mut bits = vec![0; total.div_ceil(8)];
    for index in set {
        bits[index / 8] |= 1 << (index % 8);
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_say_what_was_set() {
        let blocks = bits(19, [0, 7, 8, 18].into_iter());
        assert_eq!(blocks.len(), 3);
        let holding = Holding { step: 4, blocks, ..Holding::default() };
        let set: Vec<usize> = (0..30).filter(|block| holding.offers(4, *block)).collect();
        assert_eq!(set, [0, 7, 8, 18]);
    }

    #[test]
    fn a_step_behind_only_what_can_follow_counts() {
        let holding = Holding { step: 4, blocks: vec![0b110], advancing: vec![0b100], ..Holding::default() };
        let offered = |step: u64| (0..3).filter(|block| holding.offers(step, *block)).collect::<Vec<_>>();
        assert_eq!(offered(4), [1, 2]);
        assert_eq!(offered(5), [2]);
        assert!(offered(6).is_empty() && offered(3).is_empty());
    }
}
