//! Reading conversations: ShareGPT's JSON and OpenAI's messages, an array or one record a line.
//!
//! A record that cannot be understood is an error that says where; a record that is understood but
//! cannot train a chat model is repaired or dropped by the rules that Vicuna's authors published,
//! and counted.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    pub role: Role,
    pub content: String,
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
        Self { role, content: content.into() }
    }
}

/// A system turn or none, then user and assistant in turns, ending with the assistant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    pub id: String,
    pub turns: Vec<Turn>,
}

impl Conversation {
    /// The record as ShareGPT writes it, which [`load_conversations`] reads back.
    pub fn to_sharegpt(&self) -> Value {
        let turns = self.turns.iter().map(|turn| {
            let from = match turn.role {
                Role::System => "system",
                Role::User => "human",
                Role::Assistant => "gpt",
            };
            serde_json::json!({ "from": from, "value": turn.content })
        });
        serde_json::json!({ "id": self.id, "conversations": turns.collect::<Vec<_>>() })
    }
}

/// What cleaning did, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Change {
    /// A turn before the first question was dropped.
    LeadingReply,
    /// A question without a reply at the end was dropped.
    TrailingQuestion,
    /// The conversation was dropped: the same side speaks twice, or a system turn is inside.
    NotAlternating,
    /// The conversation was dropped: a turn says nothing.
    EmptyTurn,
    /// The conversation was dropped: no reply was left to learn from.
    NoReply,
}

impl Change {
    fn explanation(self) -> &'static str {
        match self {
            Change::LeadingReply => "turns before the first question dropped",
            Change::TrailingQuestion => "questions without a reply dropped at the end",
            Change::NotAlternating => "conversations dropped because the roles do not alternate",
            Change::EmptyTurn => "conversations dropped because a turn is empty",
            Change::NoReply => "conversations dropped because no reply was left",
        }
    }
}

/// What came in, what is left, and everything that was changed on the way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub records: usize,
    pub kept: usize,
    pub changes: BTreeMap<Change, usize>,
}

impl Report {
    fn count(&mut self, change: Change, times: usize) {
        if times > 0 {
            *self.changes.entry(change).or_default() += times;
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} of {} conversations kept", self.kept, self.records)?;
        for (change, times) in &self.changes {
            write!(out, "; {times} {}", change.explanation())?;
        }
        Ok(())
    }
}

/// Why a dataset cannot be read. Places count from 1, as editors do.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(
        "the dataset is empty: write a JSON array or JSON lines of {{\"id\", \"conversations\"}} \
         or {{\"messages\"}} records"
    )]
    Empty,
    #[error("{at} is not JSON: {source}; mend it there")]
    Json { at: Place, source: serde_json::Error },
    #[error("{at}, field {field}: {problem}")]
    Field { at: Place, field: String, problem: String },
    #[error("no conversation was left after cleaning: {0}")]
    NothingLeft(Report),
}

/// Where in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Document,
    Record(usize),
    Line(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Document => write!(out, "the document"),
            Place::Record(index) => write!(out, "record {index}"),
            Place::Line(line) => write!(out, "line {line}"),
        }
    }
}

/// Reads a whole dataset: a JSON array, or one JSON record a line.
pub fn load_conversations(bytes: &[u8]) -> Result<(Vec<Conversation>, Report), LoadError> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut report = Report::default();
    let mut conversations = Vec::new();
    for (at, record) in records(bytes)? {
        report.records += 1;
        let raw = parse_record(at, report.records, &record)?;
        conversations.extend(clean(raw, &mut report));
    }
    report.kept = conversations.len();
    match (report.records, report.kept) {
        (0, _) => Err(LoadError::Empty),
        (_, 0) => Err(LoadError::NothingLeft(report)),
        _ => Ok((conversations, report)),
    }
}

fn records(bytes: &[u8]) -> Result<Vec<(Place, Value)>, LoadError> {
    if bytes.trim_ascii_start().first() == Some(&b'[') {
        let values: Vec<Value> = parse(Place::Document, bytes)?;
        return Ok(values.into_iter().enumerate().map(|(index, value)| (Place::Record(index + 1), value)).collect());
    }
    bytes
        .split(|byte| *byte == b'\n')
        .enumerate()
        .filter(|(_, line)| !line.trim_ascii().is_empty())
        .map(|(index, line)| {
            let at = Place::Line(index + 1);
            Ok((at, parse(at, line)?))
        })
        .collect()
}

fn parse<T: serde::de::DeserializeOwned>(at: Place, bytes: &[u8]) -> Result<T, LoadError> {
    serde_json::from_slice(bytes).map_err(|source| LoadError::Json { at, source })
}

fn parse_record(at: Place, index: usize, record: &Value) -> Result<Conversation, LoadError> {
    let (list, names) = match (record.get("conversations"), record.get("messages")) {
        (Some(turns), _) => (turns, ["conversations", "from", "value"]),
        (None, Some(messages)) => (messages, ["messages", "role", "content"]),
        (None, None) => {
            let problem = "neither it nor \"messages\" is there; a record needs one of them";
            return Err(field(at, "conversations", problem));
        }
    };
    let Value::Array(list) = list else {
        return Err(field(at, names[0], "is not a list of turns; make it one"));
    };
    let turns =
        list.iter().enumerate().map(|(turn, value)| parse_turn(at, turn, value, names)).collect::<Result<_, _>>()?;
    let id = match record.get("id") {
        Some(Value::String(id)) => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        _ => format!("record-{index}"),
    };
    Ok(Conversation { id, turns })
}

fn parse_turn(at: Place, turn: usize, value: &Value, names: [&str; 3]) -> Result<Turn, LoadError> {
    let [list, role_name, content_name] = names;
    let path = |name: &str| format!("{list}[{turn}].{name}");
    let role = value.get(role_name).and_then(Value::as_str);
    let role = role.ok_or_else(|| field(at, path(role_name), "is missing or not a string"))?;
    let role = Role::parse(role).ok_or_else(|| {
        let problem = format!("{role:?} is no known role; use system, human (user), gpt (assistant)");
        field(at, path(role_name), problem)
    })?;
    let content = value.get(content_name).and_then(text_of);
    let content = content.ok_or_else(|| {
        let problem = "is missing or not text; only text can be trained on";
        field(at, path(content_name), problem)
    })?;
    Ok(Turn { role, content })
}

/// Text as a string, or as OpenAI's list of text parts.
fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => parts.iter().map(|part| part.get("text").and_then(Value::as_str)).collect(),
        _ => None,
    }
}

fn field(at: Place, field: impl Into<String>, problem: impl Into<String>) -> LoadError {
    LoadError::Field { at, field: field.into(), problem: problem.into() }
}

fn clean(mut conversation: Conversation, report: &mut Report) -> Option<Conversation> {
    let turns = &mut conversation.turns;
    let start = usize::from(turns.first().is_some_and(|turn| turn.role == Role::System));
    let leading = turns[start..].iter().take_while(|turn| turn.role == Role::Assistant).count();
    turns.drain(start..start + leading);
    report.count(Change::LeadingReply, leading);

    let trailing = turns[start..].iter().rev().take_while(|turn| turn.role == Role::User).count();
    turns.truncate(turns.len() - trailing);
    report.count(Change::TrailingQuestion, trailing);

    match unfit(&turns[start..]) {
        Some(reason) => {
            report.count(reason, 1);
            None
        }
        None => Some(conversation),
    }
}

/// Why these turns, without the system's, cannot be trained on.
fn unfit(turns: &[Turn]) -> Option<Change> {
    let expected = [Role::User, Role::Assistant].into_iter().cycle();
    if turns.is_empty() {
        Some(Change::NoReply)
    } else if turns.iter().zip(expected).any(|(turn, role)| turn.role != role) {
        Some(Change::NotAlternating)
    } else if turns.iter().any(|turn| turn.content.trim().is_empty()) {
        Some(Change::EmptyTurn)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<(Vec<Conversation>, Report), LoadError> {
        load_conversations(text.as_bytes())
    }

    fn roles(conversation: &Conversation) -> Vec<Role> {
        conversation.turns.iter().map(|turn| turn.role).collect()
    }

    #[test]
    fn sharegpt_arrays_and_openai_lines_give_the_same_conversation() {
        let array = r#"[{"id":"a","conversations":[{"from":"human","value":"Hi"},{"from":"gpt","value":"Ho"}]}]"#;
        let lines = "\n{\"id\":\"a\",\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"Hi\"}]},{\"role\":\"assistant\",\"content\":\"Ho\"}]}\n\n";
        assert_eq!(load(array).unwrap(), load(lines).unwrap());
        assert_eq!(load(array).unwrap().1.kept, 1);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let conversation =
            Conversation { id: "x".into(), turns: vec![Turn::system("S"), Turn::user("U"), Turn::assistant("A")] };
        let text = conversation.to_sharegpt().to_string();
        assert_eq!(load(&text).unwrap().0, vec![conversation]);
    }

    #[test]
    fn cleaning_is_counted_by_reason() {
        let text = r#"[
            {"conversations":[{"from":"gpt","value":"a"},{"from":"human","value":"b"},{"from":"gpt","value":"c"},{"from":"human","value":"d"}]},
            {"conversations":[{"from":"human","value":"a"},{"from":"human","value":"b"},{"from":"gpt","value":"c"}]},
            {"conversations":[{"from":"human","value":"a"}]},
            {"conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"  "}]}
        ]"#;
        let (kept, report) = load(text).unwrap();
        assert_eq!(roles(&kept[0]), [Role::User, Role::Assistant]);
        assert_eq!((report.records, report.kept), (4, 1));
        let expected = [
            (Change::LeadingReply, 1),
            (Change::TrailingQuestion, 2),
            (Change::NotAlternating, 1),
            (Change::EmptyTurn, 1),
            (Change::NoReply, 1),
        ];
        assert_eq!(report.changes, BTreeMap::from(expected));
        assert!(report.to_string().starts_with("1 of 4 conversations kept; 1 turns before"));
    }

    #[test]
    fn errors_say_where_and_what_to_do() {
        let broken = "{\"messages\":[]}\n{\"messages\":[{\"role\":\"tool\",\"content\":\"x\"}]}";
        let message = load(broken).unwrap_err().to_string();
        assert!(message.starts_with("line 2, field messages[0].role: \"tool\""), "{message}");
        let message = load("[{\"id\":1}]").unwrap_err().to_string();
        assert!(message.starts_with("record 1, field conversations:"), "{message}");
        let message = load("{\"messages\":[]}\n{").unwrap_err().to_string();
        assert!(message.starts_with("line 2 is not JSON"), "{message}");
    }

    #[test]
    fn nothing_is_an_error() {
        assert!(matches!(load(" \n"), Err(LoadError::Empty)));
        assert!(matches!(load("[]"), Err(LoadError::Empty)));
        let dropped = load("[{\"conversations\":[]}]").unwrap_err().to_string();
        assert!(dropped.contains("no reply was left"), "{dropped}");
    }
}
