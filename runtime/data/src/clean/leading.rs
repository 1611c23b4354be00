//! A conversation begins with a question: what comes before it is an answer to something unknown.

use super::{Candidate, Step, Verdict};
use crate::conversation::Role;

pub struct LeadingReply;

impl Step for LeadingReply {
    fn name(&self) -> &'static str {
        "first turn not human"
    }

    fn apply(&mut self, candidate: &mut Candidate) -> Verdict {
        let start = candidate.conversation.opening();
        let turns = &mut candidate.conversation.turns;
        let leading = turns[start..].iter().take_while(|turn| turn.role == Role::Assistant).count();
        turns.drain(start..start + leading);
        Verdict::changed(leading)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clean::tests::{S, candidate};

    #[test]
    fn replies_before_the_first_question_are_removed() {
        let mut told = candidate(&[S::System("s"), S::Bot("a"), S::Bot("b"), S::Human("c"), S::Bot("d")]);
        assert_eq!(LeadingReply.apply(&mut told), Verdict::Changed(2));
        assert_eq!(told, candidate(&[S::System("s"), S::Human("c"), S::Bot("d")]));
        assert_eq!(LeadingReply.apply(&mut told), Verdict::Unchanged);
    }
}
