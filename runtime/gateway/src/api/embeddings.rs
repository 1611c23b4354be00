//! /v1/embeddings.

use super::answer::Caller;
use super::error::ApiError;
use super::request::embeddings::EmbeddingsAsk;
use crate::gateway::Gateway;
use crate::workers::inquiry::{Answer, Task};
use axum::Json;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::time::Instant;
use vicuna_protocol::inference::gateway_message::Body;
use vicuna_protocol::inference::{Embed, Embeddings, ModelOffer};

pub async fn embeddings(gateway: &Gateway, ask: EmbeddingsAsk, caller: &Caller) -> Result<Json<Value>, ApiError> {
    let model = gateway.model_for(&caller.client, &ask.model)?;
    if let Some(offer) = &model.offer {
        ask.check(offer)?;
    }
    gateway.admit(&caller.client)?;
    let mut ticket = gateway.loads.take(&model.name);
    let base64 = ask.base64;
    let answer = embed(gateway, ask, &model.name, caller).await;
    ticket.ended(answer.as_ref().map_or_else(|error| error.status.as_u16(), |_| 200));
    let answer = answer?;
    caller.client.charge(answer.prompt_tokens);
    Ok(Json(shape(&model.name, &answer, base64)))
}

/// Of a model that has had no worker yet, what it can do is known once one has come.
async fn embed(gateway: &Gateway, ask: EmbeddingsAsk, model: &str, caller: &Caller) -> Result<Embeddings, ApiError> {
    let request = format!("embd-{}", uuid::Uuid::now_v7().simple());
    let count = ask.inputs.len();
    let body = Body::Embed(Embed { request: request.clone(), model: model.to_owned(), inputs: ask.inputs.clone() });
    let task = Task {
        model: model.to_owned(),
        key: caller.client.name().to_owned(),
        priority: caller.client.priority(),
        request,
        body,
        check: Arc::new(move |offer: &ModelOffer| ask.check(offer)),
    };
    let deadline = caller.deadline.at_most(Instant::now() + gateway.limits.queue_timeout);
    let answer = gateway.registry.compute(&task, gateway.limits.max_queue, deadline).await;
    let answer = answer.map_err(|error| match caller.deadline.has_passed(Instant::now()) {
        true => caller.deadline.error(model, false, 0),
        false => error,
    })?;
    vectors(answer, count)
}

/// The answer, if it is one to what was asked.
fn vectors(answer: Answer, count: usize) -> Result<Embeddings, ApiError> {
    let even = |answer: &Embeddings| {
        let mut lengths = answer.vectors.iter().map(|vector| vector.values.len());
        let first = lengths.next();
        first.is_some_and(|first| first > 0 && lengths.all(|length| length == first))
    };
    match answer {
        Answer::Embeddings(answer) if answer.vectors.len() == count && even(&answer) => Ok(answer),
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
