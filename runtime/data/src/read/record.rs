//! From one JSON record to a conversation.

use super::{Place, Problem};
use crate::conversation::{Conversation, Role, Turn, digest};
use serde_json::Value;
use std::borrow::Cow;

/// Names of the list of turns, of who speaks and of what is said.
type Names = [&'static str; 3];

const SHAREGPT: Names = ["conversations", "from", "value"];
const OPENAI: Names = ["messages", "role", "content"];

/// Letters of a record that an error quotes, at most: a text in the wrong place may be as long as the record.
const QUOTED: usize = 32;

pub fn conversation(at: Place, record: &Value) -> Result<Conversation, Problem> {
    let there = |names: &&Names| record.get(names[0]).is_some_and(|list| !list.is_null());
    let Some(names) = [&SHAREGPT, &OPENAI].into_iter().find(there) else {
        let detail = "neither it nor \"messages\" is there; a record needs one of them";
        return Err(field(at, SHAREGPT[0], detail));
    };
    let list = list(at, &record[names[0]], names[0])?;
    let turns: Vec<Turn> =
        list.iter().enumerate().map(|(index, value)| turn(at, index, value, names)).collect::<Result<_, _>>()?;
    Ok(Conversation { id: id(record, &turns), turns })
}

/// The list of turns; some tables keep it as a text.
fn list<'a>(at: Place, value: &'a Value, name: &str) -> Result<Cow<'a, [Value]>, Problem> {
    match value {
        Value::Array(list) => Ok(Cow::Borrowed(list.as_slice())),
        Value::String(text) => serde_json::from_str(text).map(|list: Vec<Value>| Cow::Owned(list)).map_err(|error| {
            let reason = "is a text that is no JSON list of turns";
            quoting(at, name, reason, format!("{reason}: {}", cut(&error.to_string(), 4 * QUOTED)))
        }),
        _ => Err(field(at, name, "is not a list of turns; make it one")),
    }
}

/// A record without an id is named after what is said, so that no two of them are taken for one.
fn id(record: &Value, turns: &[Turn]) -> String {
    match record.get("id") {
        Some(Value::String(id)) if !id.is_empty() => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        _ => format!("content-{:032x}", digest(turns)),
    }
}

fn turn(at: Place, index: usize, value: &Value, names: &Names) -> Result<Turn, Problem> {
    let [list, role_name, content_name] = names;
    let path = |name: &str| format!("{list}[{index}].{name}");
    let role = value.get(role_name).and_then(Value::as_str);
    let role = role.ok_or_else(|| field(at, path(role_name), "is missing or not a string; say who speaks"))?;
    let role = Role::parse(role).ok_or_else(|| {
        let (reason, cut) = ("is no known role", cut(role, QUOTED));
        let detail = format!("{cut:?} {reason}; use system, human (user), gpt (assistant)");
        quoting(at, path(role_name), reason, detail)
    })?;
    let content = value.get(content_name).and_then(text_of);
    let content = content.ok_or_else(|| {
        field(at, path(content_name), "is missing or not text; only text can be trained on: remove the record")
    })?;
    let learned = role != Role::Assistant
        || is_learned(&value["weight"]).ok_or_else(|| {
            field(at, path("weight"), "is neither 0 nor 1; a reply is learned or it is not: write one of the two")
        })?;
    Ok(Turn { role, content, learned })
}

/// OpenAI's weight of a reply: 0 or 1, which it is where nothing is said.
fn is_learned(weight: &Value) -> Option<bool> {
    match weight {
        Value::Null => Some(true),
        weight if weight.as_f64() == Some(1.0) => Some(true),
        weight if weight.as_f64() == Some(0.0) => Some(false),
        _ => None,
    }
}

/// Text as a string, or as OpenAI's list of text parts.
fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => parts.iter().map(|part| part.get("text").and_then(Value::as_str)).collect(),
        _ => None,
    }
}

/// `detail`: why, and behind a semicolon what to do.
fn field(at: Place, field: impl Into<String>, detail: &'static str) -> Problem {
    quoting(at, field, detail.split(';').next().unwrap_or(detail), detail.to_owned())
}

/// With what the record says in its detail.
fn quoting(at: Place, field: impl Into<String>, reason: &'static str, detail: String) -> Problem {
    Problem::Field { at, field: field.into(), reason, detail }
}

/// The first letters of a text.
fn cut(text: &str, letters: usize) -> &str {
    text.char_indices().nth(letters).map_or(text, |(end, _)| &text[..end])
}
