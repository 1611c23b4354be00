//! A turn that says nothing teaches to say nothing.

use super::{Candidate, Step, Verdict};

pub struct Empty;

impl Step for Empty {
    fn name(&self) -> &'static str {
        "empty turns"
    }

    fn apply(&mut self, candidate: &mut Candidate) -> Verdict {
        let turns = candidate.conversation.exchange();
        if turns.is_empty() {
            Verdict::dropped("no turn is left")
        } else if turns.iter().any(|turn| turn.content.trim().is_empty()) {
            Verdict::dropped("a turn is empty")
        } else {
            Verdict::Unchanged
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clean::tests::{S, candidate};

    #[test]
    fn conversations_with_a_turn_that_says_nothing_are_dropped() {
        let said = |turns: &[S]| Empty.apply(&mut candidate(turns));
        assert_eq!(said(&[S::Human("a"), S::Bot(" \n")]), Verdict::dropped("a turn is empty"));
        assert_eq!(said(&[S::System("s")]), Verdict::dropped("no turn is left"));
        assert_eq!(said(&[S::Human("a"), S::Bot("b")]), Verdict::Unchanged);
    }
}
