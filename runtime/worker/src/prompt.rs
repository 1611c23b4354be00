//! From a request's messages to token ids.

use vicuna_data::conversation::{Role, Turn};
use vicuna_data::template::Encoder;
use vicuna_protocol::inference::{Generate, Message};

/// The ids that the completion follows. The error is for the client.
pub fn prompt_ids(encoder: &Encoder, generate: &Generate) -> Result<Vec<u32>, String> {
    let ids = match &generate.prompt {
        Some(_) if !generate.messages.is_empty() => {
            return Err("a request has messages or a prompt, not both".to_owned());
        }
        Some(prompt) => encoder.raw_ids(prompt),
        None if generate.messages.is_empty() => return Err("messages is empty".to_owned()),
        None => encoder.prompt_ids(&turns(&generate.messages)?),
    };
    ids.map_err(|error| error.to_string())
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
