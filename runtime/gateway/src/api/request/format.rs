//! What an answer must be: any text, a JSON object, JSON of a schema, or what vLLM's `guided_…` fields say.

use super::super::error::ApiError;
use super::super::fields::Fields;
use super::tools::Tools;
use serde_json::Value;
use vicuna_protocol::inference::generate::Format;

const MAX_CHOICES: usize = 1024;

/// Each says by itself what the answer is.
const GUIDES: [&str; 4] = ["guided_json", "guided_regex", "guided_choice", "guided_grammar"];

pub fn format(fields: &Fields, tools: Option<&Tools>) -> Result<Option<Format>, ApiError> {
    let mut guides = GUIDES.into_iter().filter(|name| fields.get(name).is_some());
    let asked = match (guides.next(), guides.next()) {
        (Some(_), Some(second)) => return Err(fields.wrong(second, "left out where another field guides the answer")),
        (Some(name), None) => Some(guided(fields, name)?),
        (None, _) => response_format(fields)?,
    };
    let required = tools.is_some_and(|tools| tools.wanted.required);
    match asked {
        Some(_) if required => {
            Err(fields.wrong("response_format", "left out where `tool_choice` already says what the answer is"))
        }
        asked => Ok(asked),
    }
}

fn guided(fields: &Fields, name: &str) -> Result<Format, ApiError> {
    match (name, fields.required(name)?) {
        ("guided_json", schema @ Value::Object(_)) => Ok(Format::JsonSchema(schema.to_string())),
        ("guided_json", _) => Err(fields.wrong(name, "a JSON schema")),
        ("guided_choice", Value::Array(choices)) if (1..=MAX_CHOICES).contains(&choices.len()) => {
            let grammar = choices.iter().map(|choice| choice.as_str().filter(|text| !text.is_empty()).map(literal));
            let grammar =
                grammar.collect::<Option<Vec<_>>>().map(|literals| format!("start: {}", literals.join(" | ")));
            let expected = "texts that are not empty";
            grammar.map(Format::Grammar).ok_or_else(|| fields.wrong(name, expected))
        }
        ("guided_choice", _) => Err(fields.wrong(name, &format!("a list of 1 to {MAX_CHOICES} texts"))),
        ("guided_regex", Value::String(regex)) => Ok(Format::Regex(regex.clone())),
        ("guided_grammar", Value::String(grammar)) => Ok(Format::Grammar(grammar.clone())),
        _ => Err(fields.wrong(name, "a string")),
    }
}

/// A text in a grammar of Lark's, in which nothing but letters and digits stands for itself.
fn literal(text: &str) -> String {
    let escaped = text.encode_utf16().map(|unit| match char::from_u32(unit.into()) {
        Some(letter) if letter.is_ascii_alphanumeric() => letter.to_string(),
        _ => format!("\\u{unit:04x}"),
    });
    format!("\"{}\"", escaped.collect::<String>())
}

fn response_format(fields: &Fields) -> Result<Option<Format>, ApiError> {
    let Some(format) = fields.object("response_format")? else {
        return Ok(None);
    };
    match format.string("type")? {
        "text" => Ok(None),
        "json_object" => Ok(Some(Format::JsonObject(true))),
        "json_schema" => {
            let described = format.object("json_schema")?;
            let described = described.ok_or_else(|| format.wrong("json_schema", "given with its schema"))?;
            match described.required("schema")? {
                schema @ Value::Object(_) => Ok(Some(Format::JsonSchema(schema.to_string()))),
                _ => Err(described.wrong("schema", "a JSON schema")),
            }
        }
        _ => Err(format.wrong("type", "text, json_object or json_schema")),
    }
}
