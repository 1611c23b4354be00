//! Llama 3.1 to 3.3: an answer is calls or text. Several are separated by semicolons; their templates take one
//! call a message only, so no more than one is asked for.

use super::grammar::{Rules, call_rules, json_call};
use super::scan::{self, Scan};
use super::{Call, Reading, Tool, Wanted};

/// May stand before a call, and stands before code for the tools that these models bring along.
pub const MARK: &str = "<|python_tag|>";
pub const MARKS: [&str; 1] = [MARK];

pub fn read(text: &str, ended: bool, tools: &[String]) -> Reading {
    let mut reading = Reading::default();
    let begun = text.trim_start();
    if !ended && MARK.starts_with(begun) {
        return reading;
    }
    let mut rest = begun.strip_prefix(MARK).unwrap_or(text);
    loop {
        match scan::call(rest) {
            Scan::Call { name, arguments, length } if tools.contains(&name) => {
                reading.calls.push(Call { name, arguments: arguments.into_owned() });
                let Some(length) = length else { return reading };
                rest = rest[length..].trim_start().trim_start_matches([';', ',']).trim_start();
            }
            Scan::Open if !ended => return reading,
            _ => {
                reading.content.push_str(rest);
                return reading;
            }
        }
    }
}

pub fn rules(tools: &[&Tool], wanted: &Wanted) -> Rules {
    let (any, each) = call_rules(tools, |tool| json_call(tool, "parameters", wanted));
    Rules {
        calls: any.to_owned(),
        free: "call | TEXT".to_owned(),
        // A text does not begin like a call.
        others: format!(
            "call: \"{MARK}\"? {any}\n\
             TEXT: /\\s*[^{{\\s](.|\\n)*/ & ~/\\s*<\\|python_tag\\|>(.|\\n)*/\n{each}"
        ),
    }
}
