//! Answers as server-sent events. Each has the id `<request>:<tokens so far>`.
//!
//! A comment is a line before the next event and has no empty line of its own: after an id, OpenAI's
//! Python client takes an empty line for the end of an event, and fails on one without data.

use super::answer::{Request, failed, is_ended, name_worker};
use super::error::ApiError;
use super::shape::Usage;
use crate::choice::{News, Outcome, Phase};
use crate::gateway::Gateway;
use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde_json::Value;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// How long a stream waits for its first token before it says 200: an error until then has its own
/// status, and the header can name the worker.
const HEADER_PATIENCE: Duration = Duration::from_secs(1);
/// Between comments that keep the connection alive.
const COMMENT_INTERVAL: Duration = Duration::from_secs(5);

pub async fn respond(gateway: &Arc<Gateway>, mut request: Request) -> Result<Response, ApiError> {
    let answers = first_news(&mut request).await;
    if let Some(error) = answers.iter().find_map(failed) {
        request.ticket.ended(error.status.as_u16());
        return Err(error);
    }
    let events = events(gateway.clone(), request);
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    // Proxies that buffer would hold the answer back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    name_worker(&mut response, &answers);
    Ok(response)
}

async fn first_news(request: &mut Request) -> Vec<News> {
    let deadline = Instant::now() + HEADER_PATIENCE;
    let news = request.news.clone();
    loop {
        let answers = request.look(&mut vec![0; request.choices.len()]);
        if answers.iter().any(|news| news.position > 0 || is_ended(news)) {
            return answers;
        }
        tokio::select! {
            () = news.notified() => {}
            () = sleep_until(deadline) => return answers,
        }
    }
}

fn events(gateway: Arc<Gateway>, request: Request) -> impl futures::Stream<Item = Result<Bytes, Infallible>> {
    async_stream::stream! {
        let news = request.news.clone();
        let mut writer = Writer::new(request);
        loop {
            let events = writer.write();
            if !events.is_empty() {
                yield Ok(Bytes::from(events));
            }
            if writer.done {
                return;
            }
            tokio::select! {
                () = news.notified() => {}
                () = tokio::time::sleep(COMMENT_INTERVAL) => yield Ok(Bytes::from(writer.comment())),
                () = gateway.stopped.cancelled() => {
                    yield Ok(Bytes::from(writer.fail(&ApiError::shutting_down())));
                    return;
                }
            }
        }
    }
}

/// Turns what is new into events.
struct Writer {
    request: Request,
    seen: Vec<usize>,
    told: Vec<Told>,
    done: bool,
}

/// What the client knows of a choice besides its text.
#[derive(Clone, Copy, Default)]
struct Told {
    opened: bool,
    resumes: u32,
    closed: bool,
}

impl Writer {
    fn new(request: Request) -> Self {
        let choices = request.choices.len();
        Self { request, seen: vec![0; choices], told: vec![Told::default(); choices], done: false }
    }

    fn write(&mut self) -> String {
        let answers = self.request.look(&mut self.seen);
        let mut events = String::new();
        for (index, news) in answers.iter().enumerate() {
            self.write_choice(index, news, &mut events);
        }
        if let Some(error) = answers.iter().find_map(failed) {
            events.push_str(&self.fail(&error));
        } else if answers.iter().all(is_ended) {
            self.finish(&answers, &mut events);
        }
        events
    }

    fn write_choice(&mut self, index: usize, news: &News, events: &mut String) {
        let (choice, told) = (&self.request.choices[index], &mut self.told[index]);
        let shape = &self.request.shape;
        let mut push = |body: Value| events.push_str(&event(&shape.id, news.position, &body));
        if !told.opened && news.worker.is_some() {
            told.opened = true;
            shape.opening(choice).into_iter().for_each(&mut push);
        }
        if !news.text.is_empty() {
            push(shape.text(choice, &news.text));
        }
        if let Phase::Ended(Outcome::Done { finish_reason, .. }) = &news.phase
            && !std::mem::replace(&mut told.closed, true)
        {
            push(shape.closing(choice, finish_reason));
        }
        if news.resumes > told.resumes {
            told.resumes = news.resumes;
            let worker = news.worker.as_deref().unwrap_or_default();
            events.push_str(&comment(&format!("resumed on {worker}")));
        }
    }

    fn finish(&mut self, answers: &[News], events: &mut String) {
        let usage = Usage::of(answers);
        let position = answers.iter().map(|news| news.position).max().unwrap_or_default();
        if self.request.include_usage {
            let body = self.request.shape.usage(usage);
            events.push_str(&event(&self.request.shape.id, position, &body));
        }
        let workers: Vec<_> = answers.iter().filter_map(|news| news.worker.as_deref()).collect();
        let served = format!("served by {}; resumes {}", workers.join(" "), usage.resumes);
        events.push_str(&comment(&served));
        events.push_str("data: [DONE]\n\n");
        self.request.ticket.ended(200);
        self.done = true;
    }

    /// The event that ends a stream which cannot go on.
    fn fail(&mut self, error: &ApiError) -> String {
        self.request.ticket.ended(error.status.as_u16());
        self.done = true;
        format!("data: {}\n\n", error.body())
    }

    fn comment(&self) -> String {
        let waits = self.request.choices.iter().any(|choice| choice.progress().phase == Phase::Queued);
        comment(if waits { "waiting for a worker" } else { "generating" })
    }
}

fn event(request: &str, position: usize, body: &Value) -> String {
    format!("id: {request}:{position}\ndata: {body}\n\n")
}

/// `text` holds no line break: a worker's name with one is refused.
fn comment(text: &str) -> String {
    format!(": {text}\n")
}
