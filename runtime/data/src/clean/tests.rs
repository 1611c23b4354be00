use super::*;
use crate::conversation::Turn;
use crate::read::Reader;
use serde_json::Value;
use std::collections::BTreeMap;

/// Who says what.
#[derive(Clone, Copy, Debug)]
pub enum S<'a> {
    System(&'a str),
    Human(&'a str),
    Bot(&'a str),
}

pub fn candidate(turns: &[S]) -> Candidate {
    let turns = turns.iter().map(|turn| match *turn {
        S::System(text) => Turn::system(text),
        S::Human(text) => Turn::user(text),
        S::Bot(text) => Turn::assistant(text),
    });
    Candidate::new(Conversation { id: "id".into(), turns: turns.collect() })
}

/// A file with every defect that is cleaned, each in a record of its own, and what is left of it.
const DIRTY: &str = include_str!("../../tests/golden/dirty.jsonl");
const CLEAN: &str = include_str!("../../tests/golden/clean.jsonl");

fn clean_all(cleaning: &Cleaning, lines: &str) -> (Vec<Conversation>, Report) {
    let mut cleaner = Cleaner::new(cleaning);
    let read = Reader::of_json(lines.as_bytes().to_vec());
    let kept = read.filter_map(|conversation| cleaner.clean_read(conversation).unwrap()).collect();
    (kept, cleaner.report())
}

fn lines(records: &[Value]) -> String {
    records.iter().map(|record| format!("{record}\n")).collect()
}

/// Those that are conversations.
fn well_formed() -> String {
    let read = Reader::of_json(DIRTY.as_bytes().to_vec()).flatten();
    lines(&read.map(|conversation| conversation.to_sharegpt()).collect::<Vec<_>>())
}

fn english() -> Cleaning {
    Cleaning { language: Language::parse("en"), ..Cleaning::published() }
}

#[test]
fn a_file_with_every_defect_is_cleaned_to_what_it_should_be() {
    let (kept, _) = clean_all(&english(), DIRTY);
    let kept: Vec<_> = kept.iter().map(Conversation::to_sharegpt).collect();
    let expected: Vec<Value> = CLEAN.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(kept, expected);
}

#[test]
fn what_is_no_conversation_is_counted_where_it_is_cleaned_and_an_error_where_it_is_not() {
    let (_, report) = clean_all(&english(), DIRTY);
    let expected = BTreeMap::from([
        ("conversations neither it nor \"messages\" is there".to_owned(), 1),
        ("conversations[].from is no known role".to_owned(), 1),
        ("conversations[].value is missing or not text".to_owned(), 2),
    ]);
    assert_eq!((report.steps[0].step, &report.steps[0].reasons), ("malformed records", &expected));
    let mut cleaner = Cleaner::new(&Cleaning::necessary());
    let read = Reader::of_json(DIRTY.as_bytes().to_vec());
    let failed = read.map(|read| cleaner.clean_read(read)).find_map(Result::err).unwrap();
    assert!(failed.to_string().starts_with("the text: record 20 (line 20), field conversations[0].value"), "{failed}");
    let broken = Reader::of_json(b"{\"messages\":[]}\n{".to_vec());
    let mut cleaner = Cleaner::new(&Cleaning::published());
    assert!(broken.map(|read| cleaner.clean_read(read)).any(|read| read.is_err()), "no JSON is always an error");
}

#[test]
fn everything_that_was_dropped_or_changed_is_counted_with_its_reason() {
    let (kept, report) = clean_all(&english(), DIRTY);
    assert_eq!((report.records, report.kept.conversations), (24, kept.len() as u64));
    assert_eq!(report.records, report.kept.conversations + report.dropped());
    let dropped: BTreeMap<&str, String> = report
        .steps
        .iter()
        .filter(|step| step.dropped > 0)
        .map(|step| (step.samples[0].id.as_str(), format!("{}: {}", step.step, step.samples[0].why)))
        .collect();
    let expected = BTreeMap::from([
        (
            "record 20 (line 20) of the text",
            "malformed records: conversations[].value is missing or not text".to_owned(),
        ),
        ("question", "last turn human: nothing but questions".to_owned()),
        ("twice", "roles do not alternate: two questions in a row".to_owned()),
        ("empty", "empty turns: a turn is empty".to_owned()),
        ("vendor", "names the vendor: names \"open ai\"".to_owned()),
        ("list", "restarted numbered lists: a list counts 1, 1".to_owned()),
        ("french", "language: language fr".to_owned()),
        ("good", "duplicates by id: the id and its first question are there already".to_owned()),
        ("pair", "duplicates by first pair: the first question and reply are there already".to_owned()),
        ("near", "near duplicates: nearly the same is there already".to_owned()),
    ]);
    assert_eq!(dropped, expected);
    let changed: Vec<_> = report.steps.iter().filter(|step| step.changed > 0).map(|step| step.step).collect();
    let expected = [
        "HTML to Markdown",
        "\"Copy code\" in fences",
        "counters of the page",
        "first turn not human",
        "last turn human",
        "literal control tokens",
    ];
    assert_eq!(changed, expected);
    for two in report.steps.windows(2) {
        assert_eq!(two[0].kept, two[1].seen, "between {} and {}", two[0].step, two[1].step);
    }
}

#[test]
fn the_report_reads_well_and_is_json() {
    let (_, report) = clean_all(&english(), DIRTY);
    let text = report.to_string();
    assert!(text.starts_with("10 of 24 conversations kept\n"), "{text}");
    for part in
        ["two questions in a row (1)", "turns           assistant 10, user 10", "en 1", "dropped near (", "kept good:"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["kept"]["roles"]["assistant"], 10);
    assert_eq!(json["kept"]["turns"]["median"], 2);
    assert_eq!(json["steps"][1]["step"], "HTML to Markdown");
}

#[test]
fn cleaning_again_changes_nothing() {
    let (once, _) = clean_all(&english(), DIRTY);
    let records: Vec<_> = once.iter().map(Conversation::to_sharegpt).collect();
    let (twice, report) = clean_all(&english(), &lines(&records));
    assert_eq!(once, twice);
    assert!(report.steps.iter().all(|step| step.dropped == 0 && step.changed == 0));
}

#[test]
fn without_the_published_steps_only_what_cannot_be_trained_on_goes() {
    let (kept, report) = clean_all(&Cleaning::necessary(), &well_formed());
    assert_eq!(kept.len(), 16);
    assert_eq!(report.steps.len(), 4);
    assert!(report.kept.languages.is_empty());
    let only_language = Cleaning { language: Language::parse("fr"), ..Cleaning::necessary() };
    let (kept, _) = clean_all(&only_language, &well_formed());
    assert!(kept.iter().any(|conversation| conversation.id == "french"));
    assert!(kept.iter().all(|conversation| conversation.id != "near"));
}
