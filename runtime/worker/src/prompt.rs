//! From a request's messages to token ids.

mod chat;

use vicuna_data::conversation::{Role, Turn};
use vicuna_data::template::Encoder;
use vicuna_protocol::inference::{Generate, Message};
use vicuna_protocol::tools::Dialect;

/// Messages of a conversation, at most: a template is a program that runs over them.
const MESSAGES_LIMIT: usize = 4096;

/// The ids that the completion follows. The error is for the client.
pub fn prompt_ids(encoder: &Encoder, dialect: Option<Dialect>, generate: &Generate) -> Result<Vec<u32>, String> {
    let given = [!generate.messages.is_empty(), generate.prompt.is_some(), !generate.prompt_tokens.is_empty()];
    if given.into_iter().filter(|given| *given).count() > 1 {
        return Err("a request has messages or a prompt, not both".to_owned());
    }
    if !generate.prompt_tokens.is_empty() {
        return Ok(generate.prompt_tokens.clone());
    }
    if generate.tools_json.is_empty() && !generate.messages.iter().any(speaks_of_tools) {
        return text_ids(encoder, &generate.messages, generate.prompt.as_deref());
    }
    let dialect = dialect.ok_or("this model's template has no tools; leave tools, calls and their results out")?;
    check_count(&generate.messages)?;
    let tools = match generate.tools_json.as_str() {
        "" => Vec::new(),
        text => serde_json::from_str(text).map_err(|error| format!("tools is not a list: {error}"))?,
    };
    encoder.chat_ids(&chat::said(&generate.messages, dialect)?, &tools).map_err(|error| error.to_string())
}

/// A call or its result: only some templates have them.
fn speaks_of_tools(message: &Message) -> bool {
    message.role == "tool" || !message.tool_calls_json.is_empty()
}

/// The ids of messages, or of a text as it is.
pub fn text_ids(encoder: &Encoder, messages: &[Message], prompt: Option<&str>) -> Result<Vec<u32>, String> {
    let ids = match prompt {
        Some(prompt) => encoder.raw_ids(prompt),
        None if messages.is_empty() => return Err("messages is empty".to_owned()),
        None => {
            check_count(messages)?;
            encoder.prompt_ids(&turns(messages)?)
        }
    };
    ids.map_err(|error| error.to_string())
}

fn check_count(messages: &[Message]) -> Result<(), String> {
    match messages.len() > MESSAGES_LIMIT {
        true => Err(format!("messages has {} entries, and at most {MESSAGES_LIMIT} are taken", messages.len())),
        false => Ok(()),
    }
}

fn turns(messages: &[Message]) -> Result<Vec<Turn>, String> {
    messages
        .iter()
        .map(|message| {
            let role = Role::parse(&message.role)
                .ok_or_else(|| format!("role {:?} is not known; use system, user or assistant", message.role))?;
            Ok(Turn::new(role, message.content.clone()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vicuna_data::template::{CHATML, Template};

    #[test]
    fn more_messages_than_any_conversation_has_are_refused_in_words_for_the_client() {
        let tokenizer = vicuna_model::tiny::tokenizer();
        let encoder = Template::named(CHATML).unwrap().bind(&tokenizer).unwrap();
        let message = |number: usize| {
            let role = if number.is_multiple_of(2) { "user" } else { "assistant" };
            Message { role: role.to_owned(), content: "x".to_owned(), ..Message::default() }
        };
        let messages: Vec<Message> = (0..=MESSAGES_LIMIT).map(message).collect();
        let refused = text_ids(&encoder, &messages, None).unwrap_err();
        assert!(refused.contains("4097 entries, and at most 4096"), "{refused}");
        assert!(text_ids(&encoder, &messages[..MESSAGES_LIMIT], None).is_ok());
    }
}
