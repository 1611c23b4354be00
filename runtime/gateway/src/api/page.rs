//! The pages: small files inside the binary. They need no key; what they ask for does.

use crate::gateway::Gateway;
use axum::Router;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use std::sync::Arc;

/// The page talks to this server only.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";

/// One page for all paths: its script shows what the path says.
const PAGE: &str = include_str!("../../ui/dist/index.html");

const FILES: &[(&str, &str, &str)] = &[
    ("/", HTML, PAGE),
    ("/compare", HTML, PAGE),
    ("/arena", HTML, PAGE),
    ("/live", HTML, PAGE),
    ("/ui/app.js", SCRIPT, include_str!("../../ui/dist/app.js")),
    ("/ui/style.css", STYLE, include_str!("../../ui/dist/style.css")),
];

pub fn router() -> Router<Arc<Gateway>> {
    let add = |router: Router<Arc<Gateway>>, (path, kind, text): &(&'static str, &'static str, &'static str)| {
        let (kind, text) = (*kind, *text);
        router.route(path, get(async move || file(kind, text)))
    };
    FILES.iter().fold(Router::new(), add)
}

fn file(kind: &'static str, text: &'static str) -> impl IntoResponse {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, text)
}
