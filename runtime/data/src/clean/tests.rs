use super::*;
use crate::conversation::Turn;
use crate::read::Reader;
use serde_json::{Value, json};
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

const ENGLISH: &str = "You can reverse a list with a loop that walks from its end to its start, or with the method that the \
    language has for that purpose. The loop shows better what happens, while the method is shorter and faster, so that \
    most people would rather use it in their own programs.";
const FRENCH: &str = "Vous pouvez inverser une liste avec une boucle qui va de la fin au début, ou avec la méthode que le \
    langage propose pour cela. La boucle montre mieux ce qui se passe, tandis que la méthode est plus courte.";

fn record(id: &str, turns: &[(&str, &str)]) -> Value {
    let turns: Vec<_> = turns.iter().map(|(from, value)| json!({ "from": from, "value": value })).collect();
    json!({ "id": id, "conversations": turns })
}

/// A file with every defect that is cleaned, each in a record of its own.
fn dirty() -> Vec<Value> {
    let near = ENGLISH.replace("own programs", "own work");
    vec![
        record("good", &[("human", "How do I reverse a list?"), ("gpt", ENGLISH)]),
        record(
            "html",
            &[
                ("human", "Show me."),
                (
                    "gpt",
                    "<div class=\"markdown\"><p>Like this:</p><pre><div><span>python</span><button>Copy code</button></div><code>x[::-1]\n</code></pre></div>",
                ),
            ],
        ),
        record("fence", &[("human", "And in C?"), ("gpt", "So:\n```\ncCopy codeint x;\n```")]),
        record("counter", &[("human", "Which is larger?"), ("gpt", "2 / 2\n\nIt is 3 / 4.")]),
        record("leading", &[("gpt", "Hello!"), ("human", "What is that?"), ("gpt", "A greeting.")]),
        record("trailing", &[("human", "What else?"), ("gpt", "Nothing."), ("human", "Really?")]),
        record("question", &[("human", "Anybody?")]),
        record("twice", &[("human", "a"), ("human", "b"), ("gpt", "c")]),
        record("empty", &[("human", "a"), ("gpt", " ")]),
        record("vendor", &[("human", "Who are you?"), ("gpt", "I am ChatGPT, made by OpenAI.")]),
        record("list", &[("human", "Count."), ("gpt", "1. one\n\n1. two")]),
        record("token", &[("human", "What ends a text?"), ("gpt", "The token </s> does.")]),
        record("french", &[("human", "Et en français ?"), ("gpt", FRENCH)]),
        record("good", &[("human", "How do I reverse a list?"), ("gpt", "Again, and otherwise.")]),
        record(
            "pair",
            &[("human", "Show me."), ("gpt", "Like this:\n\n```python\nx[::-1]\n```"), ("human", "a"), ("gpt", "b")],
        ),
        record("near", &[("human", "How do I reverse a list?"), ("gpt", &near)]),
    ]
}

fn clean_all(cleaning: &Cleaning, records: &[Value]) -> (Vec<Conversation>, Report) {
    let mut cleaner = Cleaner::new(cleaning);
    let read = Reader::of_json(serde_json::to_vec(records).unwrap());
    let kept = read.filter_map(|conversation| cleaner.clean(conversation.unwrap())).collect();
    (kept, cleaner.report())
}

fn english() -> Cleaning {
    Cleaning { language: Language::parse("en"), ..Cleaning::published() }
}

#[test]
fn a_file_with_every_defect_is_cleaned_to_what_it_should_be() {
    let (kept, _) = clean_all(&english(), &dirty());
    let expected = [
        record("good", &[("human", "How do I reverse a list?"), ("gpt", ENGLISH)]),
        record("html", &[("human", "Show me."), ("gpt", "Like this:\n\n```python\nx[::-1]\n```")]),
        record("fence", &[("human", "And in C?"), ("gpt", "So:\n```c\nint x;\n```")]),
        record("counter", &[("human", "Which is larger?"), ("gpt", "It is 3 / 4.")]),
        record("leading", &[("human", "What is that?"), ("gpt", "A greeting.")]),
        record("trailing", &[("human", "What else?"), ("gpt", "Nothing.")]),
        record("token", &[("human", "What ends a text?"), ("gpt", "The token </ s> does.")]),
    ];
    assert_eq!(kept.iter().map(Conversation::to_sharegpt).collect::<Vec<_>>(), expected);
}

#[test]
fn everything_that_was_dropped_or_changed_is_counted_with_its_reason() {
    let (kept, report) = clean_all(&english(), &dirty());
    assert_eq!((report.records, report.kept.conversations), (16, kept.len() as u64));
    assert_eq!(report.records, report.kept.conversations + report.dropped());
    let dropped: BTreeMap<&str, String> = report
        .steps
        .iter()
        .filter(|step| step.dropped > 0)
        .map(|step| (step.samples[0].id.as_str(), format!("{}: {}", step.step, step.samples[0].why)))
        .collect();
    let expected = BTreeMap::from([
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
    let (_, report) = clean_all(&english(), &dirty());
    let text = report.to_string();
    assert!(text.starts_with("7 of 16 conversations kept\n"), "{text}");
    for part in
        ["two questions in a row (1)", "turns           assistant 7, user 7", "en 1", "dropped near (", "kept good:"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["kept"]["roles"]["assistant"], 7);
    assert_eq!(json["kept"]["turns"]["median"], 2);
    assert_eq!(json["steps"][0]["step"], "HTML to Markdown");
}

#[test]
fn cleaning_again_changes_nothing() {
    let (once, _) = clean_all(&english(), &dirty());
    let records: Vec<_> = once.iter().map(Conversation::to_sharegpt).collect();
    let (twice, report) = clean_all(&english(), &records);
    assert_eq!(once, twice);
    assert!(report.steps.iter().all(|step| step.dropped == 0 && step.changed == 0));
}

#[test]
fn without_the_published_steps_only_what_cannot_be_trained_on_goes() {
    let (kept, report) = clean_all(&Cleaning::necessary(), &dirty());
    assert_eq!(kept.len(), 13);
    assert_eq!(report.steps.len(), 4);
    assert!(report.kept.languages.is_empty());
    let only_language = Cleaning { language: Language::parse("fr"), ..Cleaning::necessary() };
    let (kept, _) = clean_all(&only_language, &dirty());
    assert!(kept.iter().any(|conversation| conversation.id == "french"));
    assert!(kept.iter().all(|conversation| conversation.id != "near"));
}
