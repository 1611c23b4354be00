//! The canonical order of additions: a binary tree over micro-batch indexes.
//!
//! Floating-point addition is not associative, so a sum is defined by its tree. Ours depends on the
//! number of micro-batches alone: node (level k, index j) is the sum of its two children and covers
//! the leaves `[j·2^k, (j+1)·2^k)`; a child without leaves is skipped. A rank that runs a contiguous
//! range of leaves may sum whole nodes by itself; whoever gets all nodes finishes the tree.

use std::ops::Range;

/// A node of the tree; level 0 is a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    pub level: u8,
    pub index: u32,
}

impl Node {
    pub fn leaf(index: u32) -> Self {
        Self { level: 0, index }
    }

    fn parent(self) -> Self {
        Self { level: self.level + 1, index: self.index / 2 }
    }

    fn is_left_of(self, other: Self) -> bool {
        self.level == other.level && self.index.is_multiple_of(2) && other.index == self.index + 1
    }
}

/// What can be added up.
pub trait Summand {
    /// Adds `right`, which comes later in the order.
    fn add(&mut self, right: Self);
}

impl Summand for () {
    fn add(&mut self, (): ()) {}
}

impl Summand for Vec<f32> {
    fn add(&mut self, right: Self) {
        for (sum, value) in self.iter_mut().zip(right) {
            *sum += value;
        }
    }
}

/// Adds nodes in index order and keeps at most one per level.
#[derive(Debug)]
pub struct TreeSum<T> {
    stack: Vec<(Node, T)>,
}

impl<T> Default for TreeSum<T> {
    fn default() -> Self {
        Self { stack: Vec::new() }
    }
}

impl<T: Summand> TreeSum<T> {
    /// Takes the next node in order, and adds siblings as soon as both are there.
    pub fn push(&mut self, mut node: Node, mut value: T) {
        while let Some((left, mut sum)) = self.stack.pop_if(|(top, _)| top.is_left_of(node)) {
            sum.add(value);
            value = sum;
            node = left.parent();
        }
        self.stack.push((node, value));
    }

    /// The sums of the whole nodes seen so far, in order.
    pub fn into_nodes(self) -> Vec<(Node, T)> {
        self.stack
    }

    /// The root, once every leaf is in: subtrees at the right edge rise past their absent siblings.
    pub fn finish(mut self) -> Option<T> {
        let (mut node, mut value) = self.stack.pop()?;
        while let Some((left, _)) = self.stack.last() {
            if left.is_left_of(node) {
                let (left, mut sum) = self.stack.pop()?;
                sum.add(value);
                value = sum;
                node = left.parent();
            } else {
                node = node.parent();
            }
        }
        Some(value)
    }
}

/// The nodes that a rank with these leaves sends.
pub fn nodes(leaves: Range<u32>) -> Vec<Node> {
    let mut sum = TreeSum::default();
    for index in leaves {
        sum.push(Node::leaf(index), ());
    }
    sum.into_nodes().into_iter().map(|(node, ())| node).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Records the shape of the additions instead of their result.
    impl Summand for String {
        fn add(&mut self, right: Self) {
            *self = format!("({self}+{right})");
        }
    }

    fn direct(range: Range<u32>, present: u32) -> Option<String> {
        if range.start >= present {
            return None;
        }
        if range.len() == 1 {
            return Some(range.start.to_string());
        }
        let middle = range.start + range.len() as u32 / 2;
        let left = direct(range.start..middle, present);
        match (left, direct(middle..range.end, present)) {
            (Some(left), Some(right)) => Some(format!("({left}+{right})")),
            (left, right) => left.or(right),
        }
    }

    fn by_ranks(count: u32, bounds: &[u32]) -> String {
        let mut whole = TreeSum::default();
        for pair in bounds.windows(2) {
            let mut own = TreeSum::default();
            for index in pair[0]..pair[1] {
                own.push(Node::leaf(index), index.to_string());
            }
            let parts = own.into_nodes();
            let sent: Vec<Node> = parts.iter().map(|(node, _)| *node).collect();
            assert_eq!(sent, nodes(pair[0]..pair[1]));
            for (node, value) in parts {
                whole.push(node, value);
            }
        }
        assert_eq!(*bounds.last().unwrap(), count);
        whole.finish().unwrap()
    }

    proptest! {
        #[test]
        fn every_split_adds_in_the_same_order(count in 1u32..70, mut cuts in prop::collection::vec(0u32..70, 0..6)) {
            cuts.iter_mut().for_each(|cut| *cut = (*cut).min(count));
            cuts.extend([0, count]);
            cuts.sort_unstable();
            let size = count.next_power_of_two();
            prop_assert_eq!(Some(by_ranks(count, &cuts)), direct(0..size, count));
        }
    }

    #[test]
    fn six_leaves_on_three_ranks() {
        assert_eq!(by_ranks(6, &[0, 2, 4, 6]), "(((0+1)+(2+3))+(4+5))");
    }
}
