//! Reading a JSON object field by field, so that an error names the field.

use super::error::ApiError;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// The body of a request. A field that is null counts as absent, as OpenAI has it.
pub struct Fields(Map<String, Value>);

impl Fields {
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(ApiError::bad_request("The body is not a JSON object; send one.")),
            Err(error) => {
                let message = format!("The body is not JSON: {error}. Mend it there.");
                Err(ApiError::bad_request(message))
            }
        }
    }

    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    pub fn required(&self, name: &str) -> Result<&Value, ApiError> {
        self.get(name).ok_or_else(|| ApiError::bad_field(name, format!("`{name}` is missing; give it.")))
    }

    pub fn string(&self, name: &str) -> Result<&str, ApiError> {
        self.required(name)?.as_str().ok_or_else(|| wrong(name, "a string"))
    }

    pub fn boolean(&self, name: &str) -> Result<bool, ApiError> {
        match self.get(name) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| wrong(name, "true or false")),
        }
    }

    pub fn number(&self, name: &str, default: f32, range: RangeInclusive<f32>) -> Result<f32, ApiError> {
        let Some(value) = self.get(name) else {
            return Ok(default);
        };
        let number = value.as_f64().map(|number| number as f32);
        number
            .filter(|number| range.contains(number))
            .ok_or_else(|| wrong(name, &format!("a number from {} to {}", range.start(), range.end())))
    }

    pub fn integer(&self, name: &str, default: u32, range: RangeInclusive<u32>) -> Result<u32, ApiError> {
        let Some(value) = self.get(name) else {
            return Ok(default);
        };
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
        number
            .filter(|number| range.contains(number))
            .ok_or_else(|| wrong(name, &format!("an integer from {} to {}", range.start(), range.end())))
    }
}

pub fn wrong(name: &str, expected: &str) -> ApiError {
    ApiError::bad_field(name, format!("`{name}` must be {expected}."))
}
