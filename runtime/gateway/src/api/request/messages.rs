//! The messages of a chat.

use super::super::error::ApiError;
use super::super::fields::wrong;
use serde_json::Value;
use vicuna_protocol::inference::Message;

pub fn messages(value: &Value) -> Result<Vec<Message>, ApiError> {
    match value {
        Value::Array(messages) if !messages.is_empty() => messages.iter().enumerate().map(message).collect(),
        _ => Err(wrong("messages", "a list with at least one message")),
    }
}

/// A call or its result: only some templates have them.
pub fn speaks_of_tools(message: &Message) -> bool {
    message.role == "tool" || !message.tool_calls_json.is_empty()
}

fn message((index, value): (usize, &Value)) -> Result<Message, ApiError> {
    let path = |field: &str| format!("messages[{index}].{field}");
    let role = match value.get("role").and_then(Value::as_str) {
        Some("system" | "developer") => "system",
        Some(role @ ("user" | "assistant" | "tool")) => role,
        _ => return Err(wrong(&path("role"), "system, developer, user, assistant or tool")),
    };
    let present = |field: &str| value.get(field).filter(|value| !value.is_null());
    let calls = match present("tool_calls").filter(|_| role == "assistant") {
        Some(calls) => checked_calls(calls).ok_or_else(|| wrong(&path("tool_calls"), "calls as they were answered"))?,
        None => String::new(),
    };
    let content = match present("content") {
        None if !calls.is_empty() => Some(String::new()),
        content => content.and_then(text_of),
    };
    let content = content.ok_or_else(|| wrong(&path("content"), "text: a string, or a list of parts of type text"))?;
    let tool_call_id = match (role, present("tool_call_id").map(Value::as_str)) {
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

fn text_of(content: &Value) -> Option<String> {
    match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => parts
            .iter()
            .map(|part| match part.get("type").and_then(Value::as_str) {
                Some("text") => part.get("text").and_then(Value::as_str),
                _ => None,
            })
            .collect(),
        _ => None,
    }
}
