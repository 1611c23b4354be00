//! Messages with calls and their results, as templates expect them: arguments are objects, results know the name
//! of what was called.

use serde_json::{Value, json};
use std::collections::HashMap;
use vicuna_data::template::Said;
use vicuna_protocol::inference::Message;
use vicuna_protocol::tools::Dialect;

/// Letters of an id of a call, which Mistral's templates insist on.
const MISTRAL_ID: usize = 9;

/// The error is for the client.
pub fn said(messages: &[Message], dialect: Dialect) -> Result<Vec<Said>, String> {
    let mut names = HashMap::new();
    messages.iter().enumerate().map(|(index, message)| one(index, message, dialect, &mut names)).collect()
}

/// `names`: of the calls so far, by their ids.
fn one(index: usize, message: &Message, dialect: Dialect, names: &mut HashMap<String, String>) -> Result<Said, String> {
    let calls: Vec<Value> = match message.tool_calls_json.as_str() {
        "" => Vec::new(),
        text => serde_json::from_str(text).map_err(|error| format!("messages[{index}].tool_calls: {error}"))?,
    };
    let calls = calls.iter().enumerate().map(|(number, call)| {
        let (id, name) = (text(call.get("id")), text(call.pointer("/function/name")));
        let arguments = arguments(text(call.pointer("/function/arguments")));
        let arguments = arguments.ok_or_else(|| {
            format!("messages[{index}].tool_calls[{number}].function.arguments is not a JSON object; send it as it was answered")
        })?;
        names.insert(id.to_owned(), name.to_owned());
        let function = json!({ "name": name, "arguments": arguments });
        Ok(json!({ "id": written_id(id, dialect), "type": "function", "function": function }))
    });
    Ok(Said {
        calls: calls.collect::<Result<_, String>>()?,
        role: message.role.clone(),
        content: message.content.clone(),
        call_id: written_id(&message.tool_call_id, dialect),
        name: names.get(&message.tool_call_id).cloned().unwrap_or_default(),
    })
}

fn text(value: Option<&Value>) -> &str {
    value.and_then(Value::as_str).unwrap_or_default()
}

fn arguments(text: &str) -> Option<Value> {
    match text.trim() {
        "" => Some(json!({})),
        text => serde_json::from_str(text).ok().filter(Value::is_object),
    }
}

/// Ours are longer than Mistral's, and other servers' are, too.
fn written_id(id: &str, dialect: Dialect) -> String {
    let mistral = matches!(dialect, Dialect::MistralList | Dialect::MistralArguments);
    let fits = id.len() == MISTRAL_ID && id.chars().all(|letter| letter.is_ascii_alphanumeric());
    match id {
        "" => String::new(),
        id if mistral && !fits => blake3::hash(id.as_bytes()).to_hex()[..MISTRAL_ID].to_owned(),
        id => id.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn called(arguments: &str) -> [Message; 2] {
        let calls = json!([{ "id": "call_1", "function": { "name": "weather", "arguments": arguments } }]);
        let role = |role: &str| Message { role: role.into(), ..Message::default() };
        [
            Message { tool_calls_json: calls.to_string(), ..role("assistant") },
            Message { tool_call_id: "call_1".into(), content: "sunny".into(), ..role("tool") },
        ]
    }

    #[test]
    fn arguments_are_objects_and_a_result_has_the_name_of_its_call() {
        let chat = said(&called(r#"{"in": "Rome"}"#), Dialect::Hermes).unwrap();
        assert_eq!(chat[0].calls[0]["function"]["arguments"], json!({ "in": "Rome" }));
        assert_eq!((chat[1].name.as_str(), chat[1].call_id.as_str()), ("weather", "call_1"));
    }

    #[test]
    fn ids_are_as_mistral_s_templates_want_them_and_still_belong_together() {
        let chat = said(&called("{}"), Dialect::MistralList).unwrap();
        assert_eq!(chat[1].call_id.len(), MISTRAL_ID);
        assert_eq!(chat[0].calls[0]["id"], json!(chat[1].call_id));
        assert_eq!(written_id("abcDEF123", Dialect::MistralList), "abcDEF123");
    }

    #[test]
    fn arguments_that_are_no_object_are_the_client_s_mistake() {
        let refused = said(&called("[1]"), Dialect::Hermes).unwrap_err();
        assert!(refused.contains("messages[0].tool_calls[0].function.arguments"), "{refused}");
    }
}
