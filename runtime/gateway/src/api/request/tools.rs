//! The functions that a model may call.

use super::super::error::ApiError;
use super::super::fields::{Fields, wrong};
use serde_json::{Value, json};
use std::collections::BTreeSet;
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
    /// They came as `functions`, and the answer has `function_call`, as OpenAI's API had before tools.
    pub legacy: bool,
}

impl Tools {
    /// The field that asks for what only a worker with grammars can do.
    pub fn held_by(&self) -> Option<&'static str> {
        match (self.wanted.required, self.strict) {
            (true, _) if self.legacy => Some("function_call"),
            (true, _) => Some("tool_choice"),
            (false, true) => Some("tools"),
            (false, false) => None,
        }
    }
}

/// None also where the client says that nothing shall be called.
pub fn tools(fields: &Fields) -> Result<Option<Tools>, ApiError> {
    let (list, legacy) = listed(fields)?;
    let choice = if legacy { "function_call" } else { "tool_choice" };
    let wanted = wanted(fields, choice, &list)?;
    if list.is_empty() || wanted == Wanted::Nothing {
        return Ok(None);
    }
    let allowed: Vec<Value> = match &wanted {
        Wanted::Of(_, kept) => {
            let those = list.into_iter().enumerate().filter(|(index, _)| kept.contains(index));
            those.map(|(_, tool)| tool).collect()
        }
        _ => list,
    };
    let parallel = fields.get("parallel_tool_calls").is_none() || fields.boolean("parallel_tool_calls")?;
    let names: Vec<_> = allowed.iter().filter_map(name_of).map(str::to_owned).collect();
    let function = match wanted {
        Wanted::One(index) => names.get(index).cloned().unwrap_or_default(),
        _ => String::new(),
    };
    let required = matches!(wanted, Wanted::Any | Wanted::One(_) | Wanted::Of(true, _));
    // One function that is named is called once, and the old way has room for one call only.
    let single = !parallel || legacy || !function.is_empty();
    Ok(Some(Tools {
        strict: allowed.iter().any(is_strict),
        json: Value::from(allowed).to_string(),
        names,
        wanted: ToolUse { required, function, single },
        legacy,
    }))
}

/// The functions in the form of `tools`, and whether they came as `functions`.
fn listed(fields: &Fields) -> Result<(Vec<Value>, bool), ApiError> {
    let list = |name: &str| match fields.get(name) {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= MAX_TOOLS => Ok(list.clone()),
        Some(_) => Err(wrong(name, &format!("a list of up to {MAX_TOOLS} functions"))),
    };
    let (tools, functions) = (list("tools")?, list("functions")?);
    if !tools.is_empty() && !functions.is_empty() {
        return Err(wrong("functions", "left out where there are `tools`"));
    }
    for (index, tool) in tools.iter().enumerate() {
        let path = format!("tools[{index}]");
        if tool.get("type").and_then(Value::as_str) != Some("function") {
            return Err(wrong(&format!("{path}.type"), "function"));
        }
        check(&format!("{path}.function"), tool.get("function").unwrap_or(&Value::Null))?;
    }
    for (index, function) in functions.iter().enumerate() {
        check(&format!("functions[{index}]"), function)?;
    }
    let legacy = !functions.is_empty() || tools.is_empty() && fields.get("function_call").is_some();
    let functions = functions.into_iter().map(|function| json!({ "type": "function", "function": function }));
    Ok((tools.into_iter().chain(functions).collect(), legacy))
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    Nothing,
    Maybe,
    Any,
    /// This one of the list.
    One(usize),
    /// None but these of the list; whether one must be called.
    Of(bool, BTreeSet<usize>),
}

/// `field`: where the client says it.
fn wanted(fields: &Fields, field: &str, list: &[Value]) -> Result<Wanted, ApiError> {
    let expected = "none, auto, required, or one of the functions that are given";
    match fields.get(field) {
        None => Ok(Wanted::Maybe),
        Some(Value::String(choice)) => match choice.as_str() {
            "none" => Ok(Wanted::Nothing),
            "auto" => Ok(Wanted::Maybe),
            "required" if !list.is_empty() && field == "tool_choice" => Ok(Wanted::Any),
            _ => Err(wrong(field, expected)),
        },
        Some(choice) if choice.get("type").and_then(Value::as_str) == Some("allowed_tools") => allowed(choice, list),
        Some(choice) => {
            let name = choice.pointer("/function/name").or(choice.get("name")).and_then(Value::as_str);
            position(list, name).map(Wanted::One).ok_or_else(|| wrong(field, expected))
        }
    }
}

/// A choice that leaves some of the functions: only these are shown to the model, which then calls no others.
fn allowed(choice: &Value, list: &[Value]) -> Result<Wanted, ApiError> {
    let path = "tool_choice.allowed_tools";
    let required = match choice.pointer("/allowed_tools/mode").and_then(Value::as_str) {
        Some("auto") => false,
        Some("required") => true,
        _ => return Err(wrong(&format!("{path}.mode"), "auto or required")),
    };
    // Naming one again costs a few bytes, and must not take another copy of it.
    let tools = choice.pointer("/allowed_tools/tools").and_then(Value::as_array);
    let tools = tools.filter(|tools| !tools.is_empty() && tools.len() <= MAX_TOOLS);
    let kept: Option<BTreeSet<usize>> =
        tools.and_then(|tools| tools.iter().map(|tool| position(list, name_of(tool))).collect());
    let expected = format!("a list of up to {MAX_TOOLS} of the functions in `tools`");
    let kept = kept.ok_or_else(|| wrong(&format!("{path}.tools"), &expected))?;
    Ok(Wanted::Of(required, kept))
}

fn position(list: &[Value], name: Option<&str>) -> Option<usize> {
    list.iter().position(|tool| name.is_some() && name_of(tool) == name)
}

fn name_of(tool: &Value) -> Option<&str> {
    tool.pointer("/function/name")?.as_str()
}

fn is_strict(tool: &Value) -> bool {
    tool.pointer("/function/strict") == Some(&Value::Bool(true))
}

/// `path`: where the function is.
fn check(path: &str, function: &Value) -> Result<(), ApiError> {
    let allowed = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-' | '.');
    let name = function.get("name").and_then(Value::as_str).unwrap_or_default();
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(allowed) {
        let expected = format!("a name of 1 to {MAX_NAME} letters, digits, dots, dashes or underscores");
        return Err(wrong(&format!("{path}.name"), &expected));
    }
    match function.get("parameters") {
        None | Some(Value::Null | Value::Object(_)) => {}
        Some(_) => return Err(wrong(&format!("{path}.parameters"), "a JSON schema")),
    }
    match function.get("strict") {
        None | Some(Value::Null | Value::Bool(_)) => Ok(()),
        Some(_) => Err(wrong(&format!("{path}.strict"), "true or false")),
    }
}
