//! Mistral: behind a mark come calls, in its first models as one list, in later ones a mark, a name and arguments
//! each.

use super::grammar::{Rules, call_rules, json_call};
use super::scan::{self, Scan};
use super::{Call, Reading, Tool, Wanted, certain};

pub const MARK: &str = "[TOOL_CALLS]";
pub const ARGUMENTS: &str = "[ARGS]";
const ID: &str = "[CALL_ID]";
pub const MARKS: [&str; 3] = [MARK, ARGUMENTS, ID];

/// What stands behind a mark.
enum Behind<'a> {
    /// Cannot be told yet.
    Open,
    /// No calls.
    Text,
    /// Calls, and what follows them once they are whole.
    Calls(Vec<Call>, Option<&'a str>),
}

pub fn read(text: &str, ended: bool) -> Reading {
    let mut reading = Reading::default();
    let mut rest = text;
    while let Some(at) = rest.find(MARK) {
        let behind = &rest[at + MARK.len()..];
        let found = match behind.trim_start().starts_with('[') {
            true => list(behind, ended),
            false => named(behind),
        };
        match found {
            Behind::Calls(calls, whole) => {
                reading.content.push_str(rest[..at].trim_end());
                reading.calls.extend(calls);
                match whole {
                    Some(follows) => rest = follows.trim_start(),
                    None => return reading,
                }
            }
            Behind::Open if !ended => {
                reading.content.push_str(rest[..at].trim_end());
                return reading;
            }
            Behind::Open | Behind::Text => {
                reading.content.push_str(&rest[..at + MARK.len()]);
                rest = behind;
            }
        }
    }
    reading.content.push_str(if ended { rest } else { certain(rest, MARK) });
    reading
}

/// `[{…}, {…}]`
fn list(text: &str, ended: bool) -> Behind<'_> {
    let mut calls = Vec::new();
    let mut rest = text.trim_start();
    while let Some(element) = rest.strip_prefix(['[', ',']) {
        match scan::call(element) {
            Scan::Call { name, arguments, length } => {
                calls.push(Call { name, arguments: arguments.into_owned() });
                let Some(length) = length else { return Behind::Calls(calls, None) };
                rest = element[length..].trim_start();
            }
            Scan::Open if calls.is_empty() => return Behind::Open,
            Scan::Other if calls.is_empty() => return Behind::Text,
            Scan::Open | Scan::Other => return Behind::Calls(calls, None),
        }
    }
    match rest.strip_prefix(']') {
        Some(follows) => Behind::Calls(calls, Some(follows)),
        None if rest.is_empty() && !ended => Behind::Calls(calls, None),
        None => Behind::Calls(calls, Some(rest)),
    }
}

/// `name[CALL_ID]id[ARGS]{…}`, where the id is left out mostly.
fn named(text: &str) -> Behind<'_> {
    let text = text.trim_start();
    let Some(end) = text.find(|letter: char| !is_of_a_name(letter)) else {
        return Behind::Open;
    };
    let (name, mut rest) = text.split_at(end);
    if name.is_empty() {
        return Behind::Text;
    }
    if let Some(id) = rest.strip_prefix(ID) {
        rest = id.trim_start_matches(|letter: char| letter.is_ascii_alphanumeric());
    }
    let begun = [ID, ARGUMENTS].iter().any(|mark| mark.starts_with(rest));
    rest = rest.strip_prefix(ARGUMENTS).unwrap_or(rest);
    if begun || rest.trim_start().is_empty() {
        return Behind::Open;
    }
    match scan::arguments(rest) {
        None => Behind::Text,
        Some((arguments, length)) => {
            let call = Call { name: name.to_owned(), arguments: arguments.to_owned() };
            Behind::Calls(vec![call], length.map(|length| &rest[length..]))
        }
    }
}

fn is_of_a_name(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-' | '.')
}

pub fn list_rules(tools: &[&Tool], wanted: &Wanted) -> Rules {
    let (any, each) = call_rules(tools, |tool| json_call(tool, "arguments", wanted));
    let more = if wanted.single { String::new() } else { format!(" (\",\" \" \"? {any})*") };
    rules(format!("inside: \" \"? \"[\" {any}{more} \"]\"\n{each}"))
}

pub fn arguments_rules(tools: &[&Tool], wanted: &Wanted) -> Rules {
    let (any, each) = call_rules(tools, |tool| format!("\"{}{ARGUMENTS}\" %json {}", tool.name, tool.held_to(wanted)));
    let more = if wanted.single { String::new() } else { format!(" (\"{MARK}\" {any})*") };
    rules(format!("inside: {any}{more}\n{each}"))
}

/// Text may come before the calls, or instead of them.
fn rules(inside: String) -> Rules {
    let mark = "\\[TOOL_CALLS\\]";
    Rules {
        calls: format!("\"{MARK}\" inside"),
        free: "open inside | TEXT".to_owned(),
        others: format!("open[lazy]: /(.|\\n)*{mark}/\nTEXT: /(.|\\n)*/ & ~/(.|\\n)*{mark}(.|\\n)*/\n{inside}"),
    }
}
