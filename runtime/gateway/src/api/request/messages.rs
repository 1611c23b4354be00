//! The messages of a chat. Calls in OpenAI's old way (`function_call`, the role `function`) become calls of tools; who says
//! something (`name`) is not told to the model, whose template has no place for it.

use super::super::error::ApiError;
use super::super::fields::wrong;
use serde_json::{Value, json};
use std::collections::HashMap;
use vicuna_protocol::inference::Message;

pub fn messages(value: &Value) -> Result<Vec<Message>, ApiError> {
    match value {
        Value::Array(messages) if !messages.is_empty() => {
            let mut called = HashMap::new();
            messages.iter().enumerate().map(|(index, value)| message(index, value, &mut called)).collect()
        }
        _ => Err(wrong("messages", "a list with at least one message")),
    }
}

/// A call or its result: only some templates have them.
pub fn speaks_of_tools(message: &Message) -> bool {
    message.role == "tool" || !message.tool_calls_json.is_empty()
}

/// `called`: ids of calls in the old way, which has none, by what was called.
fn message(index: usize, value: &Value, called: &mut HashMap<String, String>) -> Result<Message, ApiError> {
    let path = |field: &str| format!("messages[{index}].{field}");
    let role = match value.get("role").and_then(Value::as_str) {
        Some("system" | "developer") => "system",
        Some("tool" | "function") => "tool",
        Some(role @ ("user" | "assistant")) => role,
        _ => return Err(wrong(&path("role"), "system, developer, user, assistant, tool or function")),
    };
    let is_old = value.get("role").and_then(Value::as_str) == Some("function");
    let present = |field: &str| value.get(field).filter(|value| !value.is_null());
    let answered = |field: &str| wrong(&path(field), "what was answered");
    let old_call = present("function_call").filter(|_| role == "assistant");
    let calls = match (present("tool_calls").filter(|_| role == "assistant"), old_call) {
        (Some(calls), _) => checked_calls(calls).ok_or_else(|| answered("tool_calls"))?,
        (None, Some(call)) => old_calls(index, call, called).ok_or_else(|| answered("function_call"))?,
        (None, None) => String::new(),
    };
    let content = match (present("content"), present("refusal")) {
        (None, Some(Value::String(refusal))) if role == "assistant" => Some(refusal.clone()),
        (None, _) if !calls.is_empty() => Some(String::new()),
        (content, _) => content.and_then(text_of),
    };
    let content =
        content.ok_or_else(|| wrong(&path("content"), "text: a string, or a list of parts of type text or refusal"))?;
    let tool_call_id = match (role, present("tool_call_id").map(Value::as_str)) {
        ("tool", _) if is_old => {
            let id = present("name").and_then(|name| called.get(name.as_str()?));
            id.cloned().ok_or_else(|| wrong(&path("name"), "the name of a function that was called before"))?
        }
        ("tool", Some(Some(id))) => id.to_owned(),
        ("tool", _) => return Err(wrong(&path("tool_call_id"), "the id of the call that this answers")),
        _ => String::new(),
    };
    Ok(Message { role: role.to_owned(), content, tool_calls_json: calls, tool_call_id })
}

fn checked_calls(calls: &Value) -> Option<String> {
    let calls = calls.as_array()?;
    let sound = |call: &Value| {
        let function = call.get("function")?;
        let (name, arguments) = (function.get("name")?, function.get("arguments")?);
        (call.get("id")?.is_string() && name.is_string() && arguments.is_string()).then_some(())
    };
    calls.iter().map(sound).collect::<Option<Vec<_>>>()?;
    // An empty list is none.
    Some(if calls.is_empty() { String::new() } else { Value::from(calls.clone()).to_string() })
}

/// The one call of the old way.
fn old_calls(index: usize, call: &Value, called: &mut HashMap<String, String>) -> Option<String> {
    let (name, arguments) = (call.get("name")?.as_str()?, call.get("arguments")?.as_str()?);
    let id = format!("call_{index}");
    called.insert(name.to_owned(), id.clone());
    let function = json!({ "name": name, "arguments": arguments });
    Some(json!([{ "id": id, "type": "function", "function": function }]).to_string())
}

fn text_of(content: &Value) -> Option<String> {
    match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => parts
            .iter()
            .map(|part| match part.get("type").and_then(Value::as_str) {
                Some(kind @ ("text" | "refusal")) => part.get(kind).and_then(Value::as_str),
                _ => None,
            })
            .collect(),
        _ => None,
    }
}
