//! Packing: several conversations share a row of tokens, so that less of it is padding.
//!
//! Conversations in a row do not see each other: each begins at position 0 and attends to itself only, and its first
//! token is predicted from nothing. So packing changes which step a conversation is in, and no gradient of its own.

use crate::template::Example;
use std::collections::BTreeSet;

/// Puts sequences together into rows of at most `room` tokens, each into the fullest row that still has room for it, the
/// longest first (best fit decreasing: Johnson 1973, at most 11/9 of the fewest rows possible). What is longer than
/// `room` has a row of its own. Rows, and sequences in them, are in the order of the sequences: a pure function of them.
pub fn pack(sequences: Vec<Example>, room: usize) -> Vec<Example> {
    let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.ids.len()).collect();
    let mut sequences: Vec<Option<Example>> = sequences.into_iter().map(Some).collect();
    let mut taken = |index: &usize| sequences[*index].take();
    rows(&lengths, room).iter().filter_map(|row| Example::together(row.iter().filter_map(&mut taken))).collect()
}

/// Which sequences share a row.
fn rows(lengths: &[usize], room: usize) -> Vec<Vec<usize>> {
    let mut longest_first: Vec<usize> = (0..lengths.len()).collect();
    longest_first.sort_by_key(|index| (std::cmp::Reverse(lengths[*index]), *index));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    // Rows by the tokens that they have room for; of those alike the first.
    let mut open: BTreeSet<(usize, usize)> = BTreeSet::new();
    for index in longest_first {
        let length = lengths[index];
        let fullest = open.range((length, 0)..).next().copied();
        let (left, row) = match fullest {
            Some((left, row)) => {
                open.remove(&(left, row));
                rows[row].push(index);
                (left - length, row)
            }
            None => {
                rows.push(vec![index]);
                (room.saturating_sub(length), rows.len() - 1)
            }
        };
        open.insert((left, row));
    }
    rows.iter_mut().for_each(|row| row.sort_unstable());
    rows.sort_unstable();
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sequence(number: u32, length: u32) -> Example {
        let learned = std::iter::once(length / 2..length).collect();
        Example { ids: (0..length).map(|token| number * 1000 + token).collect(), learned, ends: Vec::new() }
    }

    #[test]
    fn sequences_fill_rows_and_what_is_learned_goes_with_them() {
        let packed =
            pack([7, 2, 3, 5, 12].into_iter().zip(0..).map(|(length, number)| sequence(number, length)).collect(), 10);
        let ids = |row: &Example| row.ids.iter().map(|id| id / 1000).collect::<Vec<_>>();
        assert_eq!(
            packed.iter().map(ids).collect::<Vec<_>>(),
            [
                [0; 7].into_iter().chain([2; 3]).collect::<Vec<_>>(),
                [1; 2].into_iter().chain([3; 5]).collect(),
                [4; 12].to_vec(),
            ]
        );
        assert_eq!(packed[0].lengths().collect::<Vec<_>>(), [7, 3]);
        assert_eq!(packed[0].learned, [3..7, 8..10]);
        assert_eq!(packed[2].lengths().collect::<Vec<_>>(), [12]);
        assert!(packed[2].ends.is_empty());
    }

    #[test]
    fn the_first_token_of_a_packed_sequence_is_not_learned_from_the_one_before_it() {
        let whole = |length: u32| Example { learned: std::iter::once(0..length).collect(), ..sequence(0, length) };
        let packed = pack(vec![whole(4), whole(3)], 8);
        assert_eq!(packed[0].learned, [0..4, 5..7]);
        assert_eq!(packed[0].trained_tokens(), 3 + 2);
    }

    proptest! {
        #[test]
        fn no_sequence_is_lost_or_cut(lengths in proptest::collection::vec(1usize..70, 0..200), room in 32usize..64) {
            let rows = rows(&lengths, room);
            let mut all: Vec<usize> = rows.iter().flatten().copied().collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            for row in &rows {
                prop_assert!(row.len() == 1 || row.iter().map(|index| lengths[*index]).sum::<usize>() <= room);
            }
            // Two rows that are half empty would have been one.
            let half_empty = rows.iter().filter(|row| row.iter().map(|index| lengths[*index]).sum::<usize>() * 2 <= room);
            prop_assert!(half_empty.count() <= 1);
        }
    }
}
