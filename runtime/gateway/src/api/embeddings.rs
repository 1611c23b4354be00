//! /v1/embeddings.

use super::answer::{Caller, job_id};
use super::error::ApiError;
use super::request::embeddings::EmbeddingsAsk;
use crate::gateway::Gateway;
use crate::workers::Registry;
use crate::workers::inquiry::{Answer, Task};
use axum::Json;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures::stream::{self, StreamExt, TryStreamExt};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::time::Instant;
use vicuna_protocol::inference::gateway_message::Body;
use vicuna_protocol::inference::{Embed, EmbedInput, Embeddings, ModelOffer};

pub async fn embeddings(gateway: &Gateway, ask: EmbeddingsAsk, caller: &Caller) -> Result<Json<Value>, ApiError> {
    let model = gateway.model_for(&caller.client, &ask.model)?;
    if let Some(offer) = &model.offer {
        ask.check(offer)?;
    }
    let _reserved = gateway.admit(&caller.client, ask.tokens())?;
    let mut ticket = gateway.loads.take(&model.name);
    let base64 = ask.base64;
    let answer = embed(gateway, ask, &model.name, caller).await;
    ticket.ended(answer.as_ref().map_or_else(|error| error.status.as_u16(), |_| 200));
    let answer = answer?;
    caller.client.charge(answer.prompt_tokens);
    Ok(Json(shape(&model.name, &answer, base64)))
}

/// Inputs that a worker computes at once: the vectors of all that a request may have would be too long for one message.
const INPUTS_AT_ONCE: usize = 256;
/// Parts of one request that are computed at the same time, by several workers where there are some.
const PARTS_AT_ONCE: usize = 4;

/// Of a model that has had no worker yet, what it can do is known once one has come.
async fn embed(gateway: &Gateway, ask: EmbeddingsAsk, model: &str, caller: &Caller) -> Result<Embeddings, ApiError> {
    let request = format!("embd-{}", uuid::Uuid::now_v7().simple());
    let deadline = caller.deadline.at_most(Instant::now() + gateway.limits.queue_timeout);
    let ask = Arc::new(ask);
    let task = |(number, inputs): (usize, &[EmbedInput])| {
        let (request, ask) = (job_id(&request, number), ask.clone());
        let embed = Embed { request: request.clone(), model: model.to_owned(), inputs: inputs.to_vec() };
        Task {
            model: model.to_owned(),
            key: caller.client.name().to_owned(),
            priority: caller.client.priority(),
            request,
            body: Body::Embed(embed),
            check: Arc::new(move |offer: &ModelOffer| ask.check(offer)),
        }
    };
    let tasks: Vec<_> = ask.inputs.chunks(INPUTS_AT_ONCE).enumerate().map(task).collect();
    let parts = stream::iter(tasks).map(|task| part(&gateway.registry, task, gateway.limits.max_queue, deadline));
    let parts: Result<Vec<_>, ApiError> = parts.buffered(PARTS_AT_ONCE).try_collect().await;
    let parts = parts.map_err(|error| match caller.deadline.has_passed(Instant::now()) {
        true => caller.deadline.error(model, false, 0),
        false => error,
    })?;
    vectors(parts, ask.inputs.len())
}

async fn part(
    registry: &Arc<Registry>,
    task: Task,
    max_queue: usize,
    deadline: Instant,
) -> Result<Embeddings, ApiError> {
    match registry.compute(&task, max_queue, deadline).await? {
        Answer::Embeddings(answer) => Ok(answer),
        _ => Err(ApiError::worker_failed("the worker sent something else than vectors")),
    }
}

/// The parts put together, if they are an answer to what was asked.
fn vectors(parts: Vec<Embeddings>, count: usize) -> Result<Embeddings, ApiError> {
    let prompt_tokens = parts.iter().map(|part| part.prompt_tokens).sum();
    let vectors: Vec<_> = parts.into_iter().flat_map(|part| part.vectors).collect();
    let mut lengths = vectors.iter().map(|vector| vector.values.len());
    let first = lengths.next();
    let even = first.is_some_and(|first| first > 0 && lengths.all(|length| length == first));
    match even && vectors.len() == count {
        true => Ok(Embeddings { vectors, prompt_tokens, ..Embeddings::default() }),
        false => Err(ApiError::worker_failed("the worker sent other vectors than it was asked for")),
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
