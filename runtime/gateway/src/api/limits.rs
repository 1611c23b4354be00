//! What is left of a key's quotas, in OpenAI's headers. Tokens count once they are known: an answer's headers
//! tell what was left before it.

use super::error::ApiError;
use crate::keys::Client;
use axum::http::{HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use std::time::Duration;

/// The answer, whatever it is, with how the client's quotas stand.
pub fn told(client: &Client, answer: Result<impl IntoResponse, ApiError>) -> Response {
    let mut response = answer.into_response();
    for (what, left) in client.left() {
        let Some(left) = left else { continue };
        let told =
            [("limit", left.limit.to_string()), ("remaining", left.remaining.to_string()), ("reset", time(left.reset))];
        for (part, value) in told {
            let name = HeaderName::try_from(format!("x-ratelimit-{part}-{what}"));
            if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(value)) {
                response.headers_mut().insert(name, value);
            }
        }
    }
    response
}

/// As OpenAI writes times: 250ms, 12s, 6m0s.
fn time(duration: Duration) -> String {
    match (duration.as_millis(), duration.as_secs_f64().ceil() as u64) {
        (milliseconds @ 0..1000, _) => format!("{milliseconds}ms"),
        (_, seconds @ ..60) => format!("{seconds}s"),
        (_, seconds) => format!("{}m{}s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_openai_does() {
        let cases = [(0, "0ms"), (250, "250ms"), (1000, "1s"), (11_001, "12s"), (360_000, "6m0s"), (59_500, "1m0s")];
        for (milliseconds, expected) in cases {
            assert_eq!(time(Duration::from_millis(milliseconds)), expected);
        }
    }
}
