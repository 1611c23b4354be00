//! What the dialects' grammars have in common.

use super::{Tool, Wanted};
use serde_json::json;

/// A dialect's part of a grammar.
pub struct Rules {
    /// An answer that is calls and nothing else.
    pub calls: String,
    /// An answer that may be text as well, in which nothing looks like a call that is none.
    pub free: String,
    /// Rules and terminals that both use.
    pub others: String,
}

impl Rules {
    pub fn grammar(&self, wanted: &Wanted) -> String {
        let Self { calls, free, others } = self;
        match &wanted.answer {
            _ if wanted.required => format!("start: {calls}\n{others}"),
            Some(schema) => format!("start: {calls} | answer\nanswer: %json {schema}\n{others}"),
            None => format!("start: {free}\n{others}"),
        }
    }
}

/// A rule for each tool, and the name of the rule that is any of them.
pub fn call_rules(tools: &[&Tool], rule: impl Fn(&Tool) -> String) -> (&'static str, String) {
    let names: Vec<_> = (0..tools.len()).map(|index| format!("f{index}")).collect();
    let rules = names.iter().zip(tools).map(|(name, tool)| format!("{name}: {}\n", rule(tool)));
    let rules: String = rules.collect();
    ("any", format!("any: {}\n{rules}", names.join(" | ")))
}

/// `{"name": …, "arguments": …}`
pub fn json_call(tool: &Tool, arguments: &str, wanted: &Wanted) -> String {
    let schema = json!({
        "type": "object",
        "properties": { "name": { "const": tool.name }, arguments: tool.held_to(wanted) },
        "required": ["name", arguments],
        "additionalProperties": false,
    });
    format!("%json {schema}")
}
