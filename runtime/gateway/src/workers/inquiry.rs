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
use vicuna_protocol::inference::{
    Cancel, Embeddings, Failure, ModelOffer, TokenCount, TranscriptChoice, TranscriptOf, failure,
};

/// Workers that may fail at a question, or go, before it is taken to be the cause.
const MAX_FAILURES: u32 = 4;
/// Before a worker that had no room is asked again.
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

/// A question that has been sent. Dropped, it is forgotten, its slot is another's, and a worker that is
/// still at it is told.
struct Asked<'a> {
    registry: &'a Registry,
    connection: Arc<Connection>,
    request: String,
    /// The answer takes the worker's time, which is spared if nobody wants it.
    computed: bool,
    answer: oneshot::Receiver<Answer>,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        if self.connection.forget(&self.request) && self.computed {
            let cancel = Cancel { request: self.request.clone(), choice: 0, keep: false };
            // One that does not read any more is found out by what else is sent to it.
            self.connection.send(Body::Cancel(cancel));
        }
        self.registry.answered(&self.connection);
    }
}

impl Registry {
    fn ask(&self, connection: Arc<Connection>, request: &str, body: Body) -> Option<Asked<'_>> {
        let answer = connection.expect(request)?;
        let computed = matches!(body, Body::Embed(_));
        let asked = Asked { registry: self, connection, request: request.to_owned(), computed, answer };
        asked.connection.send(body).then_some(asked)
    }

    /// Asks a worker of `model`, and another if that one goes or fails; as long as they are busy, until
    /// the deadline.
    pub async fn inquire(
        &self,
        model: &str,
        request: &str,
        body: &Body,
        deadline: Instant,
    ) -> Result<Answer, ApiError> {
        let no_capacity = |_| ApiError::no_capacity(model);
        let mut failures = 0;
        while failures < MAX_FAILURES {
            let connection = self.least_loaded_before(model, deadline).await?;
            let Some(mut asked) = self.ask(connection, request, body.clone()) else {
                return Err(ApiError::too_many_requests());
            };
            match timeout_at(deadline, &mut asked.answer).await.map_err(no_capacity)? {
                Ok(Answer::Failed(failure)) => match failure.code() {
                    failure::Code::Invalid => return Err(ApiError::invalid(failure)),
                    failure::Code::Overloaded => {
                        drop(asked);
                        timeout_at(deadline, sleep(OVERLOADED_PAUSE)).await.map_err(no_capacity)?;
                    }
                    _ => {
                        self.failed(asked.connection.id);
                        failures += 1;
                    }
                },
                Ok(answer) => return Ok(answer),
                // It went away.
                Err(_) => failures += 1,
            }
        }
        Err(ApiError::worker_failed(&format!("{MAX_FAILURES} attempts failed")))
    }

    /// What the workers of `model` offer, once there is one.
    pub async fn offer_before(&self, model: &str, deadline: Instant) -> Result<ModelOffer, ApiError> {
        let connection = self.least_loaded_before(model, deadline).await?;
        connection.offer(model).cloned().ok_or_else(|| ApiError::no_capacity(model))
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
            .filter_map(|(connection, variant)| Some((self.ask(connection, request, question())?, variant)))
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
