//! /v1/embeddings.

use super::answer::Caller;
use super::error::ApiError;
use super::request::embeddings::EmbeddingsAsk;
use crate::gateway::Gateway;
use crate::workers::inquiry::Answer;
use axum::Json;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio::time::Instant;
use vicuna_protocol::inference::gateway_message::Body;
use vicuna_protocol::inference::{Embed, Embeddings};

pub async fn embeddings(gateway: &Gateway, ask: EmbeddingsAsk, caller: &Caller) -> Result<Json<Value>, ApiError> {
    let model = gateway.model_for(&caller.client, &ask.model)?;
    if let Some(offer) = &model.offer {
        ask.check(offer)?;
    }
    gateway.admit(&caller.client)?;
    let mut ticket = gateway.loads.take(&model.name);
    let base64 = ask.base64;
    let answer = embed(gateway, ask, &model.name).await;
    ticket.ended(answer.as_ref().map_or_else(|error| error.status.as_u16(), |_| 200));
    let answer = answer?;
    caller.client.charge(answer.prompt_tokens);
    Ok(Json(shape(&model.name, &answer, base64)))
}

/// Of a model that has had no worker yet, what it can do is known once one has come.
async fn embed(gateway: &Gateway, ask: EmbeddingsAsk, model: &str) -> Result<Embeddings, ApiError> {
    let deadline = Instant::now() + gateway.limits.queue_timeout;
    let offer = gateway.registry.offer_before(model, deadline).await?;
    ask.check(&offer)?;
    let request = format!("embd-{}", uuid::Uuid::now_v7().simple());
    let count = ask.inputs.len();
    let body = Body::Embed(Embed { request: request.clone(), model: model.to_owned(), inputs: ask.inputs });
    let answer = gateway.registry.inquire(model, &request, &body, deadline).await?;
    vectors(answer, count, offer.embedding_dimensions)
}

/// The answer, if it is one to what was asked.
fn vectors(answer: Answer, count: usize, dimensions: u32) -> Result<Embeddings, ApiError> {
    match answer {
        Answer::Embeddings(answer)
            if answer.vectors.len() == count
                && answer.vectors.iter().all(|vector| vector.values.len() == dimensions as usize) =>
        {
            Ok(answer)
        }
        _ => Err(ApiError::worker_failed("the worker sent other vectors than it was asked for")),
    }
}

fn shape(model: &str, answer: &Embeddings, base64: bool) -> Value {
    let embedding = |values: &[f32]| match base64 {
        true => Value::from(STANDARD.encode(values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())),
        false => Value::from(values.to_vec()),
    };
    let data: Vec<_> = answer
        .vectors
        .iter()
        .enumerate()
        .map(|(index, vector)| json!({ "object": "embedding", "index": index, "embedding": embedding(&vector.values) }))
        .collect();
    json!({
        "object": "list", "model": model, "data": data,
        "usage": { "prompt_tokens": answer.prompt_tokens, "total_tokens": answer.prompt_tokens },
    })
}
