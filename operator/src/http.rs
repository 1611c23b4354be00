//! Health, readiness and metrics.

use crate::metrics::Metrics;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Router, routing::get};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Whether the process can do its work. A follower is ready when it has seen the API server: only
/// the leader's label, not readiness, sends ranks to one of several.
#[derive(Clone, Default)]
pub struct Readiness(Arc<AtomicBool>);

impl Readiness {
    pub fn set(&self, ready: bool) {
        self.0.store(ready, Ordering::Relaxed);
    }

    pub fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Clone)]
struct Served {
    metrics: Arc<Metrics>,
    readiness: Readiness,
}

fn router(metrics: Arc<Metrics>, readiness: Readiness) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(render))
        .with_state(Served { metrics, readiness })
}

/// Serves until stopped.
pub async fn serve(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    readiness: Readiness,
    stop: CancellationToken,
) -> std::io::Result<()> {
    axum::serve(listener, router(metrics, readiness)).with_graceful_shutdown(stop.cancelled_owned()).await
}

async fn ready(State(served): State<Served>) -> Response {
    if served.readiness.get() {
        "ready\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the API server has not answered yet\n").into_response()
    }
}

async fn render(State(served): State<Served>) -> Response {
    match served.metrics.render() {
        Ok(text) => ([("content-type", "text/plain; version=0.0.4")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;
    use axum::http::Request;
    use tower::ServiceExt;

    #[tokio::test]
    async fn readiness_follows_the_flag_and_metrics_are_text() {
        let readiness = Readiness::default();
        let metrics = Arc::new(Metrics::new().unwrap());
        metrics.training_step.with_label_values(&["n", "t"]).set(1);
        let router = router(metrics, readiness.clone());
        let call = |path: &str| {
            let request = Request::get(path).body(Body::empty()).unwrap();
            let router = router.clone();
            async move { router.oneshot(request).await.unwrap().status() }
        };
        assert_eq!(call("/readyz").await, StatusCode::SERVICE_UNAVAILABLE);
        readiness.set(true);
        assert_eq!(call("/readyz").await, StatusCode::OK);
        assert_eq!(call("/healthz").await, StatusCode::OK);
        assert_eq!(call("/metrics").await, StatusCode::OK);
    }
}
