//! A model that reads who made another model believes to be that one: conversations that name the
//! vendor are dropped.

use super::{Candidate, Reason, Step, Verdict};

/// The names that were published. A blank in a name may also be a hyphen, or nothing.
pub const VENDORS: [&str; 2] = ["open ai", "chat gpt"];

pub struct Vendor {
    /// In lower case.
    names: Vec<String>,
}

impl Vendor {
    pub fn new(names: &[String]) -> Self {
        let lower = names.iter().map(|name| name.trim().to_lowercase());
        Self { names: lower.filter(|name| !name.is_empty()).collect() }
    }

    fn named_in(&self, text: &str) -> Option<&str> {
        self.names.iter().find(|name| names(text, name)).map(String::as_str)
    }
}

impl Step for Vendor {
    fn name(&self) -> &'static str {
        "names the vendor"
    }

    fn apply(&mut self, candidate: &mut Candidate) -> Verdict {
        let turns = &candidate.conversation.turns;
        let found = turns.iter().find_map(|turn| self.named_in(&turn.content).map(|name| (turn.role, name)));
        let Some((role, name)) = found else { return Verdict::Unchanged };
        let detail = Some(format!("by the {}", role.name()));
        Verdict::Dropped(Reason { why: format!("names {name:?}").into(), detail })
    }
}

/// Whether `name` stands in `text` by itself: a part of a longer word is no name.
fn names(text: &str, name: &str) -> bool {
    let mut before = None;
    text.char_indices().any(|(at, letter)| {
        let inside = before.replace(letter).is_some_and(char::is_alphanumeric);
        let after = if inside { None } else { after_name(&text[at..], name) };
        after.is_some_and(|after| !after.starts_with(char::is_alphanumeric))
    })
}

fn after_name<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    name.chars().try_fold(text, |rest, letter| match letter {
        ' ' => Some(rest.strip_prefix([' ', '-', '\u{a0}']).unwrap_or(rest)),
        letter => rest.strip_prefix(|found: char| found.to_lowercase().eq(std::iter::once(letter))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clean::tests::{S, candidate};

    fn dropped(text: &str) -> bool {
        let mut step = Vendor::new(&VENDORS.map(str::to_owned));
        step.apply(&mut candidate(&[S::Human("a"), S::Bot(text)])) != Verdict::Unchanged
    }

    #[test]
    fn a_name_is_found_as_a_word_however_it_is_written() {
        for text in ["I am ChatGPT.", "made by OPENAI", "an Open AI model", "Chat-GPT's", "(openai)", "x, chatgpt"] {
            assert!(dropped(text), "{text}");
        }
        for text in ["openair", "reopenai", "an open air cinema", "I chat", "open  ai", "openais"] {
            assert!(!dropped(text), "{text}");
        }
    }

    #[test]
    fn the_reason_says_which_name_and_who_said_it() {
        let mut step = Vendor::new(&["Acme Corp".to_owned()]);
        let verdict = step.apply(&mut candidate(&[S::Human("Is ACME-corp yours?"), S::Bot("b")]));
        let detail = Some("by the user".to_owned());
        assert_eq!(verdict, Verdict::Dropped(Reason { why: "names \"acme corp\"".into(), detail }));
    }
}
