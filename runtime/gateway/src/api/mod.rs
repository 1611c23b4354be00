//! OpenAI's API over HTTP, and the chat page.

mod answer;
pub mod error;
mod fields;
mod page;
mod request;
mod shape;
mod stream;

use crate::gateway::Gateway;
use crate::workers::registry::Model;
use axum::body::Bytes;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router};
use error::ApiError;
use request::Ask;
use serde_json::{Value, json};
use shape::Endpoint;
use std::sync::Arc;
use std::time::Duration;

/// For a body to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

pub fn router(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .merge(page::router())
        .fallback(async |request: Request| ApiError::no_such_path(request.uri().path()))
        .method_not_allowed_fallback(async || ApiError::wrong_method())
        .with_state(gateway)
}

async fn chat(State(gateway): State<Arc<Gateway>>, request: Request) -> Result<Response, ApiError> {
    let body = body(&gateway, request).await?;
    let ask = Ask::chat(&body, &gateway.limits)?;
    answer::answer(&gateway, Endpoint::Chat, ask).await
}

async fn completion(State(gateway): State<Arc<Gateway>>, request: Request) -> Result<Response, ApiError> {
    let body = body(&gateway, request).await?;
    let ask = Ask::completion(&body, &gateway.limits)?;
    answer::answer(&gateway, Endpoint::Completion, ask).await
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

async fn models(State(gateway): State<Arc<Gateway>>) -> Json<Value> {
    let models: Vec<_> = gateway.registry.models().iter().map(describe).collect();
    Json(json!({ "object": "list", "data": models }))
}

async fn model(State(gateway): State<Arc<Gateway>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let model = gateway.model(&id)?;
    Ok(Json(describe(&model)))
}

fn describe(model: &Model) -> Value {
    let owner = model.name.split('/').next().unwrap_or_default();
    json!({
        "id": model.name, "object": "model", "created": model.created, "owned_by": owner,
        "max_model_len": model.max_length, "vicuna": { "workers": model.workers.len() },
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
