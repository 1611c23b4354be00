//! How long a client wants to wait for all of its answer, in a header of the request.

use super::error::ApiError;
use axum::http::HeaderMap;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// In seconds, from the request's arrival to the end of its answer.
pub const HEADER: &str = "x-request-timeout";
const LONGEST_SECONDS: f64 = 86_400.0;

/// When an answer must have ended; without the header, never.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Deadline(Option<(Instant, Duration)>);

impl Deadline {
    pub fn of(headers: &HeaderMap, now: Instant) -> Result<Self, ApiError> {
        let Some(value) = headers.get(HEADER) else {
            return Ok(Self::default());
        };
        let seconds = value.to_str().ok().and_then(|text| text.trim().parse::<f64>().ok());
        match seconds.filter(|seconds| *seconds > 0.0 && *seconds <= LONGEST_SECONDS) {
            Some(seconds) => {
                let patience = Duration::from_secs_f64(seconds);
                Ok(Self(Some((now + patience, patience))))
            }
            None => {
                let message =
                    format!("The header must be a number of seconds, more than 0 and at most {LONGEST_SECONDS}.");
                Err(ApiError::bad_field("X-Request-Timeout", message))
            }
        }
    }

    /// Resolves when it has passed.
    pub async fn passed(&self) {
        match self.0 {
            Some((at, _)) => sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    /// When that is, if it is ever.
    pub fn at(&self) -> Option<Instant> {
        self.0.map(|(at, _)| at)
    }

    /// This deadline or `other`, whichever is earlier.
    pub fn at_most(&self, other: Instant) -> Instant {
        self.0.map_or(other, |(at, _)| at.min(other))
    }

    pub fn has_passed(&self, now: Instant) -> bool {
        self.0.is_some_and(|(at, _)| at <= now)
    }

    /// What a client is told whose answer has `tokens` by then, or none because no worker has had it.
    pub fn error(&self, model: &str, started: bool, tokens: usize) -> ApiError {
        let seconds = self.0.map_or(0.0, |(_, patience)| patience.as_secs_f64());
        ApiError::deadline_passed(model, seconds, started, tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn of(value: &str) -> Result<Deadline, ApiError> {
        let headers = HeaderMap::from_iter([(HEADER.parse().unwrap(), HeaderValue::from_str(value).unwrap())]);
        Deadline::of(&headers, Instant::now())
    }

    #[tokio::test(start_paused = true)]
    async fn it_passes_after_so_many_seconds_and_never_without_the_header() {
        let (deadline, started) = (of("2.5").unwrap(), Instant::now());
        assert!(!deadline.has_passed(started));
        deadline.passed().await;
        assert_eq!(started.elapsed().as_millis(), 2500);
        assert!(deadline.has_passed(Instant::now()));
        let never = Deadline::default();
        assert!(tokio::time::timeout(Duration::from_secs(100_000), never.passed()).await.is_err());
    }

    #[test]
    fn what_is_no_time_is_the_client_s_mistake() {
        for wrong in ["", "soon", "0", "-1", "NaN", "86401", "inf"] {
            let error = of(wrong).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some("X-Request-Timeout")), "{wrong}");
        }
    }
}
