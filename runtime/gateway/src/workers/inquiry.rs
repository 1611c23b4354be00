//! Questions with one answer: embeddings, the length of a prompt, what has become of a request.

use super::connection::Connection;
use super::registry::Registry;
use crate::api::error::ApiError;
use crate::choice::Variant;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout_at};
use vicuna_protocol::inference::gateway_message::Body;
use vicuna_protocol::inference::{Embeddings, Failure, TokenCount, TranscriptChoice, TranscriptOf, failure};

/// Workers that are asked the same before it counts as failed.
const MAX_ATTEMPTS: u32 = 4;
const OVERLOADED_PAUSE: Duration = Duration::from_millis(250);
/// What a worker remembers is at hand.
const TRANSCRIPTS_TIMEOUT: Duration = Duration::from_secs(2);

/// What a worker says.
#[derive(Debug)]
pub enum Answer {
    Embeddings(Embeddings),
    TokenCount(TokenCount),
    Transcript(Vec<TranscriptChoice>),
    Failed(Failure),
}

/// A question that has been sent. Dropped, it is forgotten.
struct Asked {
    connection: Arc<Connection>,
    request: String,
    answer: oneshot::Receiver<Answer>,
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.connection.forget(&self.request);
    }
}

fn ask(connection: Arc<Connection>, request: &str, body: Body) -> Option<Asked> {
    let answer = connection.expect(request)?;
    let asked = Asked { connection, request: request.to_owned(), answer };
    asked.connection.send(body).then_some(asked)
}

impl Registry {
    /// Asks a worker of `model`, and another if that one goes or fails.
    pub async fn inquire(
        &self,
        model: &str,
        request: &str,
        body: &Body,
        deadline: Instant,
    ) -> Result<Answer, ApiError> {
        for _ in 0..MAX_ATTEMPTS {
            let connection = self.least_loaded_before(model, deadline).await?;
            let Some(mut asked) = ask(connection, request, body.clone()) else {
                return Err(ApiError::too_many_requests());
            };
            let answer = timeout_at(deadline, &mut asked.answer).await;
            match answer.map_err(|_| ApiError::no_capacity(model))? {
                Ok(Answer::Failed(failure)) => match failure.code() {
                    failure::Code::Invalid => return Err(ApiError::bad_request(failure.message)),
                    failure::Code::Overloaded => sleep(OVERLOADED_PAUSE).await,
                    _ => self.failed(asked.connection.id),
                },
                Ok(answer) => return Ok(answer),
                // It went away.
                Err(_) => {}
            }
        }
        Err(ApiError::worker_failed(&format!("{MAX_ATTEMPTS} attempts failed")))
    }

    async fn least_loaded_before(&self, model: &str, deadline: Instant) -> Result<Arc<Connection>, ApiError> {
        loop {
            let arrival = self.arrival();
            if let Some(connection) = self.least_loaded(model) {
                return Ok(connection);
            }
            timeout_at(deadline, arrival).await.map_err(|_| ApiError::no_capacity(model))?;
        }
    }

    /// What the workers of `model` know of a request that another gateway had, and of which weights
    /// it is. Only they are asked: no other tenant's worker learns of it.
    pub async fn transcripts(&self, model: &str, request: &str) -> Vec<(TranscriptChoice, Variant)> {
        let deadline = Instant::now() + TRANSCRIPTS_TIMEOUT;
        let question = || Body::TranscriptOf(TranscriptOf { request: request.to_owned() });
        let asked: Vec<_> = self
            .offering(model)
            .into_iter()
            .filter_map(|(connection, variant)| Some((ask(connection, request, question())?, variant)))
            .collect();
        let mut known = Vec::new();
        for (mut asked, variant) in asked {
            if let Ok(Ok(Answer::Transcript(choices))) = timeout_at(deadline, &mut asked.answer).await {
                known.extend(choices.into_iter().map(|choice| (choice, variant.clone())));
            }
        }
        known
    }
}
