//! Conversations that are there already: by id, and by their first question and reply.

use super::{Candidate, Step, Verdict};
use crate::conversation::digest;
use std::collections::HashSet;

/// The same id and the same first question: another snapshot of one conversation. An id alone is not enough, since
/// some files number their records from 0 each.
#[derive(Default)]
pub struct SameId {
    /// Digests of id and first question.
    seen: HashSet<u128>,
}

impl Step for SameId {
    fn name(&self) -> &'static str {
        "duplicates by id"
    }

    fn apply(&mut self, candidate: &mut Candidate) -> Verdict {
        let exchange = candidate.conversation.exchange();
        let question = digest(&exchange[..exchange.len().min(1)]).to_le_bytes();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&question);
        hasher.update(candidate.conversation.id.as_bytes());
        let mut key = [0; 16];
        key.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        match self.seen.insert(u128::from_le_bytes(key)) {
            true => Verdict::Unchanged,
            false => Verdict::dropped("the id and its first question are there already"),
        }
    }
}

/// The same first question and reply, whatever follows.
#[derive(Default)]
pub struct SameFirstPair {
    seen: HashSet<u128>,
}

impl Step for SameFirstPair {
    fn name(&self) -> &'static str {
        "duplicates by first pair"
    }

    fn apply(&mut self, candidate: &mut Candidate) -> Verdict {
        let exchange = candidate.conversation.exchange();
        match self.seen.insert(digest(&exchange[..exchange.len().min(2)])) {
            true => Verdict::Unchanged,
            false => Verdict::dropped("the first question and reply are there already"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clean::tests::{S, candidate};

    #[test]
    fn a_second_snapshot_of_a_conversation_is_dropped_and_a_namesake_is_not() {
        let mut step = SameId::default();
        let is_kept = |step: &mut SameId, turns: &[S]| step.apply(&mut candidate(turns)) == Verdict::Unchanged;
        assert!(is_kept(&mut step, &[S::Human("a"), S::Bot("b")]));
        assert!(!is_kept(&mut step, &[S::Human("a"), S::Bot("c")]));
        assert!(is_kept(&mut step, &[S::Human("b"), S::Bot("c")]));
    }

    #[test]
    fn what_follows_the_first_pair_does_not_matter_nor_does_the_system() {
        let mut step = SameFirstPair::default();
        let mut is_kept = |turns: &[S]| step.apply(&mut candidate(turns)) == Verdict::Unchanged;
        assert!(is_kept(&[S::Human("a"), S::Bot("b"), S::Human("c"), S::Bot("d")]));
        assert!(!is_kept(&[S::System("s"), S::Human("a"), S::Bot("b")]));
        assert!(is_kept(&[S::Human("a"), S::Bot("B")]));
    }
}
