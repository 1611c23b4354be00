//! Numbered lists whose numbers start again with each item: what conversion makes of lists that are
//! broken up by code or text. A model that learns them counts "1. 1. 1.".

use super::{Candidate, Step, Verdict};
use crate::conversation::Role;
use crate::markdown::prose;

pub struct RestartedLists;

impl Step for RestartedLists {
    fn name(&self) -> &'static str {
        "restarted numbered lists"
    }

    fn apply(&mut self, candidate: &mut Candidate) -> Verdict {
        let replies = candidate.conversation.turns.iter().filter(|turn| turn.role == Role::Assistant);
        match replies.into_iter().any(|turn| restarts(&turn.content)) {
            true => Verdict::dropped("a list counts 1, 1"),
            false => Verdict::Unchanged,
        }
    }
}

/// Whether an item 1 follows an item 1 that no second item followed, without a line between them that introduces a
/// list of its own: a heading, or one that ends with a colon.
fn restarts(text: &str) -> bool {
    // The number of the last item, while its list may go on.
    let mut last = None;
    for line in prose(text) {
        match number(line) {
            Some(1) if last == Some(1) => return true,
            Some(number) => last = Some(number),
            None if introduces(line) => last = None,
            None => {}
        }
    }
    false
}

/// The number of an item that is not inside of another.
fn number(line: &str) -> Option<u32> {
    let digits = line.bytes().take_while(u8::is_ascii_digit).count();
    line[digits..].starts_with(". ").then(|| line[..digits].parse().ok())?
}

fn introduces(line: &str) -> bool {
    let line = line.trim_end_matches(['*', '_', ' ']);
    line.starts_with('#') || line.starts_with("**") || line.ends_with(':')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clean::tests::{S, candidate};

    #[test]
    fn a_list_that_counts_one_one_is_found() {
        for text in ["1. a\n1. b", "To do:\n\n1. a\n\n```\n2. x\n```\n\n1. b\n", "1. a\n\nand then\n\n1. b"] {
            assert!(restarts(text), "{text}");
        }
    }

    #[test]
    fn separate_lists_and_inner_items_are_none() {
        for text in [
            "1. a\n2. b\n\n1. c\n2. d",
            "Cats:\n1. a\n\nDogs:\n1. b",
            "# A\n1. a\n# B\n1. b",
            "1. a\n   1. b",
            "```\n1. a\n1. b\n```",
            "1.5 and 1.5",
            "**A**\n1. a\n\n**B**\n1. b",
        ] {
            assert!(!restarts(text), "{text}");
        }
    }

    #[test]
    fn only_replies_matter() {
        let mut asked = candidate(&[S::Human("1. a\n1. b"), S::Bot("c")]);
        assert_eq!(RestartedLists.apply(&mut asked), Verdict::Unchanged);
        let mut answered = candidate(&[S::Human("a"), S::Bot("1. a\n1. b")]);
        assert_eq!(RestartedLists.apply(&mut answered), Verdict::dropped("a list counts 1, 1"));
    }
}
