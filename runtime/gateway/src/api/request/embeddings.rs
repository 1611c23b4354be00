//! What is asked of /v1/embeddings.

use super::super::error::ApiError;
use super::super::fields::{Fields, tokens, wrong};
use super::BYTES_A_TOKEN;
use crate::config::Limits;
use serde_json::Value;
use vicuna_protocol::inference::{EmbedInput, ModelOffer};

#[derive(Clone, Debug, PartialEq)]
pub struct EmbeddingsAsk {
    pub model: String,
    pub inputs: Vec<EmbedInput>,
    /// Little-endian floats in base64, which OpenAI's clients ask for, instead of a list of numbers.
    pub base64: bool,
    dimensions: Option<u32>,
}

impl EmbeddingsAsk {
    pub fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let fields = Fields::parse(body)?;
        let base64 = match fields.get("encoding_format").map(Value::as_str) {
            None | Some(Some("float")) => false,
            Some(Some("base64")) => true,
            Some(_) => return Err(wrong("encoding_format", "float or base64")),
        };
        let dimensions = match fields.get("dimensions") {
            None => None,
            Some(_) => Some(fields.integer("dimensions", 0, 1..=1 << 20)?),
        };
        Ok(Self {
            model: fields.string("model")?.to_owned(),
            inputs: inputs(fields.required("input")?, limits.max_inputs)?,
            base64,
            dimensions,
        })
    }

    /// What it may use of its key's quota, about.
    pub fn tokens(&self) -> u32 {
        let of = |input: &EmbedInput| input.tokens.len() + input.text.len() / BYTES_A_TOKEN;
        self.inputs.iter().map(of).sum::<usize>() as u32
    }

    /// Whether a model can do what is asked.
    pub fn check(&self, offer: &ModelOffer) -> Result<(), ApiError> {
        let (model, length) = (&self.model, offer.embedding_dimensions);
        if length == 0 {
            let message = format!("The model {model} has no embeddings; choose another.");
            return Err(ApiError::unsupported("model", &message));
        }
        if self.dimensions.is_some_and(|dimensions| dimensions != length) {
            return Err(wrong("dimensions", &format!("{length}, the length of this model's embeddings, or left out")));
        }
        Ok(())
    }
}

fn inputs(value: &Value, max_inputs: usize) -> Result<Vec<EmbedInput>, ApiError> {
    let one = |value: &Value| match value {
        Value::String(text) if !text.is_empty() => Some(EmbedInput { text: text.clone(), tokens: Vec::new() }),
        Value::Array(ids) if !ids.is_empty() => tokens(ids).map(|tokens| EmbedInput { text: String::new(), tokens }),
        _ => None,
    };
    let inputs = match (one(value), value) {
        (Some(input), _) => Some(vec![input]),
        (None, Value::Array(values)) if !values.is_empty() && values.len() <= max_inputs => {
            values.iter().map(one).collect()
        }
        _ => None,
    };
    let expected = format!("a text, a list of token ids, or a list of up to {max_inputs} of either, none empty");
    inputs.ok_or_else(|| wrong("input", &expected))
}
