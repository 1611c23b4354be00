//! How a completion samples.

use super::super::error::ApiError;
use super::super::fields::{Fields, integer, wrong};
use serde_json::Value;
use std::collections::HashMap;
use vicuna_protocol::inference::Sampling;

const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
const MAX_BIASES: usize = 1024;
const MAX_TOKENS: u32 = 1 << 24;

/// `limit`: the name of the field that bounds the length, by default `default_tokens`, from `least` on.
pub fn sampling(fields: &Fields, limit: &str, default_tokens: u32, least: u32) -> Result<Sampling, ApiError> {
    let max_tokens = match fields.get(limit) {
        None => default_tokens,
        Some(_) => fields.integer(limit, 0, least..=MAX_TOKENS)?,
    };
    let min_tokens = fields.integer("min_tokens", 0, 0..=MAX_TOKENS)?;
    if max_tokens > 0 && min_tokens > max_tokens {
        return Err(fields.wrong("min_tokens", &format!("at most `{limit}`")));
    }
    Ok(Sampling {
        max_tokens,
        min_tokens,
        ignore_end: fields.boolean("ignore_eos")?,
        temperature: fields.number("temperature", 1.0, 0.0..=2.0)?,
        // On the wire 0 is "not given"; the client's leaves only the likeliest token, as the least above it does.
        top_p: fields.number("top_p", 1.0, 0.0..=1.0)?.max(f32::MIN_POSITIVE),
        top_k: top_k(fields)?,
        min_p: fields.number("min_p", 0.0, 0.0..=1.0)?,
        seed: seed(fields)?,
        stop: stop(fields)?,
        stop_tokens: stop_tokens(fields)?,
        frequency_penalty: fields.number("frequency_penalty", 0.0, -2.0..=2.0)?,
        presence_penalty: fields.number("presence_penalty", 0.0, -2.0..=2.0)?,
        repetition_penalty: fields.number("repetition_penalty", 1.0, 0.01..=100.0)?,
        logit_bias: logit_bias(fields)?,
    })
}

/// -1 is how some clients say that it is off.
fn top_k(fields: &Fields) -> Result<u32, ApiError> {
    match fields.get("top_k").and_then(Value::as_i64) {
        Some(-1) => Ok(0),
        _ => fields.integer("top_k", 0, 0..=MAX_TOKENS),
    }
}

/// The seed is fixed here, once, so that another worker continues with the same noise.
fn seed(fields: &Fields) -> Result<u64, ApiError> {
    match fields.get("seed") {
        None => Ok(rand::random()),
        Some(value) => value
            .as_u64()
            .or_else(|| value.as_i64().map(|seed| seed as u64))
            .ok_or_else(|| wrong("seed", "an integer of 64 bits")),
    }
}

fn stop(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let stops = match fields.get("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(stops)) => stops.as_slice(),
        Some(one) => std::slice::from_ref(one),
    };
    let fits = |text: &&str| !text.is_empty() && text.len() <= MAX_STOP_BYTES;
    let texts = stops.iter().map(|stop| stop.as_str().filter(fits).map(str::to_owned));
    let texts = texts.collect::<Option<Vec<_>>>().filter(|texts| texts.len() <= MAX_STOPS);
    let expected = format!("a text or up to {MAX_STOPS} texts, of 1 to {MAX_STOP_BYTES} bytes each");
    texts.ok_or_else(|| wrong("stop", &expected))
}

fn stop_tokens(fields: &Fields) -> Result<Vec<u32>, ApiError> {
    let tokens = match fields.get("stop_token_ids") {
        None => return Ok(Vec::new()),
        Some(Value::Array(ids)) if ids.len() <= MAX_STOPS => ids.iter().map(integer).collect(),
        Some(_) => None,
    };
    tokens.ok_or_else(|| wrong("stop_token_ids", &format!("a list of up to {MAX_STOPS} token ids")))
}

fn logit_bias(fields: &Fields) -> Result<HashMap<u32, f32>, ApiError> {
    let biases = match fields.get("logit_bias") {
        None => return Ok(HashMap::new()),
        Some(Value::Object(biases)) if biases.len() <= MAX_BIASES => biases,
        Some(_) => return Err(wrong("logit_bias", &format!("an object with up to {MAX_BIASES} token ids"))),
    };
    let bias = |(token, bias): (&String, &Value)| {
        let token = token.parse().ok()?;
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias))?;
        Some((token, bias as f32))
    };
    let expected = "an object from token ids to numbers from -100 to 100";
    biases.iter().map(bias).collect::<Option<_>>().ok_or_else(|| wrong("logit_bias", expected))
}
