//! Answers as server-sent events. Each has the position as its id, with which a client can come back.
//!
//! A comment is a line before the next event and has no empty line of its own: after an id, OpenAI's
//! Python client takes an empty line for the end of an event, and fails on one without data.
//!
//! Nothing is written ahead: what a slow client has not read stays in the transcript, which is bounded.

use super::answer::{Request, echoed, failed, finish_reason, is_ended, name};
use super::calls::{self, Call};
use super::error::ApiError;
use super::logprobs;
use super::position::At;
use super::shape::{Endpoint, Part, call_json};
use crate::choice::{News, Outcome, Phase, Seen};
use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde_json::Value;
use std::convert::Infallible;
use std::fmt::Write;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};

/// How long a stream waits for its first token before it says 200: an error until then has its own
/// status, and the header can name the worker.
const HEADER_PATIENCE: Duration = Duration::from_secs(1);
/// Between comments that keep the connection alive.
const COMMENT_INTERVAL: Duration = Duration::from_secs(5);

/// `from`: what the client has already; empty for a new stream.
pub async fn respond(mut request: Request, from: Vec<At>) -> Result<Response, ApiError> {
    let answers = first_news(&mut request).await;
    if let Some(error) = answers.iter().find_map(failed) {
        request.settle(error.status.as_u16());
        return Err(error);
    }
    let id = request.shape.id.clone();
    let events = events(Writer::new(request, from));
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    // Proxies that buffer would hold the answer back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    name(&mut response, &id, &answers);
    Ok(response)
}

async fn first_news(request: &mut Request) -> Vec<News> {
    let deadline = Instant::now() + HEADER_PATIENCE;
    let news = request.news.clone();
    loop {
        let answers = request.glance();
        if answers.iter().any(|news| news.position > 0 || is_ended(news)) {
            return answers;
        }
        tokio::select! {
            () = news.notified() => {}
            () = sleep_until(deadline) => return answers,
        }
    }
}

fn events(mut writer: Writer) -> impl futures::Stream<Item = Result<Bytes, Infallible>> {
    async_stream::stream! {
        let (news, stopped) = (writer.request.news.clone(), writer.request.gateway().stopped.clone());
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
                () = sleep(COMMENT_INTERVAL) => yield Ok(Bytes::from(writer.comment())),
                () = stopped.cancelled() => {
                    yield Ok(Bytes::from(error_event(&ApiError::shutting_down())));
                    return;
                }
            }
        }
    }
}

/// Turns what is new into events.
struct Writer {
    request: Request,
    seen: Vec<Seen>,
    told: Vec<Told>,
    done: bool,
}

/// What the client knows of a choice.
#[derive(Default)]
struct Told {
    opened: bool,
    at: At,
    resumes: u32,
    /// Letters, of which offsets in /v1/completions are.
    letters: usize,
    /// Where there are tools: everything that was said, and what of it the client has.
    said: String,
    content: usize,
    calls: usize,
}

impl Writer {
    fn new(request: Request, from: Vec<At>) -> Self {
        let count = request.choices.len();
        let mut told: Vec<_> = from.into_iter().map(|at| Told { at, ..Told::default() }).collect();
        told.resize_with(count, Told::default);
        for (told, choice) in told.iter_mut().zip(&request.choices) {
            told.opened = told.at != At::default();
            let text = choice.transcript().text;
            let had = text.get(..told.at.seen.bytes).unwrap_or_default();
            told.letters = had.chars().count();
            if request.ask.tools.is_some() {
                let reading = calls::read(had, told.at.closed);
                (told.content, told.calls) = (reading.content.len(), reading.calls.len());
                told.said = had.to_owned();
            }
        }
        Self { seen: told.iter().map(|told| told.at.seen).collect(), told, request, done: false }
    }

    fn write(&mut self) -> String {
        let answers = self.request.look(&mut self.seen);
        let mut events = String::new();
        for (index, news) in answers.iter().enumerate() {
            self.write_choice(index, news, &mut events);
        }
        if let Some(error) = answers.iter().find_map(failed) {
            events.push_str(&error_event(&error));
            self.request.settle(error.status.as_u16());
            self.done = true;
        } else if answers.iter().all(is_ended) {
            self.finish(&answers, &mut events);
        }
        events
    }

    fn write_choice(&mut self, index: usize, news: &News, events: &mut String) {
        let reason = match &news.phase {
            Phase::Ended(Outcome::Done { finish_reason, .. }) => Some(finish_reason.as_str()),
            _ => None,
        };
        self.open(index, news, reason.is_some(), events);
        if !self.request.ask.only_prompt {
            let parts = self.parts(index, news, reason.is_some());
            self.told[index].at.seen = self.seen[index];
            for part in parts {
                self.push(index, news, part.as_part(), events);
            }
        }
        if let Some(reason) = reason
            && !std::mem::replace(&mut self.told[index].at.closed, true)
        {
            let called = self.told[index].calls > 0;
            let reason = if self.request.ask.only_prompt { "length" } else { finish_reason(reason, called) };
            self.push(index, news, Part { finish_reason: Some(reason), ..Part::default() }, events);
        }
        if news.resumes > self.told[index].resumes {
            self.told[index].resumes = news.resumes;
            let worker = news.worker.as_deref().unwrap_or_default();
            events.push_str(&comment(&format!("resumed on {worker}")));
        }
    }

    /// What comes before all text: the role, or the prompt that is to be echoed.
    fn open(&mut self, index: usize, news: &News, ended: bool, events: &mut String) {
        let echo = self.request.ask.echo;
        // The prompt's scores arrive before the first token.
        let ready = if echo { news.position > 0 || ended } else { news.worker.is_some() || ended };
        if !ready || std::mem::replace(&mut self.told[index].opened, true) {
            return;
        }
        if self.request.shape.endpoint == Endpoint::Chat {
            self.push(index, news, Part { opens: true, ..Part::default() }, events);
        } else if echo {
            let (text, tokens) = echoed(&self.request.choices[index]);
            let wanted = self.request.ask.logprobs;
            let logprobs = wanted.map(|_| logprobs::completion(&tokens, tokens.len(), 0));
            self.told[index].letters = text.chars().count();
            self.push(index, news, Part { text: Some(&text), logprobs, ..Part::default() }, events);
        }
    }

    /// What is new of a choice, in the pieces that the client gets.
    fn parts(&mut self, index: usize, news: &News, ended: bool) -> Vec<OwnedPart> {
        let told = &mut self.told[index];
        let ask = &self.request.ask;
        let logprobs =
            (ask.logprobs.is_some() && !news.logprobs.is_empty()).then(|| match self.request.shape.endpoint {
                Endpoint::Chat => logprobs::chat(&news.logprobs),
                Endpoint::Completion => logprobs::completion(&news.logprobs, 0, told.letters),
            });
        told.letters += news.text.chars().count();
        let Some(tools) = &ask.tools else {
            let nothing = news.text.is_empty() && logprobs.is_none();
            let part = OwnedPart { text: Some(news.text.clone()), call: None, logprobs };
            return if nothing { Vec::new() } else { vec![part] };
        };
        if told.at.closed {
            return Vec::new();
        }
        told.said.push_str(&news.text);
        let mut reading = calls::read(&told.said, ended);
        if !tools.parallel {
            reading.calls.truncate(1);
        }
        let text = reading.content.get(told.content..).filter(|text| !text.is_empty()).map(str::to_owned);
        told.content = reading.content.len();
        let mut parts = Vec::new();
        if text.is_some() || logprobs.is_some() {
            parts.push(OwnedPart { text: Some(text.unwrap_or_default()), call: None, logprobs });
        }
        for (number, call) in reading.calls.iter().enumerate().skip(told.calls) {
            let id = self.request.shape.call_id(index, number);
            parts.push(OwnedPart { text: None, call: Some(call_delta(number, &id, call)), logprobs: None });
        }
        told.calls = reading.calls.len();
        parts
    }

    fn push(&self, index: usize, news: &News, part: Part<'_>, events: &mut String) {
        let chunk = self.request.shape.chunk(index, news.fingerprint.as_deref(), part);
        self.event(&chunk, events);
    }

    fn event(&self, body: &str, events: &mut String) {
        events.push_str("id: ");
        events.push_str(&self.request.shape.id);
        for (index, told) in self.told.iter().enumerate() {
            // Writing into memory cannot fail.
            let _ = write!(events, "{}{}", if index == 0 { ':' } else { ',' }, told.at);
        }
        events.push_str("\ndata: ");
        events.push_str(body);
        events.push_str("\n\n");
    }

    fn finish(&mut self, answers: &[News], events: &mut String) {
        let usage = self.request.usage(answers);
        if self.request.ask.include_usage {
            self.event(&self.request.shape.usage(usage).to_string(), events);
        }
        let workers: Vec<_> = answers.iter().filter_map(|news| news.worker.as_deref()).collect();
        let served = format!("served by {}; resumes {}", workers.join(" "), usage.resumes);
        events.push_str(&comment(&served));
        events.push_str("data: [DONE]\n\n");
        self.request.settle(200);
        self.done = true;
    }

    fn comment(&self) -> String {
        let waits = self.request.choices.iter().any(|choice| choice.is_queued());
        comment(if waits { "waiting for a worker" } else { "generating" })
    }
}

struct OwnedPart {
    text: Option<String>,
    call: Option<Value>,
    logprobs: Option<Value>,
}

impl OwnedPart {
    fn as_part(&self) -> Part<'_> {
        Part {
            text: self.text.as_deref(),
            calls: self.call.iter().cloned().collect(),
            logprobs: self.logprobs.clone(),
            ..Part::default()
        }
    }
}

fn call_delta(number: usize, id: &str, call: &Call) -> Value {
    let mut delta = call_json(id, call);
    delta["index"] = number.into();
    delta
}

/// The event that ends a stream which cannot go on.
fn error_event(error: &ApiError) -> String {
    format!("data: {}\n\n", error.body())
}

/// `text` holds no line break: a worker's name with one is refused.
fn comment(text: &str) -> String {
    format!(": {text}\n")
}
