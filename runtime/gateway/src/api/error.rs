//! Errors in the shape that OpenAI's clients understand.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::time::Duration;
use vicuna_protocol::inference::{CONTEXT_LENGTH_EXCEEDED, Failure};

/// One failed request: what was wrong, where, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// The request's field that is at fault.
    pub param: Option<String>,
    pub code: &'static str,
    /// Seconds after which trying again makes sense.
    pub retry_after: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code, retry_after: None }
    }

    /// A field that is missing, of the wrong type or out of range.
    pub fn bad_field(param: impl Into<String>, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, "invalid_value", message);
        error.about(param)
    }

    /// An option that would change the answer and that we do not have.
    pub fn unsupported(param: &str, message: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "unsupported_parameter", message).about(param)
    }

    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request", message)
    }

    /// What a worker says of a request that it cannot serve.
    pub fn invalid(failure: Failure) -> Self {
        match failure.reason == CONTEXT_LENGTH_EXCEEDED {
            true => Self::too_long(failure.message),
            false => Self::bad_request(failure.message),
        }
    }

    /// A prompt that leaves no room for an answer. Clients know the code, and shorten what they send.
    pub fn too_long(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, CONTEXT_LENGTH_EXCEEDED, message)
    }

    pub fn model_not_found(model: &str, available: &[String]) -> Self {
        let available = match available {
            [] => "no model is served here yet".to_owned(),
            names => format!("available: {}", names.join(", ")),
        };
        let message = format!("The model `{model}` does not exist; {available}.");
        Self::new(StatusCode::NOT_FOUND, "model_not_found", message).about("model")
    }

    /// The same without its words, which may name a model that is a secret. Those about a request that
    /// nobody could answer stay.
    pub fn veiled(self, alias: &str) -> Self {
        let stays = ["invalid_value", "request_too_large", "invalid_api_key", "shutting_down", "rate_limit_exceeded"];
        if stays.contains(&self.code) {
            return self;
        }
        let message = format!("Model {alias} cannot answer ({}); try again, or begin with another pair.", self.code);
        Self { message, param: None, ..self }
    }

    pub fn no_such_path(path: &str) -> Self {
        let message = format!(
            "There is nothing at {path}; this server has /v1/chat/completions, /v1/completions, /v1/embeddings and /v1/models."
        );
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    pub fn wrong_method() -> Self {
        let message = "This path does not take this method.";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
    }

    pub fn too_large(limit: usize) -> Self {
        let message = format!("The body is larger than {limit} bytes; send less text.");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
    }

    pub fn body_timeout() -> Self {
        let message = "The body did not arrive in time; send it again.";
        Self::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", message)
    }

    pub fn queue_full(model: &str) -> Self {
        let message = format!("Too many requests wait for {model}; try again a little later.");
        Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message).retry(2)
    }

    pub fn too_many_requests() -> Self {
        let message = "Too many requests are in flight here; try again a little later.";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", message).retry(2)
    }

    pub fn no_capacity(model: &str) -> Self {
        let message = format!("No worker of {model} was free in time; try again later.");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "no_capacity", message).retry(10)
    }

    /// The time that the client gave is over.
    pub fn deadline_passed(model: &str, seconds: f64, started: bool, tokens: usize) -> Self {
        let so_far = match (started, tokens) {
            (false, _) => format!("while the request waited for a worker of {model}"),
            (true, 0) => format!("before {model} had answered with a token"),
            (true, tokens) => format!("after {tokens} tokens of {model}"),
        };
        let message = format!(
            "The deadline of {seconds} s (X-Request-Timeout) passed {so_far}; allow more time, or ask for fewer tokens."
        );
        Self::new(StatusCode::GATEWAY_TIMEOUT, "deadline_exceeded", message).about("X-Request-Timeout")
    }

    /// Another connection goes on with the stream.
    pub fn taken_over() -> Self {
        let message = "Another connection with this stream's Last-Event-ID goes on with it; read on there.";
        Self::new(StatusCode::CONFLICT, "taken_over", message)
    }

    pub fn not_resumed(model: &str, tokens: usize) -> Self {
        let message = format!(
            "The worker was lost after {tokens} tokens, and no other of {model} with the same weights was free in time; \
             send the request again."
        );
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "not_resumed", message).retry(10)
    }

    pub fn unknown_stream(request: &str) -> Self {
        let message = format!("Nothing is known of {request} any more; send the request without Last-Event-ID.");
        Self::new(StatusCode::NOT_FOUND, "unknown_stream", message).about("Last-Event-ID")
    }

    pub fn no_key() -> Self {
        let message = "This server asks for an API key; send it as `Authorization: Bearer …`.";
        Self::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
    }

    pub fn unknown_key() -> Self {
        let message = "The API key is not known here; check it, or ask for a new one.";
        Self::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
    }

    /// `wait`: until the quota has something again.
    pub fn over_quota(what: &str, per_minute: Option<u32>, wait: Duration) -> Self {
        let quota = per_minute.unwrap_or_default();
        let message = format!("The API key has used its {quota} {what} a minute; try again a little later.");
        let seconds = wait.as_secs_f64().ceil().clamp(1.0, 86_400.0) as u32;
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded", message).retry(seconds)
    }

    /// What nobody hears any more.
    pub fn client_gone() -> Self {
        let code = StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST);
        Self::new(code, "client_gone", "The client went away.")
    }

    pub fn shutting_down() -> Self {
        let message =
            "This gateway is shutting down; send the request again, to go on with a stream with its Last-Event-ID.";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", message).retry(1)
    }

    pub fn worker_failed(message: &str) -> Self {
        let message = format!("The workers could not generate an answer: {message}");
        Self::new(StatusCode::BAD_GATEWAY, "worker_failed", message)
    }

    /// The arena needs two models that answer, and that this key may use.
    pub fn no_pair(ready: usize) -> Self {
        let message = format!("The arena needs two models with a ready worker; there are {ready} that you may use.");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "no_pair", message).retry(10)
    }

    pub fn unknown_battle() -> Self {
        let message = "This pair is not known here (any more); begin with another one.";
        Self::new(StatusCode::NOT_FOUND, "unknown_battle", message)
    }

    pub fn voted_already() -> Self {
        Self::new(StatusCode::CONFLICT, "voted_already", "This pair has its vote; begin with another one.")
    }

    /// `wait`: until one more is taken.
    pub fn too_many_votes(per_minute: u32, wait: Duration) -> Self {
        let message = format!("At most {per_minute} votes a minute are taken of one voter; try again a little later.");
        let seconds = wait.as_secs_f64().ceil().clamp(1.0, 86_400.0) as u32;
        Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_votes", message).retry(seconds)
    }

    pub fn votes_not_stored(reason: &str) -> Self {
        let message = format!("The vote is not stored: {reason}.");
        Self::new(StatusCode::INSUFFICIENT_STORAGE, "votes_not_stored", message)
    }

    pub fn about(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    fn retry(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// The body, which is also the last event of a stream that fails.
    pub fn body(&self) -> Value {
        json!({ "error": {
            "message": self.message, "type": self.kind(), "param": self.param, "code": self.code,
        } })
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            let headers = response.headers_mut();
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
