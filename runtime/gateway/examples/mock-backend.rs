//! An inference server without a model, for the gateways that speak HTTP to theirs: it answers every chat
//! request with 16 words at once, streamed or whole. What `mock-worker` is for ours.

use anyhow::Result;
use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use axum::{Json, Router};
use clap::Parser;
use futures::stream;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::net::SocketAddr;

const WORDS: usize = 16;

#[derive(Clone, Debug, Parser)]
struct Options {
    #[arg(long, default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    #[arg(long, default_value = "bench/mock")]
    model: String,
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    let models = json!({ "object": "list", "data": [{ "id": options.model, "object": "model", "owned_by": "bench" }] });
    let router = Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/models", get(async || Json(models)))
        .route("/health", get(async || "ok"))
        .route("/get_server_info", get(async || Json(json!({}))));
    let listener = tokio::net::TcpListener::bind(options.listen).await?;
    // Else the end of a stream waits for the client's delayed acknowledgement.
    let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
    axum::serve(listener, router).await?;
    Ok(())
}

async fn chat(Json(request): Json<Value>) -> Response {
    let model = request["model"].as_str().unwrap_or_default().to_owned();
    if request["stream"] != true {
        return Json(whole(&model)).into_response();
    }
    let chunks = (0..=WORDS).map(move |index| {
        let choice = match index {
            WORDS => json!({ "index": 0, "delta": {}, "finish_reason": "length" }),
            _ => json!({ "index": 0, "delta": { "content": "word " }, "finish_reason": null }),
        };
        event(
            &json!({ "id": "1", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": [choice] }),
        )
    });
    let events = chunks.chain([Bytes::from_static(b"data: [DONE]\n\n")]).map(Ok::<_, Infallible>);
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(stream::iter(events))).into_response()
}

fn whole(model: &str) -> Value {
    json!({
        "id": "1", "object": "chat.completion", "created": 1, "model": model,
        "choices": [{
            "index": 0, "finish_reason": "length",
            "message": { "role": "assistant", "content": "word ".repeat(WORDS) },
        }],
        "usage": { "prompt_tokens": 1, "completion_tokens": WORDS, "total_tokens": WORDS + 1 },
    })
}

fn event(body: &Value) -> Bytes {
    Bytes::from(format!("data: {body}\n\n"))
}
