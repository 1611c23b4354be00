//! Errors in the shape that OpenAI's clients understand.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

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

    pub fn model_not_found(model: &str, available: &[String]) -> Self {
        let available = match available {
            [] => "no model is served here yet".to_owned(),
            names => format!("available: {}", names.join(", ")),
        };
        let message = format!("The model `{model}` does not exist; {available}.");
        Self::new(StatusCode::NOT_FOUND, "model_not_found", message).about("model")
    }

    pub fn no_such_path(path: &str) -> Self {
        let message = format!(
            "There is nothing at {path}; this server has /v1/chat/completions, /v1/completions and /v1/models."
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

    pub fn shutting_down() -> Self {
        let message = "This gateway is shutting down; send the request again.";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", message).retry(1)
    }

    pub fn worker_failed(message: &str) -> Self {
        let message = format!("The workers could not generate an answer: {message}");
        Self::new(StatusCode::BAD_GATEWAY, "worker_failed", message)
    }

    fn about(mut self, param: impl Into<String>) -> Self {
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
