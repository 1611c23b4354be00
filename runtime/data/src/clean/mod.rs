//! Cleaning as Vicuna's authors published it, less its bugs.
//!
//! A step is a file: it changes a conversation, keeps it or drops it for a reason, and all of that is
//! counted. Steps run in the order of [`Cleaning::steps`]: first what repairs, then what looks at the
//! repaired text, last what compares conversations, so that nothing is a duplicate of what was
//! dropped.

mod alternation;
mod control_tokens;
mod counters;
mod duplicates;
mod empty;
mod fences;
mod html;
mod language;
mod leading;
mod lists;
mod near_duplicates;
mod trailing;
mod vendor;

use crate::conversation::{Conversation, Role};
use crate::language::{Found, Language};
use crate::read::ReadError;
use crate::report::{Dropped, Report, StepReport};
use std::borrow::Cow;

pub use vendor::VENDORS;

/// What a step did to a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Unchanged,
    /// That many turns were changed or removed.
    Changed(usize),
    Dropped(Reason),
}

impl Verdict {
    fn changed(turns: usize) -> Self {
        if turns == 0 { Self::Unchanged } else { Self::Changed(turns) }
    }

    fn dropped(why: impl Into<Cow<'static, str>>) -> Self {
        Self::Dropped(Reason { why: why.into(), detail: None })
    }
}

/// Why a conversation was dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// One of few: reasons are counted by it.
    pub why: Cow<'static, str>,
    /// What is particular to this conversation.
    pub detail: Option<String>,
}

/// A conversation on its way through the steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub conversation: Conversation,
    /// The language, where a step looked for it.
    pub language: Option<Found>,
}

impl Candidate {
    fn new(conversation: Conversation) -> Self {
        Self { conversation, language: None }
    }

    /// Rewrites what turns of this role say where `rewrite` gives something; counts them.
    fn rewrite(&mut self, whose: Option<Role>, mut rewrite: impl FnMut(&str) -> Option<String>) -> usize {
        let mut changed = 0;
        for turn in &mut self.conversation.turns {
            if whose.is_none_or(|role| role == turn.role)
                && let Some(content) = rewrite(&turn.content)
            {
                turn.content = content;
                changed += 1;
            }
        }
        changed
    }
}

/// One step of cleaning. What it does depends on the conversations before this one at most.
trait Step {
    /// In the report, as a few words.
    fn name(&self) -> &'static str;
    fn apply(&mut self, candidate: &mut Candidate) -> Verdict;
}

/// Which steps there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cleaning {
    /// Every published step; else only those without which a conversation cannot be trained on.
    pub published: bool,
    /// Only conversations in this language, and those whose language cannot be told.
    pub language: Option<Language>,
    /// Names of which no conversation may speak; [`VENDORS`] are the published ones.
    pub vendors: Vec<String>,
}

impl Cleaning {
    /// What a chat model cannot be trained without: alternating roles, replies, no empty turns.
    pub fn necessary() -> Self {
        Self { published: false, language: None, vendors: Vec::new() }
    }

    /// Everything that was published.
    pub fn published() -> Self {
        Self { published: true, language: None, vendors: VENDORS.map(str::to_owned).to_vec() }
    }

    fn steps(&self) -> Vec<Box<dyn Step>> {
        let mut steps: Vec<Box<dyn Step>> = Vec::new();
        if self.published {
            steps.extend([
                Box::new(html::HtmlToMarkdown::default()) as Box<dyn Step>,
                Box::new(fences::CopyCode),
                Box::new(counters::Counters),
            ]);
        }
        steps.extend([
            Box::new(leading::LeadingReply) as Box<dyn Step>,
            Box::new(trailing::TrailingQuestion),
            Box::new(alternation::Alternation),
            Box::new(empty::Empty),
        ]);
        if self.published {
            steps.extend([
                Box::new(vendor::Vendor::new(&self.vendors)) as Box<dyn Step>,
                Box::new(lists::RestartedLists),
                Box::new(control_tokens::ControlTokens),
            ]);
        }
        if self.published || self.language.is_some() {
            steps.push(Box::new(language::LanguageFilter::new(self.language)));
        }
        if self.published {
            steps.extend([
                Box::new(duplicates::SameId::default()) as Box<dyn Step>,
                Box::new(duplicates::SameFirstPair::default()),
                Box::new(near_duplicates::NearDuplicates::new()),
            ]);
        }
        steps
    }
}

/// Runs the steps over conversations that come one by one.
pub struct Cleaner {
    /// Records that are no conversations are left out; else they are errors.
    malformed: Option<StepReport>,
    steps: Vec<(Box<dyn Step>, StepReport)>,
    report: Report,
}

impl std::fmt::Debug for Cleaner {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Cleaner").field("report", &self.report).finish_non_exhaustive()
    }
}

impl Cleaner {
    pub fn new(cleaning: &Cleaning) -> Self {
        let steps = cleaning.steps().into_iter().map(|step| {
            let report = StepReport::new(step.name());
            (step, report)
        });
        let malformed = cleaning.published.then(|| StepReport::new("malformed records"));
        Self { malformed, steps: steps.collect(), report: Report::default() }
    }

    /// What was read, after all steps. Fails where it could not be read, unless cleaning leaves such records out.
    pub fn clean_read(&mut self, read: Result<Conversation, ReadError>) -> Result<Option<Conversation>, ReadError> {
        let error = match read {
            Ok(conversation) => return Ok(self.clean(conversation)),
            Err(error) => error,
        };
        let Some((report, (at, why))) = self.malformed.as_mut().zip(error.problem.malformed()) else {
            return Err(error);
        };
        self.report.records += 1;
        report.malformed(&error.file, at, why);
        Ok(None)
    }

    /// The conversation as it is after all steps, or none if one dropped it.
    pub fn clean(&mut self, conversation: Conversation) -> Option<Conversation> {
        self.report.records += 1;
        if let Some(report) = &mut self.malformed {
            report.unchanged();
        }
        let mut candidate = Candidate::new(conversation);
        for (step, report) in &mut self.steps {
            match step.apply(&mut candidate) {
                Verdict::Unchanged => report.unchanged(),
                Verdict::Changed(turns) => report.changed(turns),
                Verdict::Dropped(reason) => {
                    report.dropped(Dropped::new(&candidate.conversation, &reason));
                    return None;
                }
            }
        }
        self.report.kept(&candidate.conversation, candidate.language);
        Some(candidate.conversation)
    }

    /// What was done until now.
    pub fn report(&self) -> Report {
        let steps = self.malformed.iter().chain(self.steps.iter().map(|(_, step)| step)).cloned().collect();
        Report { steps, ..self.report.clone() }
    }
}

#[cfg(test)]
mod tests;
