//! Calls of tools, as models write them. Each family has a dialect, one file each: which templates it belongs to,
//! how calls are read from what the model writes, and the grammar that holds it to them.
//!
//! Reading is a pure function of the text so far, and what it tells only grows: so that a stream can tell the
//! difference, also after it has moved to another worker or gateway.

mod grammar;
mod hermes;
mod llama;
mod mistral;
mod scan;

use serde_json::{Value, json};

/// One call, of which the arguments may not be complete yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    pub name: String,
    /// A JSON object, as the model wrote it.
    pub arguments: String,
}

/// What there is for the client in a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    pub content: String,
    pub calls: Vec<Call>,
}

/// How a family of models writes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// `<tool_call>{"name": …, "arguments": …}</tool_call>`: Qwen 2 and 2.5, Hermes.
    Hermes,
    /// `{"name": …, "parameters": …}` and nothing else: Llama 3.1 to 3.3.
    Llama,
    /// `[TOOL_CALLS][{"name": …, "arguments": …}, …]`: Mistral's first.
    MistralList,
    /// `[TOOL_CALLS]name[ARGS]{…}`: Mistral's later ones.
    MistralArguments,
}

const DIALECTS: [Dialect; 4] = [Dialect::Hermes, Dialect::Llama, Dialect::MistralList, Dialect::MistralArguments];

impl Dialect {
    /// The dialect that a chat template in Jinja teaches; none if it does not speak of tools.
    pub fn of(template: &str) -> Option<Self> {
        let says = |text: &str| template.contains(text);
        if !says("tools") {
            return None;
        }
        if says(hermes::OPEN) {
            return Some(Self::Hermes);
        }
        if says(mistral::MARK) {
            return Some(if says(mistral::ARGUMENTS) { Self::MistralArguments } else { Self::MistralList });
        }
        (says(llama::MARK) || says("ipython")).then_some(Self::Llama)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Hermes => "hermes",
            Self::Llama => "llama",
            Self::MistralList => "mistral-list",
            Self::MistralArguments => "mistral-arguments",
        }
    }

    pub fn named(name: &str) -> Option<Self> {
        DIALECTS.into_iter().find(|dialect| dialect.name() == name)
    }

    /// Control tokens that are part of what is read: they are text, where others are not.
    pub fn marks(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &hermes::MARKS,
            Self::Llama => &llama::MARKS,
            Self::MistralList | Self::MistralArguments => &mistral::MARKS,
        }
    }

    /// `ended`: nothing more will come. Until then, what may still become a call is held back. `tools`: the names
    /// of those that may be called.
    pub fn read(self, text: &str, ended: bool, tools: &[String]) -> Reading {
        match self {
            Self::Hermes => hermes::read(text, ended),
            Self::Llama => llama::read(text, ended, tools),
            Self::MistralList | Self::MistralArguments => mistral::read(text, ended),
        }
    }

    /// What an answer with these tools must be, in Lark's syntax as llguidance reads it; none where it may be
    /// anything.
    pub fn grammar(self, tools: &[Tool], wanted: &Wanted) -> Option<String> {
        let held = wanted.required || wanted.answer.is_some() || tools.iter().any(|tool| tool.strict);
        let named = |tool: &&Tool| wanted.function.as_ref().is_none_or(|name| *name == tool.name);
        let tools: Vec<_> = tools.iter().filter(named).collect();
        let rules = match self {
            Self::Hermes => hermes::rules(&tools, wanted),
            Self::Llama => llama::rules(&tools, wanted),
            Self::MistralList => mistral::list_rules(&tools, wanted),
            Self::MistralArguments => mistral::arguments_rules(&tools, wanted),
        };
        held.then(|| rules.grammar(wanted))
    }
}

/// What an answer is to hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// It must be a call.
    pub required: bool,
    /// Of this function alone.
    pub function: Option<String>,
    /// At most one.
    pub single: bool,
    /// The JSON schema of an answer that is no call; none: any text.
    pub answer: Option<Value>,
}

/// A function that may be called.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    pub name: String,
    /// The JSON schema of its arguments.
    pub parameters: Value,
    /// Its arguments are of the schema without fail.
    pub strict: bool,
}

impl Tool {
    /// From OpenAI's list; what is none of it is left out.
    pub fn list(tools: &Value) -> Vec<Self> {
        let one = |tool: &Value| {
            let function = tool.get("function")?;
            let parameters = function.get("parameters").filter(|parameters| parameters.is_object());
            Some(Self {
                name: function.get("name")?.as_str()?.to_owned(),
                parameters: parameters.cloned().unwrap_or_else(any_object),
                strict: function.get("strict").and_then(Value::as_bool).unwrap_or(false),
            })
        };
        tools.as_array().into_iter().flatten().filter_map(one).collect()
    }

    /// What its arguments are held to: where a call is wanted, they are of the schema anyway.
    fn held_to(&self, wanted: &Wanted) -> Value {
        if self.strict || wanted.required { self.parameters.clone() } else { any_object() }
    }
}

fn any_object() -> Value {
    json!({ "type": "object" })
}

/// The longest beginning of `text` that is none of `mark`, whatever comes next.
fn certain<'a>(text: &'a str, mark: &str) -> &'a str {
    let begun = (1..mark.len()).rev().find(|length| text.ends_with(&mark[..*length]));
    text[..text.len() - begun.unwrap_or(0)].trim_end()
}

#[cfg(test)]
mod tests;
