//! Calls of tools in what a model says. Templates that have tools make models write
//! `<tool_call>{"name": …, "arguments": …}</tool_call>`, or the bare object where nothing else may be said.
//!
//! Reading is a pure function of the text so far, and what it tells only grows: so that a stream can
//! tell the difference, also after it has moved to another worker or gateway.

use serde_json::Value;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    pub name: String,
    /// A JSON object, as text.
    pub arguments: String,
}

/// What there is for the client in a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    pub content: String,
    pub calls: Vec<Call>,
}

/// `ended`: nothing more will come. Until then, what may still become a call is held back.
pub fn read(text: &str, ended: bool) -> Reading {
    match text.trim_start().starts_with(['{', '[']) {
        true => read_bare(text, ended),
        false => read_tagged(text, ended),
    }
}

fn read_bare(text: &str, ended: bool) -> Reading {
    if !ended {
        return Reading::default();
    }
    let calls = serde_json::from_str(text).ok().and_then(|value| match value {
        Value::Array(values) => values.iter().map(call).collect(),
        value => call(&value).map(|call| vec![call]),
    });
    match calls.filter(|calls: &Vec<_>| !calls.is_empty()) {
        Some(calls) => Reading { content: String::new(), calls },
        None => Reading { content: text.to_owned(), calls: Vec::new() },
    }
}

fn read_tagged(text: &str, ended: bool) -> Reading {
    let mut reading = Reading::default();
    let mut rest = text;
    while let Some(at) = rest.find(OPEN) {
        let inside = &rest[at + OPEN.len()..];
        let (body, behind) = match inside.split_once(CLOSE) {
            Some(parts) => parts,
            None if ended => (inside, ""),
            None => {
                reading.content.push_str(rest[..at].trim_end());
                return reading;
            }
        };
        match serde_json::from_str(body).ok().as_ref().and_then(call) {
            Some(call) => {
                reading.content.push_str(rest[..at].trim_end());
                reading.calls.push(call);
            }
            // No call: it is text like any other.
            None => reading.content.push_str(&rest[..rest.len() - behind.len()]),
        }
        rest = match reading.calls.is_empty() {
            true => behind,
            false => behind.trim_start(),
        };
    }
    reading.content.push_str(if ended { rest } else { certain(rest) });
    reading
}

/// What is text whatever comes next.
fn certain(text: &str) -> &str {
    let begun = (1..OPEN.len()).rev().find(|length| text.ends_with(&OPEN[..*length]));
    text[..text.len() - begun.unwrap_or(0)].trim_end()
}

fn call(value: &Value) -> Option<Call> {
    let arguments = value.get("arguments").or_else(|| value.get("parameters"))?;
    let arguments = match arguments {
        Value::String(text) => text.clone(),
        Value::Object(_) => arguments.to_string(),
        _ => return None,
    };
    Some(Call { name: value.get("name")?.as_str()?.to_owned(), arguments })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn named(name: &str) -> Call {
        Call { name: name.into(), arguments: r#"{"x":1}"#.into() }
    }

    #[test]
    fn calls_are_found_between_and_behind_text() {
        let text = "Let me look.\n<tool_call>\n{\"name\": \"a\", \"arguments\": {\"x\": 1}}\n</tool_call>\n\
                    <tool_call>{\"name\":\"b\",\"parameters\":{\"x\":1}}</tool_call>";
        let expected = Reading { content: "Let me look.".into(), calls: vec![named("a"), named("b")] };
        assert_eq!(read(text, true), expected);
        assert_eq!(read(&text[..text.len() - 1], false).calls, [named("a")]);
        assert_eq!(read(&text[..text.len() - CLOSE.len()], true), expected, "the end ends the last call");
    }

    #[test]
    fn a_bare_object_is_a_call_if_it_looks_like_one() {
        let text = r#" {"name": "a", "arguments": {"x": 1}}"#;
        assert_eq!(read(text, false), Reading::default());
        assert_eq!(read(text, true).calls, [named("a")]);
        let text = r#"{"answer": 42}"#;
        assert_eq!(read(text, true), Reading { content: text.into(), calls: Vec::new() });
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for text in ["a < b", "<tool_call>nothing</tool_call> to call", "ends with <tool_c", "<tool_call>{"] {
            assert_eq!(read(text, true), Reading { content: text.into(), calls: Vec::new() }, "{text}");
        }
        assert_eq!(read("ends with <tool_c", false).content, "ends with");
    }

    proptest! {
        #[test]
        fn what_has_been_told_is_never_taken_back(parts in prop::collection::vec(prop::sample::select(vec![
            "<tool_call>", "</tool_call>", "<tool", "_call>", " ", "\n", "x", "{", "é",
            r#"{"name":"f","arguments":{}}"#, r#"{"name":"g""#,
        ]), 0..12)) {
            let whole: String = parts.concat();
            let mut before = Reading::default();
            let ends = whole.char_indices().map(|(at, _)| at).chain([whole.len()]);
            let readings = ends.map(|end| read(&whole[..end], false)).chain([read(&whole, true)]);
            for reading in readings.collect::<Vec<_>>() {
                prop_assert!(reading.content.starts_with(&before.content), "{:?} {:?}", before, reading);
                prop_assert!(reading.calls.starts_with(&before.calls), "{:?} {:?}", before, reading);
                before = reading;
            }
        }
    }
}
