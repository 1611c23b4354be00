//! Qwen 2 and 2.5, Hermes: each call is between tags, before and behind it may be text.

use super::grammar::{Rules, call_rules, json_call};
use super::scan::{self, Scan};
use super::{Call, Reading, Tool, Wanted, certain};

pub const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
pub const MARKS: [&str; 2] = [OPEN, CLOSE];

pub fn read(text: &str, ended: bool) -> Reading {
    let mut reading = Reading::default();
    let mut rest = text;
    while let Some(at) = rest.find(OPEN) {
        let inside = &rest[at + OPEN.len()..];
        match scan::call(inside) {
            Scan::Call { name, arguments, length } => {
                reading.content.push_str(rest[..at].trim_end());
                reading.calls.push(Call { name, arguments: arguments.into_owned() });
                match length.and_then(|length| behind(&inside[length..])) {
                    Some(behind) => rest = behind.trim_start(),
                    None => return reading,
                }
            }
            Scan::Open if !ended => {
                reading.content.push_str(rest[..at].trim_end());
                return reading;
            }
            Scan::Open | Scan::Other => {
                reading.content.push_str(&rest[..at + OPEN.len()]);
                rest = inside;
            }
        }
    }
    reading.content.push_str(if ended { rest } else { certain(rest, OPEN) });
    reading
}

/// What follows a call: behind its closing tag, or from the next opening one on if that was forgotten.
fn behind(text: &str) -> Option<&str> {
    let closed = text.find(CLOSE).map(|at| (at, at + CLOSE.len()));
    let opened = text.find(OPEN).map(|at| (at, at));
    let (_, end) = closed.into_iter().chain(opened).min()?;
    Some(&text[end..])
}

pub fn rules(tools: &[&Tool], wanted: &Wanted) -> Rules {
    let (any, each) = call_rules(tools, |tool| json_call(tool, "arguments", wanted));
    let (more, free) = match wanted.single {
        true => ("", "open inside | TEXT"),
        false => (" (\"\\n\" call)*", "(open inside)* TEXT"),
    };
    Rules {
        calls: format!("call{more}"),
        free: free.to_owned(),
        others: format!(
            "call: \"{OPEN}\\n\" {any} \"\\n{CLOSE}\"\ninside: \"\\n\"? {any} \"\\n\"? \"{CLOSE}\"\n\
             open[lazy]: /(.|\\n)*{OPEN}/\nTEXT: /(.|\\n)*/ & ~/(.|\\n)*{OPEN}(.|\\n)*/\n{each}"
        ),
    }
}
