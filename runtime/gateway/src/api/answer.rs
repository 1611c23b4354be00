//! A request from its admission to its end.

use super::error::ApiError;
use super::request::{Ask, Prompt};
use super::shape::{Endpoint, Shape};
use super::stream;
use crate::choice::{Choice, Job, News, Outcome, Phase};
use crate::drive::drive;
use crate::gateway::Gateway;
use crate::loads::Ticket;
use axum::Json;
use axum::http::HeaderValue;
use axum::response::{IntoResponse, Response};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// A request that workers work on. Dropping it gives it up and tells them.
pub struct Request {
    pub shape: Shape,
    pub choices: Vec<Arc<Choice>>,
    pub include_usage: bool,
    pub ticket: Ticket,
    /// Notified when any choice has something new.
    pub news: Arc<Notify>,
    _drivers: JoinSet<()>,
}

pub async fn answer(gateway: &Arc<Gateway>, endpoint: Endpoint, ask: Ask) -> Result<Response, ApiError> {
    let streamed = ask.stream;
    let request = admit(gateway, endpoint, ask)?;
    match streamed {
        true => stream::respond(gateway, request).await,
        false => respond(gateway, request).await,
    }
}

fn admit(gateway: &Arc<Gateway>, endpoint: Endpoint, ask: Ask) -> Result<Request, ApiError> {
    if gateway.draining.is_cancelled() {
        return Err(ApiError::shutting_down());
    }
    let model = gateway.model(&ask.model)?.name;
    if gateway.loads.unfinished() >= gateway.limits.max_in_flight {
        return Err(ApiError::too_many_requests());
    }
    let mut ticket = gateway.loads.take(&model);
    let shape = Shape { endpoint, id: endpoint.new_id(), created: now_seconds(), model: model.clone() };
    let job = Arc::new(job(&shape, ask.prompt, ask.sampling));
    let news = Arc::new(Notify::new());
    let choice = |index| Arc::new(Choice::new(job.clone(), index, news.clone()));
    let choices: Vec<_> = (0..ask.n).map(choice).collect();
    let seats = gateway.registry.admit(&choices, gateway.limits.max_queue).map_err(|_| {
        let error = ApiError::queue_full(&model);
        ticket.ended(error.status.as_u16());
        error
    })?;
    let mut drivers = JoinSet::new();
    for seat in seats {
        let limits = gateway.limits.clone();
        drivers.spawn(async move { drive(seat, &limits).await });
    }
    Ok(Request { shape, choices, include_usage: ask.include_usage, ticket, news, _drivers: drivers })
}

fn job(shape: &Shape, prompt: Prompt, sampling: vicuna_protocol::inference::Sampling) -> Job {
    let (messages, prompt) = match prompt {
        Prompt::Chat(messages) => (messages, None),
        Prompt::Text(text) => (Vec::new(), Some(text)),
    };
    Job { id: shape.id.clone(), model: shape.model.clone(), messages, prompt, sampling }
}

fn now_seconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

impl Request {
    /// All choices as they stand, with their text beyond `seen` bytes, which is remembered.
    pub fn look(&mut self, seen: &mut [usize]) -> Vec<News> {
        let all: Vec<_> = self.choices.iter().zip(seen.iter()).map(|(choice, seen)| choice.news(*seen)).collect();
        for (news, seen) in all.iter().zip(seen.iter_mut()) {
            *seen += news.text.len();
            if news.worker.is_some() {
                self.ticket.started();
            }
            if news.position > 0 {
                self.ticket.first_token();
            }
        }
        all
    }

    pub fn fingerprint(&self) -> Option<String> {
        self.choices.first().and_then(|choice| choice.weights_digest())
    }
}

async fn respond(gateway: &Gateway, mut request: Request) -> Result<Response, ApiError> {
    loop {
        let answers = request.look(&mut vec![0; request.choices.len()]);
        if let Some(error) = answers.iter().find_map(failed) {
            request.ticket.ended(error.status.as_u16());
            return Err(error);
        }
        if answers.iter().all(is_ended) {
            request.ticket.ended(200);
            let body = request.shape.whole(&answers, request.fingerprint());
            let mut response = Json(body).into_response();
            name_worker(&mut response, &answers);
            return Ok(response);
        }
        tokio::select! {
            () = request.news.notified() => {}
            () = gateway.stopped.cancelled() => {
                let error = ApiError::shutting_down();
                request.ticket.ended(error.status.as_u16());
                return Err(error);
            }
        }
    }
}

pub fn is_ended(news: &News) -> bool {
    matches!(news.phase, Phase::Ended(_))
}

pub fn failed(news: &News) -> Option<ApiError> {
    match &news.phase {
        Phase::Ended(Outcome::Failed(error)) => Some(error.clone()),
        _ => None,
    }
}

/// Says which worker answers, for people who look.
pub fn name_worker(response: &mut Response, answers: &[News]) {
    let worker = answers.first().and_then(|news| news.worker.as_deref());
    if let Some(Ok(worker)) = worker.map(HeaderValue::from_str) {
        response.headers_mut().insert("x-vicuna-worker", worker);
    }
}
