//! Answers as server-sent events. Each has the position as its id, with which a client can come back.
//!
//! A comment is a line before the next event and has no empty line of its own: after an id, OpenAI's
//! Python client takes an empty line for the end of an event, and fails on one without data.
//!
//! Little is written ahead: what a slow client has not read stays in the transcript, which is bounded.

use super::answer::{Request, echoed, failed, finish_reason, is_ended, name, read};
use super::delivery::{Delivery, GivenUp, delivery};
use super::error::ApiError;
use super::logprobs;
use super::position::At;
use super::shape::{Endpoint, Part, call_json};
use super::takeover::Heir;
use crate::choice::{Choice, News, Outcome, Phase, Seen, Work};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde_json::{Value, json};
use std::fmt::Write;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};
use vicuna_protocol::tools::{Call, Reading};

/// How long a stream waits for its first token before it says 200: an error until then has its own
/// status, and the header can name the worker.
const HEADER_PATIENCE: Duration = Duration::from_secs(1);
/// Between comments that keep the connection alive; the first is sooner, for people who wait.
const COMMENT_INTERVAL: Duration = Duration::from_secs(5);
const FIRST_COMMENT: Duration = Duration::from_secs(1);

/// `from`: what the client has already; empty for a new stream.
pub async fn respond(mut request: Request, from: Vec<At>) -> Result<Response, ApiError> {
    let answers = first_news(&mut request).await;
    if request.deadline().has_passed(Instant::now()) && !answers.iter().all(is_ended) {
        return Err(request.expire());
    }
    if let Some(error) = answers.iter().find_map(failed) {
        request.settle(error.status.as_u16());
        return Err(request.shape.told(error));
    }
    let shape = request.shape.clone();
    let (delivery, body) = delivery(request.gateway().limits.write_timeout);
    let mut writer = Writer::new(request, from);
    // What there is goes with the headers, and is often all.
    let rest = delivery.begin(writer.write());
    match writer.done && rest.is_empty() {
        true => delivery.end(),
        false => drop(tokio::spawn(write(writer, delivery, rest))),
    }
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    // Proxies that buffer would hold the answer back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    name(&mut response, &shape, &answers);
    Ok(response)
}

async fn first_news(request: &mut Request) -> Vec<News> {
    let deadline = request.deadline().at_most(Instant::now() + HEADER_PATIENCE);
    let news = request.news.clone();
    let mut patience = pin!(sleep_until(deadline));
    loop {
        let answers = request.glance();
        if answers.iter().any(|news| news.position > 0 || is_ended(news)) {
            return answers;
        }
        tokio::select! {
            () = news.notified() => {}
            never = request.drivers.run() => match never {},
            () = &mut patience => return answers,
        }
    }
}

/// Writes until the end, or as long as the client reads.
async fn write(mut writer: Writer, delivery: Delivery, rest: String) {
    let mut entry = writer.request.gateway().takeovers.enter(&writer.request.shape.id);
    // Beside the writing, so that an answer gets another worker also while its client does not read.
    let mut drivers = std::mem::take(&mut writer.request.drivers);
    let ended = tokio::select! {
        ended = write_all(&mut writer, &delivery, rest) => ended,
        never = drivers.run() => match never {},
        () = delivery.abandoned() => Err(GivenUp),
        Some(heir) = entry.heir() => {
            drop(entry);
            writer.request.drivers = drivers;
            return hand_over(writer, heir, delivery).await;
        }
    };
    match ended {
        Ok(()) => delivery.end(),
        Err(GivenUp) => tracing::debug!(request = writer.request.shape.id, "nobody reads the stream"),
    }
}

/// To a client that has come back for it. If that one has gone too, the stream is kept like any other that breaks off.
async fn hand_over(writer: Writer, heir: Heir, delivery: Delivery) {
    drop(heir.send(writer.request));
    if delivery.hand(&error_event(&ApiError::taken_over())).await.is_ok() {
        delivery.end();
    }
}

/// `text`: what is written already and not handed over.
async fn write_all(writer: &mut Writer, delivery: &Delivery, mut text: String) -> Result<(), GivenUp> {
    let (news, stopped) = (writer.request.news.clone(), writer.request.gateway().stopped.clone());
    let deadline = writer.request.deadline();
    let mut stopped = pin!(stopped.cancelled());
    let mut pause = FIRST_COMMENT;
    let mut silence = pin!(sleep(pause));
    loop {
        delivery.hand(&text).await?;
        if writer.done {
            return Ok(());
        }
        tokio::select! {
            () = news.notified() => {}
            () = &mut silence => {
                pause = COMMENT_INTERVAL;
                delivery.hand(&writer.comment()).await?;
            }
            () = deadline.passed() => {
                let error = writer.request.expire();
                return delivery.hand(&error_event(&error)).await;
            }
            () = &mut stopped => return delivery.hand(&error_event(&ApiError::shutting_down())).await,
        }
        silence.as_mut().reset(Instant::now() + pause);
        text = writer.write();
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
    at: At,
    resumes: u32,
    /// Letters, of which offsets in /v1/completions are.
    letters: usize,
    /// Where there are tools: everything that was said, and what of it the client has.
    said: String,
    content: usize,
    calls: usize,
    /// Bytes of the last call's arguments.
    arguments: usize,
}

impl Told {
    /// What the client does not have yet of the text and of the calls, which only grow.
    fn take(&mut self, reading: &Reading, id: impl Fn(usize) -> String) -> (Option<String>, Vec<Value>) {
        let text = reading.content.get(self.content..).filter(|text| !text.is_empty()).map(str::to_owned);
        let mut deltas = Vec::new();
        let last = self.calls.checked_sub(1).and_then(|number| Some((number, reading.calls.get(number)?)));
        if let Some((number, call)) = last
            && let Some(more) = call.arguments.get(self.arguments..).filter(|more| !more.is_empty())
        {
            deltas.push(json!({ "index": number, "function": { "arguments": more } }));
        }
        let new = reading.calls.iter().enumerate().skip(self.calls);
        deltas.extend(new.map(|(number, call)| call_delta(number, &id(number), call)));
        self.has(reading);
        (text, deltas)
    }

    fn has(&mut self, reading: &Reading) {
        self.content = reading.content.len();
        self.calls = reading.calls.len();
        self.arguments = reading.calls.last().map_or(0, |call| call.arguments.len());
    }
}

impl Writer {
    fn new(request: Request, from: Vec<At>) -> Self {
        let count = request.choices.len();
        let mut told: Vec<_> = from.into_iter().map(|at| Told { at, ..Told::default() }).collect();
        told.resize_with(count, Told::default);
        for (told, choice) in told.iter_mut().zip(&request.choices) {
            let text = choice.transcript().text;
            let had = text.get(..told.at.seen.bytes).unwrap_or_default();
            told.letters = had.chars().count();
            if told.at.opened && request.ask.echo {
                told.letters += echoed(choice).0.chars().count();
            }
            if request.ask.tools.is_some() {
                let news = choice.news(Seen { bytes: usize::MAX, tokens: usize::MAX });
                told.has(&read(&request.ask, &news, had, told.at.closed));
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
            events.push_str(&error_event(&self.request.shape.told(error.clone())));
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
        let part = self.part(index, news, reason.is_some());
        let ask = &self.request.ask;
        let (has_tools, only_prompt) = (ask.tools.is_some(), ask.only_prompt);
        let called = self.told[index].calls > 0;
        let end = reason.filter(|_| !self.told[index].at.closed);
        let mut end = end.map(|reason| if only_prompt { "length" } else { finish_reason(reason, called, ask) });
        if let Some(part) = part {
            // The end settles what is a call: it is told in the same event, so that no position lies between.
            let finish_reason = if has_tools { end.take() } else { None };
            self.told[index].at.closed |= finish_reason.is_some();
            let legacy = self.request.ask.is_legacy();
            self.push(index, news, Part { finish_reason, legacy, ..part.as_part() }, events);
        }
        if let Some(reason) = end {
            self.told[index].at.closed = true;
            self.push(index, news, Part { finish_reason: Some(reason), ..Part::default() }, events);
        }
        if news.resumes > self.told[index].resumes {
            self.told[index].resumes = news.resumes;
            let on = self.request.shape.shown(news.worker.as_deref()).map(|worker| format!(" on {worker}"));
            events.push_str(&comment(&format!("resumed{}", on.unwrap_or_default())));
        }
    }

    /// What comes before all text: the role, or the prompt that is to be echoed.
    fn open(&mut self, index: usize, news: &News, ended: bool, events: &mut String) {
        let echo = self.request.ask.echo;
        // The prompt's scores arrive before the first token.
        let ready = if echo { news.position > 0 || ended } else { news.worker.is_some() || ended };
        if !ready || std::mem::replace(&mut self.told[index].at.opened, true) {
            return;
        }
        if self.request.shape.endpoint == Endpoint::Chat {
            self.push(index, news, Part { opens: true, ..Part::default() }, events);
        } else if echo {
            let (text, tokens) = echoed(&self.request.choices[index]);
            let wanted = self.request.ask.logprobs;
            let names = self.request.ask.token_names;
            let logprobs = wanted.map(|_| logprobs::completion(&tokens, tokens.len(), 0, names));
            self.told[index].letters = text.chars().count();
            self.push(index, news, Part { text: Some(&text), logprobs, ..Part::default() }, events);
        }
    }

    /// What is new of a choice. It is one event, text and calls together: a client that comes back names an
    /// event by its id, and has then all that came up to there.
    fn part(&mut self, index: usize, news: &News, ended: bool) -> Option<OwnedPart> {
        let told = &mut self.told[index];
        let ask = &self.request.ask;
        if ask.only_prompt {
            return None;
        }
        told.at.seen = self.seen[index];
        let logprobs =
            (ask.logprobs.is_some() && !news.logprobs.is_empty()).then(|| match self.request.shape.endpoint {
                Endpoint::Chat => logprobs::chat(&news.logprobs, ask.token_names),
                Endpoint::Completion => logprobs::completion(&news.logprobs, 0, told.letters, ask.token_names),
            });
        told.letters += news.text.chars().count();
        if ask.tools.is_none() {
            let something = !news.text.is_empty() || logprobs.is_some();
            return something.then(|| OwnedPart { text: Some(news.text.clone()), calls: Vec::new(), logprobs });
        }
        if told.at.closed {
            return None;
        }
        told.said.push_str(&news.text);
        let reading = read(ask, news, &told.said, ended);
        let (text, calls) = told.take(&reading, |number| self.request.shape.call_id(index, number));
        let something = text.is_some() || logprobs.is_some() || !calls.is_empty();
        // Scores belong to a text, if only to an empty one.
        let text = text.or_else(|| logprobs.is_some().then(String::new));
        something.then_some(OwnedPart { text, calls, logprobs })
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
        let workers = answers.iter().filter_map(|news| self.request.shape.shown(news.worker.as_deref()));
        let workers: Vec<_> = workers.collect();
        let by = if workers.is_empty() { String::new() } else { format!(" by {}", workers.join(" ")) };
        let served = format!("served{by}; resumes {}", usage.resumes);
        events.push_str(&comment(&served));
        events.push_str("data: [DONE]\n\n");
        self.request.settle(200);
        self.done = true;
    }

    fn comment(&self) -> String {
        comment(&doing(&self.request.choices, || self.unloaded()))
    }

    /// Why there is no worker for the model, where none has loaded it. How far one is names the model, which may be a secret.
    fn unloaded(&self) -> Option<String> {
        let shape = &self.request.shape;
        let registry = &self.request.gateway().registry;
        let loading = registry.loading(&shape.model).filter(|_| shape.alias.is_none());
        let loaded = registry.model(&shape.model).is_some_and(|model| !model.workers.is_empty());
        loading.or_else(|| (!loaded).then(|| "none has loaded the model".to_owned()))
    }
}

struct OwnedPart {
    text: Option<String>,
    calls: Vec<Value>,
    logprobs: Option<Value>,
}

impl OwnedPart {
    fn as_part(&self) -> Part<'_> {
        Part {
            text: self.text.as_deref(),
            calls: self.calls.clone(),
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

/// What is done for a client that gets no text; of several choices the one that is least far counts.
/// `unloaded`: why there is no worker for them.
fn doing(choices: &[Arc<Choice>], unloaded: impl FnOnce() -> Option<String>) -> String {
    if choices.iter().any(|choice| choice.is_queued()) {
        let why = unloaded().map_or_else(String::new, |why| format!("; {why}"));
        return format!("waiting for a worker{why}");
    }
    let reading = choices.iter().filter_map(|choice| match choice.work() {
        Some(Work::Reading { computed, all }) => Some((all - computed, all)),
        _ => None,
    });
    match reading.max() {
        Some((left, all)) => format!("reading the prompt, {} of {all} tokens", all - left),
        None => "generating".to_owned(),
    }
}

/// `text` holds no line break: a worker's name with one is refused.
fn comment(text: &str) -> String {
    format!(": {text}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choice::tests::{delta, server};

    #[test]
    fn a_client_hears_how_far_its_prompt_is_read() {
        let choices = [0, 1].map(|index| Arc::new(Choice::new(Arc::default(), index, Arc::default())));
        choices[0].begin(server(1));
        assert_eq!(doing(&choices, || None), "waiting for a worker");
        assert_eq!(doing(&choices, || Some("loading".to_owned())), "waiting for a worker; loading");
        choices[1].begin(server(1));
        assert_eq!(doing(&choices, || None), "generating");
        choices[0].works(1, Work::Reading { computed: 512, all: 4096 });
        choices[1].works(1, Work::Reading { computed: 1024, all: 4096 });
        assert_eq!(doing(&choices, || None), "reading the prompt, 512 of 4096 tokens");
        choices[0].append(1, delta(0, &[1], "a")).unwrap();
        assert_eq!(doing(&choices, || None), "reading the prompt, 1024 of 4096 tokens");
    }
}
