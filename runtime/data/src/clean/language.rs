//! Only one language, where that is wanted. A text that is too short or too mixed to tell is kept,
//! and counted as such.

use super::{Candidate, Reason, Step, Verdict};
use crate::language::{self, Language};

pub struct LanguageFilter {
    wanted: Option<Language>,
}

impl LanguageFilter {
    /// `None` only looks.
    pub fn new(wanted: Option<Language>) -> Self {
        Self { wanted }
    }
}

impl Step for LanguageFilter {
    fn name(&self) -> &'static str {
        "language"
    }

    fn apply(&mut self, candidate: &mut Candidate) -> Verdict {
        let found = language::of(&candidate.conversation);
        candidate.language = Some(found);
        match self.wanted.is_none_or(|wanted| found.may_be(wanted)) {
            true => Verdict::Unchanged,
            false => Verdict::Dropped(Reason { why: format!("language {found}").into(), detail: None }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clean::tests::{S, candidate};
    use crate::language::Found;

    const GERMAN: &str = "Die Hauptstadt von Frankreich ist Paris, und sie liegt an der Seine. Sie ist seit vielen \
                          Jahrhunderten der Mittelpunkt des Landes und zieht jedes Jahr Millionen von Besuchern an.";

    #[test]
    fn another_language_is_dropped_and_named() {
        let mut step = LanguageFilter::new(Language::parse("en"));
        let mut german = candidate(&[S::Human("Was ist die Hauptstadt von Frankreich?"), S::Bot(GERMAN)]);
        let reason = Reason { why: "language de".into(), detail: None };
        assert_eq!(step.apply(&mut german), Verdict::Dropped(reason));
        assert_eq!(LanguageFilter::new(Language::parse("de")).apply(&mut german), Verdict::Unchanged);
        assert_eq!(LanguageFilter::new(None).apply(&mut german), Verdict::Unchanged);
        assert_eq!(german.language, Language::parse("de").map(Found::Language));
    }

    #[test]
    fn what_cannot_be_told_is_kept() {
        let mut short = candidate(&[S::Human("Ok?"), S::Bot("Ok.")]);
        assert_eq!(LanguageFilter::new(Language::parse("de")).apply(&mut short), Verdict::Unchanged);
        assert_eq!(short.language, Some(Found::Nothing));
    }
}
