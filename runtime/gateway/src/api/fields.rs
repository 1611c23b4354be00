//! Reading a JSON object field by field, so that an error names the field.

use super::error::ApiError;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// The body of a request, or an object in it. A field that is null counts as absent, as OpenAI has it.
pub struct Fields {
    fields: Map<String, Value>,
    /// Where the object is, with a dot at its end; empty for the body.
    path: String,
}

impl Fields {
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self { fields, path: String::new() }),
            Ok(_) => Err(ApiError::bad_request("The body is not a JSON object; send one.")),
            Err(error) => {
                let message = format!("The body is not JSON: {error}. Mend it there.");
                Err(ApiError::bad_request(message))
            }
        }
    }

    pub fn get(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    /// The error for one of its fields.
    pub fn wrong(&self, name: &str, expected: &str) -> ApiError {
        wrong(&format!("{}{name}", self.path), expected)
    }

    pub fn required(&self, name: &str) -> Result<&Value, ApiError> {
        let path = format!("{}{name}", self.path);
        self.get(name).ok_or_else(|| ApiError::bad_field(&path, format!("`{path}` is missing; give it.")))
    }

    pub fn string(&self, name: &str) -> Result<&str, ApiError> {
        self.required(name)?.as_str().ok_or_else(|| self.wrong(name, "a string"))
    }

    pub fn object(&self, name: &str) -> Result<Option<Self>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(fields)) => {
                Ok(Some(Self { fields: fields.clone(), path: format!("{}{name}.", self.path) }))
            }
            Some(_) => Err(self.wrong(name, "an object")),
        }
    }

    pub fn boolean(&self, name: &str) -> Result<bool, ApiError> {
        match self.get(name) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(name, "true or false")),
        }
    }

    pub fn number(&self, name: &str, default: f32, range: RangeInclusive<f32>) -> Result<f32, ApiError> {
        let Some(value) = self.get(name) else {
            return Ok(default);
        };
        let number = value.as_f64().map(|number| number as f32);
        number
            .filter(|number| range.contains(number))
            .ok_or_else(|| self.wrong(name, &format!("a number from {} to {}", range.start(), range.end())))
    }

    pub fn integer(&self, name: &str, default: u32, range: RangeInclusive<u32>) -> Result<u32, ApiError> {
        let Some(value) = self.get(name) else {
            return Ok(default);
        };
        integer(value)
            .filter(|number| range.contains(number))
            .ok_or_else(|| self.wrong(name, &format!("an integer from {} to {}", range.start(), range.end())))
    }
}

pub fn integer(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|number| u32::try_from(number).ok())
}

/// A list of token ids.
pub fn tokens(values: &[Value]) -> Option<Vec<u32>> {
    values.iter().map(integer).collect()
}

pub fn wrong(path: &str, expected: &str) -> ApiError {
    ApiError::bad_field(path, format!("`{path}` must be {expected}."))
}
