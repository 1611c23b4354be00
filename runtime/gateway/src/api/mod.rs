//! OpenAI's API over HTTP, the arena, what there is to watch, and the pages.

mod answer;
mod arena;
mod deadline;
mod delivery;
mod embeddings;
pub mod error;
mod fields;
mod limits;
pub mod live;
pub mod logprobs;
mod page;
mod position;
pub mod request;
mod resume;
mod shape;
mod stream;
pub mod takeover;
mod token_check;

use crate::config::Limits;
use crate::gateway::Gateway;
use crate::keys::Client;
use crate::memory::Held;
use crate::workers::registry::Model;
use answer::Caller;
use axum::body::Bytes;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router};
use deadline::Deadline;
use error::ApiError;
use position::Position;
use request::Ask;
use request::embeddings::EmbeddingsAsk;
use serde_json::{Value, json};
use shape::Endpoint;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// For a body to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_SESSION: usize = 256;

pub fn router(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .route("/v1/embeddings", post(embed))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/api/v1/token_check", post(token_check))
        .route("/api/v1/live", get(live::live))
        .merge(arena::router())
        .merge(page::router())
        .fallback(async |request: Request| ApiError::no_such_path(request.uri().path()))
        .method_not_allowed_fallback(async || ApiError::wrong_method())
        .with_state(gateway)
}

async fn chat(State(gateway): State<Arc<Gateway>>, request: Request) -> Result<Response, ApiError> {
    generate(&gateway, Endpoint::Chat, Ask::chat, request).await
}

async fn completion(State(gateway): State<Arc<Gateway>>, request: Request) -> Result<Response, ApiError> {
    generate(&gateway, Endpoint::Completion, Ask::completion, request).await
}

async fn generate(
    gateway: &Arc<Gateway>,
    endpoint: Endpoint,
    parse: fn(&[u8], &Limits) -> Result<Ask, ApiError>,
    request: Request,
) -> Result<Response, ApiError> {
    let (caller, body) = receive(gateway, request).await?;
    let client = caller.client.clone();
    let answer = async {
        let ask = parse(&body, &gateway.limits)?;
        drop(body);
        answer::answer(gateway, endpoint, ask, caller).await
    };
    Ok(limits::told(&client, answer.await))
}

async fn embed(State(gateway): State<Arc<Gateway>>, request: Request) -> Result<Response, ApiError> {
    let (caller, body) = receive(&gateway, request).await?;
    let answer = async {
        let ask = EmbeddingsAsk::parse(&body, &gateway.limits)?;
        drop(body);
        embeddings::embeddings(&gateway, ask, &caller).await
    };
    Ok(limits::told(&caller.client, answer.await))
}

async fn token_check(State(gateway): State<Arc<Gateway>>, request: Request) -> Result<Json<Value>, ApiError> {
    let (caller, body) = receive(&gateway, request).await?;
    token_check::token_check(&gateway, &body, &caller).await
}

/// Who asks is settled before the body is read, and whether there is room for it: strangers do not get to
/// send one.
async fn receive(gateway: &Gateway, request: Request) -> Result<(Caller, Bytes), ApiError> {
    let mut caller = caller(gateway, request.headers())?;
    let body = body(gateway, request).await?;
    caller.held.has_body(body.len());
    Ok((caller, body))
}

fn caller(gateway: &Gateway, headers: &HeaderMap) -> Result<Caller, ApiError> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let position = match text("last-event-id") {
        None => None,
        Some(id) => Some(Position::parse(id).ok_or_else(|| ApiError::unknown_stream("this Last-Event-ID"))?),
    };
    Ok(Caller {
        client: client(gateway, headers)?,
        position,
        held: room(gateway, headers)?,
        deadline: Deadline::of(headers, Instant::now())?,
        session: text("x-session-id").filter(|session| session.len() <= MAX_SESSION).map(str::to_owned),
        alias: None,
    })
}

/// For a body that does not say its length there must be room for the longest.
fn room(gateway: &Gateway, headers: &HeaderMap) -> Result<Held, ApiError> {
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    let limit = gateway.limits.max_body_bytes;
    gateway.memory.hold(length.unwrap_or(limit).min(limit)).ok_or_else(ApiError::too_many_requests)
}

fn client(gateway: &Gateway, headers: &HeaderMap) -> Result<Client, ApiError> {
    let authorization = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    gateway.keys.client(authorization)
}

async fn body(gateway: &Gateway, request: Request) -> Result<Bytes, ApiError> {
    let limit = gateway.limits.max_body_bytes;
    let bytes = axum::body::to_bytes(request.into_body(), limit);
    let read = tokio::time::timeout(BODY_TIMEOUT, bytes).await;
    let read = read.map_err(|_| ApiError::body_timeout())?;
    read.map_err(|error| {
        let text = std::error::Error::source(&error).map(ToString::to_string);
        match text.is_some_and(|text| text.contains("length limit")) {
            true => ApiError::too_large(limit),
            false => ApiError::bad_request(format!("The body could not be read: {error}.")),
        }
    })
}

async fn models(State(gateway): State<Arc<Gateway>>, headers: HeaderMap) -> Result<Json<Value>, ApiError> {
    let client = client(&gateway, &headers)?;
    let models = gateway.registry.models().into_iter().filter(|model| client.may_use(&model.name));
    let models: Vec<_> = models.map(|model| describe(&model)).collect();
    Ok(Json(json!({ "object": "list", "data": models })))
}

async fn model(
    State(gateway): State<Arc<Gateway>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    let model = gateway.model_for(&client(&gateway, &headers)?, &id)?;
    Ok(Json(describe(&model)))
}

fn describe(model: &Model) -> Value {
    let owner = model.name.split('/').next().unwrap_or_default();
    let known = model.offer.is_some();
    let offer = model.offer.clone().unwrap_or_default();
    json!({
        "id": model.name, "object": "model", "created": model.created, "owned_by": owner,
        "max_model_len": known.then_some(offer.max_length),
        "vicuna": {
            "workers": model.workers.len(), "tools": !offer.tool_dialect.is_empty(), "json_schema": offer.json_schema,
            "embedding_dimensions": offer.embedding_dimensions,
        },
    })
}

/// Health of the process, for probes and Prometheus.
pub fn observation_router(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/healthz", get(async || "ok"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(gateway)
}

async fn readyz(State(gateway): State<Arc<Gateway>>) -> (StatusCode, &'static str) {
    match gateway.draining.is_cancelled() {
        true => (StatusCode::SERVICE_UNAVAILABLE, "shutting down"),
        false => (StatusCode::OK, "ready"),
    }
}

async fn metrics(State(gateway): State<Arc<Gateway>>) -> Result<Vec<u8>, (StatusCode, String)> {
    let failed = |error: prometheus::Error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string());
    gateway.metrics.render().map_err(failed)
}
