//! A question at the end has no reply to learn from.

use super::{Candidate, Step, Verdict};
use crate::conversation::Role;

pub struct TrailingQuestion;

impl Step for TrailingQuestion {
    fn name(&self) -> &'static str {
        "last turn human"
    }

    fn apply(&mut self, candidate: &mut Candidate) -> Verdict {
        let start = candidate.conversation.opening();
        let turns = &mut candidate.conversation.turns;
        let trailing = turns[start..].iter().rev().take_while(|turn| turn.role == Role::User).count();
        turns.truncate(turns.len() - trailing);
        match turns.len() == start && trailing > 0 {
            true => Verdict::dropped("nothing but questions"),
            false => Verdict::changed(trailing),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clean::tests::{S, candidate};

    #[test]
    fn questions_at_the_end_are_removed() {
        let mut asked = candidate(&[S::Human("a"), S::Bot("b"), S::Human("c"), S::Human("d")]);
        assert_eq!(TrailingQuestion.apply(&mut asked), Verdict::Changed(2));
        assert_eq!(asked, candidate(&[S::Human("a"), S::Bot("b")]));
        assert_eq!(TrailingQuestion.apply(&mut asked), Verdict::Unchanged);
        let only = TrailingQuestion.apply(&mut candidate(&[S::System("s"), S::Human("a")]));
        assert_eq!(only, Verdict::dropped("nothing but questions"));
    }
}
