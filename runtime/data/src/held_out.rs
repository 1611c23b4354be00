//! Conversations put aside for evaluation: chosen by what is said in them, so that the choice does not change when
//! others come or go, and so that a conversation that occurs twice is never on both sides.

use crate::conversation::Conversation;

/// Whether a conversation is among the `share` (0 to 1) of all that is put aside.
pub fn is_held_out(conversation: &Conversation, share: f64) -> bool {
    let high = (conversation.digest() >> 64) as u64;
    // 53 bits, which a double holds exactly.
    ((high >> 11) as f64) < share * (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::Turn;

    fn conversation(number: usize, id: &str) -> Conversation {
        Conversation { id: id.into(), turns: vec![Turn::user(number.to_string()), Turn::assistant("a")] }
    }

    #[test]
    fn about_the_share_is_put_aside() {
        let count = |share| (0..10_000).filter(|n| is_held_out(&conversation(*n, "x"), share)).count();
        assert!((400..600).contains(&count(0.05)), "{}", count(0.05));
        assert_eq!((count(0.0), count(1.0)), (0, 10_000));
    }

    #[test]
    fn the_choice_depends_on_what_is_said_alone() {
        for number in 0..200 {
            assert_eq!(is_held_out(&conversation(number, "x"), 0.5), is_held_out(&conversation(number, "y"), 0.5));
            let in_small = is_held_out(&conversation(number, "x"), 0.1);
            assert!(!in_small || is_held_out(&conversation(number, "x"), 0.2), "a larger share holds the smaller one");
        }
    }
}
