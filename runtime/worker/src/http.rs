//! /metrics, /healthz and /readyz.

use crate::health::Health;
use crate::metrics::Metrics;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::get;
use std::sync::Arc;

/// Why a worker is not ready, in a word.
const REASON: &str = "vicuna-reason";

pub fn router(health: Arc<Health>, metrics: Metrics) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(readiness).with_state(health))
        .route("/metrics", get(exposition).with_state(metrics))
}

async fn readiness(State(health): State<Arc<Health>>) -> impl IntoResponse {
    match health.readiness() {
        Ok(detail) => (StatusCode::OK, [(REASON, "Ready")], detail),
        Err((reason, detail)) => (StatusCode::SERVICE_UNAVAILABLE, [(REASON, reason)], detail),
    }
}

async fn exposition(State(metrics): State<Metrics>) -> impl IntoResponse {
    match metrics.text() {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string().into_bytes()),
    }
}
