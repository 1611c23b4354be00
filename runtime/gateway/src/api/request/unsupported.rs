//! Options of OpenAI's API and of other servers that would change the answer, and that we do not have.

use super::super::error::ApiError;
use super::super::fields::Fields;
use serde_json::{Value, json};

/// An option, and whether this value of it changes the answer.
type Unsupported = (&'static str, fn(&Value) -> bool);

const UNSUPPORTED: &[Unsupported] = &[
    ("modalities", |value| *value != json!(["text"])),
    ("audio", |_| true),
    ("web_search_options", |_| true),
    ("suffix", |value| value != ""),
    ("prompt_logprobs", |value| *value != Value::Bool(false)),
    ("use_beam_search", |value| *value != Value::Bool(false)),
];

pub fn refuse(fields: &Fields) -> Result<(), ApiError> {
    for (name, changes_the_answer) in UNSUPPORTED {
        if fields.get(name).is_some_and(changes_the_answer) {
            let message = format!("`{name}` is not supported here; leave it out.");
            return Err(ApiError::unsupported(name, &message));
        }
    }
    Ok(())
}
