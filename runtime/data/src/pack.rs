//! Packing: several conversations share a row of tokens, so that less of it is padding.
//!
//! Conversations in a row do not see each other: each begins at position 0 and attends to itself only, and its first
//! token is predicted from nothing. So packing changes which step a conversation is in, and no gradient of its own.

use std::collections::BTreeSet;

/// Which sequences, of these lengths, share a row of at most `room` tokens: each goes into the fullest row that still has
/// room for it, the longest first (best fit decreasing: Johnson 1973, at most 11/9 of the fewest rows possible). What is
/// longer than `room` has a row of its own. Rows, and sequences in them, are in the order of the sequences: a pure
/// function of them.
pub(crate) fn rows(lengths: &[u32], room: usize) -> Vec<Vec<u32>> {
    let mut longest_first: Vec<u32> = (0..lengths.len() as u32).collect();
    longest_first.sort_by_key(|index| (std::cmp::Reverse(lengths[*index as usize]), *index));
    let mut rows: Vec<Vec<u32>> = Vec::new();
    // Rows by the tokens that they have room for; of those alike the first.
    let mut open: BTreeSet<(usize, usize)> = BTreeSet::new();
    for index in longest_first {
        let length = lengths[index as usize] as usize;
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

    proptest! {
        #[test]
        fn no_sequence_is_lost_or_cut(lengths in proptest::collection::vec(1u32..70, 0..200), room in 32usize..64) {
            let rows = rows(&lengths, room);
            let tokens = |row: &[u32]| row.iter().map(|index| lengths[*index as usize] as usize).sum::<usize>();
            let mut all: Vec<u32> = rows.iter().flatten().copied().collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len() as u32).collect::<Vec<_>>());
            for row in &rows {
                prop_assert!(row.len() == 1 || tokens(row) <= room);
            }
            // Two rows that are half empty would have been one.
            let half_empty = rows.iter().filter(|row| tokens(row) * 2 <= room);
            prop_assert!(half_empty.count() <= 1);
        }
    }
}
