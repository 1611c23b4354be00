//! The chat page: three small files inside the binary.

use crate::gateway::Gateway;
use axum::Router;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use std::sync::Arc;

/// The page talks to this server only.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub fn router() -> Router<Arc<Gateway>> {
    let html = || file("text/html; charset=utf-8", include_str!("../../ui/index.html"));
    let script = || file("text/javascript; charset=utf-8", include_str!("../../ui/chat.js"));
    let style = || file("text/css; charset=utf-8", include_str!("../../ui/style.css"));
    Router::new()
        .route("/", get(async move || html()))
        .route("/ui/chat.js", get(async move || script()))
        .route("/ui/style.css", get(async move || style()))
}

fn file(kind: &'static str, text: &'static str) -> impl IntoResponse {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, text)
}
