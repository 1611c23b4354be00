//! Long conversations cut into pieces between a reply and the next question.
//!
//! Each piece has the system's turn; no pair is lost, the last one neither.

use crate::conversation::{Conversation, Turn};
use crate::report::Split;

/// Cuts conversations longer than `limit` tokens, and counts in `done`. `length` is a conversation's tokens.
///
/// Pieces are as long as the limit allows; a single pair may be longer. Their ids are the conversation's with the
/// number of their first pair.
pub fn split<E>(
    conversation: Conversation,
    limit: usize,
    length: impl Fn(&[Turn]) -> Result<usize, E>,
    done: &mut Split,
) -> Result<Vec<Conversation>, E> {
    let whole = length(&conversation.turns)?;
    let (system, exchange) = conversation.turns.split_at(conversation.opening());
    if whole <= limit || exchange.len() <= 2 {
        done.too_long += u64::from(whole > limit);
        return Ok(vec![conversation]);
    }
    let pairs: Vec<&[Turn]> = exchange.chunks(2).collect();
    let piece = |from: usize, to: usize| [system, &pairs[from..to].concat()].concat();
    let mut pieces = Vec::new();
    let mut from = 0;
    while from < pairs.len() {
        let to = longest(from, pairs.len(), limit, |to| length(&piece(from, to)))?;
        done.too_long += u64::from(to == from + 1 && length(&piece(from, to))? > limit);
        pieces.push(Conversation { id: format!("{}_{from}", conversation.id), turns: piece(from, to) });
        from = to;
    }
    done.conversations += 1;
    done.pieces += pieces.len() as u64;
    Ok(pieces)
}

/// The end of the longest piece from `from` on that keeps within the limit: one pair at least. The length grows with
/// the end; doubling steps and then halving ones look at few pieces that are much longer than the result.
fn longest<E>(from: usize, end: usize, limit: usize, length: impl Fn(usize) -> Result<usize, E>) -> Result<usize, E> {
    let (mut fits, mut step) = (from + 1, 1);
    let mut too_long = end + 1;
    while fits < end && too_long > end {
        let next = (fits + step).min(end);
        match length(next)? <= limit {
            true => fits = next,
            false => too_long = next,
        }
        step *= 2;
    }
    while too_long <= end && fits + 1 < too_long {
        let middle = fits.midpoint(too_long);
        match length(middle)? <= limit {
            true => fits = middle,
            false => too_long = middle,
        }
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::convert::Infallible;

    /// A token a byte, and two for each turn.
    fn length(turns: &[Turn]) -> Result<usize, Infallible> {
        Ok(turns.iter().map(|turn| turn.content.len() + 2).sum())
    }

    fn conversation(system: Option<usize>, pairs: &[(usize, usize)]) -> Conversation {
        let text = |length: usize| "x".repeat(length);
        let mut turns: Vec<_> = system.map(|length| Turn::system(text(length))).into_iter().collect();
        for (index, (question, reply)) in pairs.iter().enumerate() {
            turns.extend([Turn::user(format!("{index}{}", text(*question))), Turn::assistant(text(*reply))]);
        }
        Conversation { id: "c".into(), turns }
    }

    proptest! {
        #[test]
        fn no_pair_is_lost_and_no_piece_could_be_longer(
            system in proptest::option::of(0usize..20),
            pairs in proptest::collection::vec((0usize..40, 0usize..40), 1..20),
            limit in 10usize..200,
        ) {
            let whole = conversation(system, &pairs);
            let mut done = Split::default();
            let pieces = split(whole.clone(), limit, length, &mut done).unwrap();
            let joined: Vec<Turn> = pieces.iter().flat_map(|piece| piece.exchange().to_vec()).collect();
            prop_assert_eq!(&joined[..], whole.exchange());
            for piece in &pieces {
                prop_assert_eq!(&piece.turns[..piece.opening()], &whole.turns[..whole.opening()]);
                prop_assert!(length(&piece.turns).unwrap() <= limit || piece.exchange().len() == 2);
            }
            for two in pieces.windows(2) {
                let more = [&two[0].turns[..], &two[1].exchange()[..2]].concat();
                prop_assert!(length(&more).unwrap() > limit);
            }
            let over = pieces.iter().filter(|piece| length(&piece.turns).unwrap() > limit).count();
            prop_assert_eq!(done.too_long, over as u64);
        }
    }

    #[test]
    fn pieces_have_ids_of_their_own_and_a_short_conversation_keeps_its_own() {
        let mut done = Split::default();
        let pieces = split(conversation(None, &[(10, 10), (10, 10), (10, 10)]), 50, length, &mut done).unwrap();
        assert_eq!(pieces.iter().map(|piece| piece.id.as_str()).collect::<Vec<_>>(), ["c_0", "c_2"]);
        assert_eq!((done.conversations, done.pieces, done.too_long), (1, 2, 0));
        let short = split(conversation(None, &[(1, 1)]), 50, length, &mut done).unwrap();
        assert_eq!(short[0].id, "c");
    }
}
