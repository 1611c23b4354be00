//! What preparing did to the data and what is left of it, as JSON and for people.

use crate::clean::Reason;
use crate::conversation::{Conversation, Role};
use crate::language::Found;
use crate::read::Place;
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// Conversations that are shown of each kind, at most.
const SAMPLES: usize = 3;
/// Letters that are shown of a turn, at most.
const EXCERPT: usize = 120;
/// Different reasons that are counted by themselves in a step, at most.
const REASONS_LIMIT: usize = 200;

/// What came in, what each step did, and what is left.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Conversations read.
    pub records: u64,
    /// Files that were not read, since their names do not end like data.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub skipped_files: Vec<String>,
    pub steps: Vec<StepReport>,
    pub kept: Kept,
    /// What splitting at a token limit did, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split: Option<Split>,
    /// Conversations that were put aside for evaluation.
    pub held_out: u64,
    /// What encoding did, where there was a tokenizer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoded: Option<Encoding>,
}

/// One step of cleaning.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StepReport {
    pub step: &'static str,
    pub seen: u64,
    pub kept: u64,
    /// Conversations of which something was changed, and turns in them.
    pub changed: u64,
    pub changed_turns: u64,
    pub dropped: u64,
    /// How many were dropped for each reason.
    pub reasons: BTreeMap<String, u64>,
    /// The first ones that were dropped.
    pub samples: Vec<Dropped>,
}

impl StepReport {
    pub(crate) fn new(step: &'static str) -> Self {
        Self { step, ..Self::default() }
    }

    pub(crate) fn unchanged(&mut self) {
        self.seen += 1;
        self.kept += 1;
    }

    pub(crate) fn changed(&mut self, turns: usize) {
        self.unchanged();
        self.changed += 1;
        self.changed_turns += turns as u64;
    }

    pub(crate) fn dropped(&mut self, dropped: Dropped) {
        self.seen += 1;
        self.dropped += 1;
        let known = self.reasons.contains_key(&dropped.why) || self.reasons.len() < REASONS_LIMIT;
        let why = if known { dropped.why.clone() } else { "other".to_owned() };
        *self.reasons.entry(why).or_default() += 1;
        if self.samples.len() < SAMPLES {
            self.samples.push(dropped);
        }
    }
}

/// A conversation that was dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dropped {
    pub id: String,
    pub why: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// How it begins.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub begins: String,
}

impl Dropped {
    pub(crate) fn new(conversation: &Conversation, reason: &Reason) -> Self {
        let (why, detail) = (reason.why.clone().into_owned(), reason.detail.clone());
        let begins = conversation.turns.first().map(|turn| excerpt(&turn.content)).unwrap_or_default();
        Self { id: conversation.id.clone(), why, detail, begins }
    }
}

impl StepReport {
    /// A record that is no conversation.
    pub(crate) fn malformed(&mut self, file: &Path, at: Place, why: String) {
        let name = file.file_name().unwrap_or(file.as_os_str()).display();
        self.dropped(Dropped { id: format!("{at} of {name}"), why, detail: None, begins: String::new() });
    }
}

/// What is left after cleaning.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Kept {
    pub conversations: u64,
    /// Turns by role.
    pub roles: BTreeMap<&'static str, u64>,
    /// Turns of a conversation.
    pub turns: Lengths,
    /// Letters of a conversation.
    pub characters: Lengths,
    /// Conversations by language, or by script where it is unclear, where it was looked at.
    pub languages: BTreeMap<String, u64>,
    /// The first few.
    pub samples: Vec<Sample>,
}

/// A conversation that was kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sample {
    pub id: String,
    /// Role and beginning of each of the first turns.
    pub turns: Vec<(Role, String)>,
}

impl Sample {
    fn of(conversation: &Conversation) -> Self {
        let turns = conversation.turns.iter().take(4).map(|turn| (turn.role, excerpt(&turn.content)));
        Self { id: conversation.id.clone(), turns: turns.collect() }
    }
}

/// What splitting did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Split {
    /// Tokens of a piece, at most.
    pub at: usize,
    /// Conversations that were longer, and the pieces made of them.
    pub conversations: u64,
    pub pieces: u64,
    /// Pieces of one question and reply that are longer all the same.
    pub too_long: u64,
}

/// What encoding did.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Encoding {
    /// Sequences to train on.
    pub sequences: u64,
    /// Sequences to evaluate on.
    pub held_out: u64,
    /// Tokens of the sequences to train on, and those of them that are learned.
    pub tokens: u64,
    pub trained_tokens: u64,
    /// Conversations cut at the length limit.
    pub cut: u64,
    /// Conversations left out because no token of a reply is within the limit.
    pub without_reply: u64,
    /// Tokens of a sequence to train on.
    pub lengths: Lengths,
    /// Rows that the sequences to train on are packed into; 0 where each is by itself.
    #[serde(skip_serializing_if = "is_zero")]
    pub rows: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Report {
    pub(crate) fn kept(&mut self, conversation: &Conversation, language: Option<Found>) {
        let kept = &mut self.kept;
        kept.conversations += 1;
        for turn in &conversation.turns {
            *kept.roles.entry(turn.role.name()).or_default() += 1;
        }
        kept.turns.add(conversation.turns.len());
        kept.characters.add(conversation.turns.iter().map(|turn| turn.content.chars().count()).sum());
        if let Some(language) = language {
            *kept.languages.entry(language.to_string()).or_default() += 1;
        }
        if kept.samples.len() < SAMPLES {
            kept.samples.push(Sample::of(conversation));
        }
    }

    /// Conversations dropped by all steps.
    pub fn dropped(&self) -> u64 {
        self.steps.iter().map(|step| step.dropped).sum()
    }

    /// One line of it.
    pub fn summary(&self) -> String {
        let mut summary = format!("{} of {} conversations kept", self.kept.conversations, self.records);
        for step in self.steps.iter().filter(|step| step.dropped > 0) {
            summary.push_str(&format!("; {} dropped: {}", step.dropped, step.step));
        }
        summary
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "{} of {} conversations kept", self.kept.conversations, self.records)?;
        writeln!(out, "\n{:<28}{:>9}{:>9}{:>9}  dropped because", "step", "kept", "changed", "dropped")?;
        for step in &self.steps {
            let reasons: Vec<_> = step.reasons.iter().map(|(why, times)| format!("{why} ({times})")).collect();
            let (name, reasons) = (step.step, reasons.join(", "));
            writeln!(out, "{name:<28}{:>9}{:>9}{:>9}  {reasons}", step.kept, step.changed, step.dropped)?;
        }
        writeln!(out, "\nturns           {}", counts(&self.kept.roles))?;
        writeln!(out, "turns each      {}", self.kept.turns)?;
        writeln!(out, "characters each {}", self.kept.characters)?;
        if !self.kept.languages.is_empty() {
            writeln!(out, "languages       {}", counts(&self.kept.languages))?;
        }
        if let Some(split) = self.split {
            writeln!(out, "split           {split}")?;
        }
        if self.held_out > 0 {
            writeln!(out, "held out        {} conversations", self.held_out)?;
        }
        if let Some(encoded) = &self.encoded {
            writeln!(out, "encoded         {encoded}")?;
            writeln!(out, "tokens each     {}", encoded.lengths)?;
        }
        if !self.skipped_files.is_empty() {
            writeln!(out, "not read        {}", self.skipped_files.join(", "))?;
        }
        self.write_samples(out)
    }
}

impl Report {
    fn write_samples(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (step, dropped) in self.steps.iter().flat_map(|step| step.samples.iter().map(move |it| (step.step, it))) {
            let detail = dropped.detail.as_ref().map(|detail| format!(", {detail}")).unwrap_or_default();
            write!(out, "dropped {} ({step}: {}{detail})", dropped.id, dropped.why)?;
            match dropped.begins.as_str() {
                "" => writeln!(out)?,
                begins => writeln!(out, ": {begins:?}")?,
            }
        }
        for sample in &self.kept.samples {
            writeln!(out, "kept {}:", sample.id)?;
            for (role, text) in &sample.turns {
                writeln!(out, "  {}: {text:?}", role.name())?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Split {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Split { at, conversations, pieces, too_long } = self;
        write!(out, "{conversations} conversations longer than {at} tokens into {pieces} pieces; ")?;
        write!(out, "{too_long} pieces of one question and reply are longer still")
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Encoding { sequences, held_out, tokens, trained_tokens, cut, without_reply, rows, .. } = self;
        write!(out, "{sequences} sequences, {tokens} tokens, {trained_tokens} of them learned; ")?;
        if *rows > 0 {
            write!(out, "packed into {rows} rows of {} tokens in the mean; ", tokens / rows)?;
        }
        write!(out, "{held_out} sequences held out; {cut} cut at the length limit; ")?;
        write!(out, "{without_reply} left out because no reply fits in it")
    }
}

/// Lengths of many things: all are kept, four bytes each, so that percentiles are exact.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lengths(Vec<u32>);

/// Lengths in a few numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Percentiles {
    pub least: u32,
    pub mean: f64,
    pub median: u32,
    pub p90: u32,
    pub p99: u32,
    pub most: u32,
}

impl Lengths {
    pub fn add(&mut self, length: usize) {
        self.0.push(u32::try_from(length).unwrap_or(u32::MAX));
    }

    /// None where there is nothing.
    pub fn percentiles(&self) -> Option<Percentiles> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let last = sorted.len().checked_sub(1)?;
        let at = |percent: usize| sorted[last * percent / 100];
        let sum: u64 = sorted.iter().map(|length| u64::from(*length)).sum();
        let mean = sum as f64 / sorted.len() as f64;
        Some(Percentiles { least: at(0), mean, median: at(50), p90: at(90), p99: at(99), most: at(100) })
    }
}

impl Serialize for Lengths {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.percentiles().serialize(to)
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.percentiles() {
            Some(Percentiles { least, mean, median, p90, p99, most }) => {
                write!(out, "{least} to {most}, mean {mean:.1}, median {median}, p90 {p90}, p99 {p99}")
            }
            None => out.write_str("none"),
        }
    }
}

/// The most frequent first.
fn counts<K: AsRef<str>>(counts: &BTreeMap<K, u64>) -> String {
    let mut counts: Vec<_> = counts.iter().map(|(name, times)| (*times, name.as_ref())).collect();
    counts.sort_by_key(|(times, _)| std::cmp::Reverse(*times));
    counts.iter().map(|(times, name)| format!("{name} {times}")).collect::<Vec<_>>().join(", ")
}

fn excerpt(text: &str) -> String {
    let mut letters = text.chars();
    let mut excerpt: String = letters.by_ref().take(EXCERPT).collect();
    if letters.next().is_some() {
        excerpt.push('…');
    }
    excerpt
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_all_lengths() {
        let mut lengths = Lengths::default();
        assert_eq!((lengths.percentiles(), lengths.to_string().as_str()), (None, "none"));
        (1..=101).rev().for_each(|length| lengths.add(length));
        let found = lengths.percentiles().unwrap();
        assert_eq!((found.least, found.median, found.p90, found.most), (1, 51, 91, 101));
        assert_eq!(found.mean, 51.0);
    }

    #[test]
    fn reasons_and_samples_are_bounded() {
        let mut step = StepReport::new("s");
        let conversation = Conversation { id: "x".into(), turns: Vec::new() };
        for index in 0..500 {
            let reason = Reason { why: format!("reason {index}").into(), detail: None };
            step.dropped(Dropped::new(&conversation, &reason));
        }
        assert_eq!((step.dropped, step.samples.len()), (500, SAMPLES));
        assert!(step.reasons.len() <= REASONS_LIMIT + 1);
        assert_eq!(step.reasons.values().sum::<u64>(), 500);
        assert_eq!(step.seen, step.kept + step.dropped);
    }
}
