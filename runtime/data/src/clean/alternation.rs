//! Human and assistant speak in turns; where they do not, something was lost in the record.

use super::{Candidate, Step, Verdict};
use crate::conversation::Role;

pub struct Alternation;

impl Step for Alternation {
    fn name(&self) -> &'static str {
        "roles do not alternate"
    }

    fn apply(&mut self, candidate: &mut Candidate) -> Verdict {
        let expected = [Role::User, Role::Assistant].into_iter().cycle();
        let wrong = candidate.conversation.exchange().iter().zip(expected).find(|(turn, role)| turn.role != *role);
        match wrong.map(|(turn, _)| turn.role) {
            None => Verdict::Unchanged,
            Some(Role::User) => Verdict::dropped("two questions in a row"),
            Some(Role::Assistant) => Verdict::dropped("two replies in a row"),
            Some(Role::System) => Verdict::dropped("a system turn inside"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clean::tests::{S, candidate};

    #[test]
    fn whoever_speaks_twice_is_named() {
        let said = |turns: &[S]| Alternation.apply(&mut candidate(turns));
        assert_eq!(said(&[S::System("s"), S::Human("a"), S::Bot("b"), S::Human("c"), S::Bot("d")]), Verdict::Unchanged);
        let twice = [S::Human("a"), S::Human("b"), S::Bot("c")];
        assert_eq!(said(&twice), Verdict::dropped("two questions in a row"));
        let twice = [S::Human("a"), S::Bot("b"), S::Bot("c")];
        assert_eq!(said(&twice), Verdict::dropped("two replies in a row"));
        let inside = [S::Human("a"), S::System("b"), S::Bot("c")];
        assert_eq!(said(&inside), Verdict::dropped("a system turn inside"));
    }
}
