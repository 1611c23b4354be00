//! Who said what.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    System,
    User,
    Assistant,
}

impl Role {
    /// The name that chat templates and OpenAI's API use.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        }
    }

    /// The name that ShareGPT's dumps use.
    pub fn sharegpt_name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "human",
            Role::Assistant => "gpt",
        }
    }

    /// The names found in ShareGPT dumps and in OpenAI's API.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "system" | "developer" => Some(Role::System),
            "human" | "user" => Some(Role::User),
            "gpt" | "assistant" | "model" | "chatgpt" | "bing" | "bard" => Some(Role::Assistant),
            _ => None,
        }
    }
}

/// One thing said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    pub role: Role,
    pub content: String,
    /// Whether a reply is learned; one that is not is context only (`"weight": 0` in OpenAI's format).
    pub learned: bool,
}

impl Turn {
    pub fn system(content: impl Into<String>) -> Self {
        Self::new(Role::System, content)
    }

    pub fn user(content: impl Into<String>) -> Self {
        Self::new(Role::User, content)
    }

    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new(Role::Assistant, content)
    }

    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), learned: true }
    }

    /// With the weight where that is not the usual one.
    fn weighed(&self, mut record: Value) -> Value {
        if !self.learned {
            record["weight"] = json!(0);
        }
        record
    }
}

/// Turns in their order. After cleaning: a system turn or none, then user and assistant in turns,
/// ending with the assistant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    pub id: String,
    pub turns: Vec<Turn>,
}

impl Conversation {
    /// How many turns the system has at the start: none or one.
    pub fn opening(&self) -> usize {
        usize::from(self.turns.first().is_some_and(|turn| turn.role == Role::System))
    }

    /// The turns without the system's at the start.
    pub fn exchange(&self) -> &[Turn] {
        &self.turns[self.opening()..]
    }

    /// A digest of what is said and by whom. The id is not in it.
    pub fn digest(&self) -> u128 {
        digest(&self.turns)
    }

    /// The record as ShareGPT writes it.
    pub fn to_sharegpt(&self) -> Value {
        let record = |turn: &Turn| turn.weighed(json!({ "from": turn.role.sharegpt_name(), "value": turn.content }));
        let turns = self.turns.iter().map(record);
        json!({ "id": self.id, "conversations": turns.collect::<Vec<_>>() })
    }

    /// The record as OpenAI's fine-tuning API takes it.
    pub fn to_messages(&self) -> Value {
        let record = |turn: &Turn| turn.weighed(json!({ "role": turn.role.name(), "content": turn.content }));
        let turns = self.turns.iter().map(record);
        json!({ "id": self.id, "messages": turns.collect::<Vec<_>>() })
    }
}

/// A digest of turns, in which no text can pose as two.
pub fn digest(turns: &[Turn]) -> u128 {
    let mut hasher = blake3::Hasher::new_derive_key("vicuna-operator 2026 turns of a conversation");
    for turn in turns {
        hasher.update(turn.role.name().as_bytes());
        hasher.update(&(turn.content.len() as u64).to_le_bytes());
        hasher.update(turn.content.as_bytes());
    }
    let mut first = [0; 16];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    u128::from_le_bytes(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_tells_apart_who_says_what_and_where_turns_end() {
        let of = |turns: &[Turn]| digest(turns);
        assert_ne!(of(&[Turn::user("ab")]), of(&[Turn::assistant("ab")]));
        assert_ne!(of(&[Turn::user("a"), Turn::user("b")]), of(&[Turn::user("auser"), Turn::user("b")]));
        assert_eq!(of(&[Turn::user("ab")]), of(&[Turn::user("ab")]));
    }

    #[test]
    fn the_exchange_is_what_follows_the_system() {
        let conversation = Conversation { id: "x".into(), turns: vec![Turn::system("s"), Turn::user("u")] };
        assert_eq!(conversation.exchange(), [Turn::user("u")]);
        assert!(Conversation { id: "y".into(), turns: Vec::new() }.exchange().is_empty());
    }
}
