//! The functions that a model may call.

use super::super::error::ApiError;
use super::super::fields::{Fields, wrong};
use serde_json::Value;
use vicuna_protocol::inference::ToolUse;

const MAX_TOOLS: usize = 128;
const MAX_NAME: usize = 64;

/// What may be called, and whether something must be.
#[derive(Clone, Debug, PartialEq)]
pub struct Tools {
    /// OpenAI's list, for the template.
    pub json: String,
    pub names: Vec<String>,
    /// What the answer is to be.
    pub wanted: ToolUse,
    /// Arguments of any of them are held to its schema.
    pub strict: bool,
}

impl Tools {
    /// The field that asks for what only a worker with grammars can do.
    pub fn held_by(&self) -> Option<&'static str> {
        match (self.wanted.required, self.strict) {
            (true, _) => Some("tool_choice"),
            (false, true) => Some("tools"),
            (false, false) => None,
        }
    }
}

/// None also where the client says that nothing shall be called.
pub fn tools(fields: &Fields) -> Result<Option<Tools>, ApiError> {
    let list = match fields.get("tools") {
        None => &[][..],
        Some(Value::Array(list)) if list.len() <= MAX_TOOLS => list.as_slice(),
        Some(_) => return Err(wrong("tools", &format!("a list of up to {MAX_TOOLS} functions"))),
    };
    for (index, tool) in list.iter().enumerate() {
        check(index, tool)?;
    }
    let wanted = wanted(fields, list)?;
    if list.is_empty() || wanted == Wanted::Nothing {
        return Ok(None);
    }
    let parallel = fields.get("parallel_tool_calls").is_none() || fields.boolean("parallel_tool_calls")?;
    let names: Vec<_> = list.iter().filter_map(name_of).map(str::to_owned).collect();
    let function = match wanted {
        Wanted::One(index) => names.get(index).cloned().unwrap_or_default(),
        _ => String::new(),
    };
    let required = matches!(wanted, Wanted::Any | Wanted::One(_));
    // One function that is named is called once.
    let single = !parallel || !function.is_empty();
    Ok(Some(Tools {
        json: Value::from(list.to_vec()).to_string(),
        names,
        wanted: ToolUse { required, function, single },
        strict: list.iter().any(is_strict),
    }))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Nothing,
    Maybe,
    Any,
    /// This one of the list.
    One(usize),
}

fn wanted(fields: &Fields, list: &[Value]) -> Result<Wanted, ApiError> {
    let expected = "none, auto, required, or one of the functions in `tools`";
    match fields.get("tool_choice") {
        None => Ok(Wanted::Maybe),
        Some(Value::String(choice)) => match choice.as_str() {
            "none" => Ok(Wanted::Nothing),
            "auto" => Ok(Wanted::Maybe),
            "required" if !list.is_empty() => Ok(Wanted::Any),
            _ => Err(wrong("tool_choice", expected)),
        },
        Some(choice) => {
            let name = choice.pointer("/function/name").and_then(Value::as_str);
            let named = list.iter().position(|tool| name.is_some() && name_of(tool) == name);
            named.map(Wanted::One).ok_or_else(|| wrong("tool_choice", expected))
        }
    }
}

fn name_of(tool: &Value) -> Option<&str> {
    tool.pointer("/function/name")?.as_str()
}

fn is_strict(tool: &Value) -> bool {
    tool.pointer("/function/strict") == Some(&Value::Bool(true))
}

fn check(index: usize, tool: &Value) -> Result<(), ApiError> {
    let path = format!("tools[{index}]");
    if tool.get("type").and_then(Value::as_str) != Some("function") {
        return Err(wrong(&format!("{path}.type"), "function"));
    }
    let allowed = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-' | '.');
    let named =
        name_of(tool).is_some_and(|name| !name.is_empty() && name.len() <= MAX_NAME && name.chars().all(allowed));
    if !named {
        let expected = format!("a name of 1 to {MAX_NAME} letters, digits, dots, dashes or underscores");
        return Err(wrong(&format!("{path}.function.name"), &expected));
    }
    match tool.pointer("/function/parameters") {
        None | Some(Value::Null | Value::Object(_)) => {}
        Some(_) => return Err(wrong(&format!("{path}.function.parameters"), "a JSON schema")),
    }
    match tool.pointer("/function/strict") {
        None | Some(Value::Null | Value::Bool(_)) => Ok(()),
        Some(_) => Err(wrong(&format!("{path}.function.strict"), "true or false")),
    }
}
