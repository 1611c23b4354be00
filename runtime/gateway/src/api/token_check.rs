//! FastChat's `POST /api/v1/token_check`: whether prompts fit their models.

use super::answer::Caller;
use super::error::ApiError;
use super::fields::{Fields, integer, wrong};
use crate::config::Limits;
use crate::gateway::Gateway;
use crate::workers::inquiry::Answer;
use axum::Json;
use serde_json::{Value, json};
use tokio::time::Instant;
use vicuna_protocol::inference::CountTokens;
use vicuna_protocol::inference::gateway_message::Body;

/// One of the prompts that are asked about.
struct Item {
    model: String,
    prompt: String,
    /// Wanted for the answer.
    max_tokens: u32,
}

pub async fn token_check(gateway: &Gateway, body: &[u8], caller: &Caller) -> Result<Json<Value>, ApiError> {
    let items = items(&Fields::parse(body)?, &gateway.limits)?;
    let _reserved = gateway.admit(&caller.client, 0)?;
    let mut checked = Vec::with_capacity(items.len());
    for item in items {
        checked.push(check(gateway, item, caller).await?);
    }
    Ok(Json(json!({ "prompts": checked })))
}

fn items(fields: &Fields, limits: &Limits) -> Result<Vec<Item>, ApiError> {
    let expected = format!("a list of up to {} objects with model, prompt and max_tokens", limits.max_prompts);
    let item = |value: &Value| {
        let text = |name: &str| value.get(name)?.as_str().map(str::to_owned);
        Some(Item { model: text("model")?, prompt: text("prompt")?, max_tokens: integer(value.get("max_tokens")?)? })
    };
    let items = match fields.required("prompts")? {
        Value::Array(values) if values.len() <= limits.max_prompts => values.iter().map(item).collect(),
        _ => None,
    };
    items.ok_or_else(|| wrong("prompts", &expected))
}

async fn check(gateway: &Gateway, item: Item, caller: &Caller) -> Result<Value, ApiError> {
    let model = gateway.model_for(&caller.client, &item.model)?.name;
    let mut ticket = gateway.loads.take(&model);
    let checked = count(gateway, item, model, caller).await;
    ticket.ended(checked.as_ref().map_or_else(|error| error.status.as_u16(), |_| 200));
    checked
}

async fn count(gateway: &Gateway, item: Item, model: String, caller: &Caller) -> Result<Value, ApiError> {
    let request = format!("count-{}", uuid::Uuid::now_v7().simple());
    let question =
        CountTokens { request: request.clone(), model: model.clone(), messages: Vec::new(), prompt: Some(item.prompt) };
    let deadline = caller.deadline.at_most(Instant::now() + gateway.limits.queue_timeout);
    match gateway.registry.inquire(&model, &request, &Body::CountTokens(question), deadline).await? {
        Answer::TokenCount(count) => {
            let needed = u64::from(count.tokens) + u64::from(item.max_tokens);
            let fits = needed <= u64::from(count.max_length);
            Ok(json!({ "fits": fits, "tokenCount": count.tokens, "contextLength": count.max_length }))
        }
        _ => Err(ApiError::worker_failed("the worker sent something else than a count")),
    }
}
