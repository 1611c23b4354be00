//! What an answer must be: any text, a JSON object, or JSON of a schema.

use super::super::error::ApiError;
use super::super::fields::Fields;
use super::tools::Tools;
use serde_json::Value;
use vicuna_protocol::inference::generate::Format;

pub fn format(fields: &Fields, tools: Option<&Tools>) -> Result<Option<Format>, ApiError> {
    let asked = match fields.get("guided_json") {
        Some(schema @ Value::Object(_)) => Some(Format::JsonSchema(schema.to_string())),
        Some(_) => return Err(fields.wrong("guided_json", "a JSON schema")),
        None => response_format(fields)?,
    };
    match (asked, tools.and_then(|tools| tools.schema.clone())) {
        (Some(_), Some(_)) => {
            Err(fields.wrong("response_format", "left out where `tool_choice` already says what the answer is"))
        }
        (asked, schema) => Ok(asked.or(schema.map(Format::JsonSchema))),
    }
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
