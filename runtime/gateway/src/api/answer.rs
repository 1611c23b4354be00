//! A request from its admission to its end.

use super::deadline::Deadline;
use super::error::ApiError;
use super::logprobs;
use super::position::Position;
use super::request::{Ask, Prompt};
use super::resume;
use super::shape::{Endpoint, Shape, Usage, Whole};
use super::stream;
use crate::choice::{Choice, Job, News, Outcome, Phase, Seen};
use crate::drive::Drivers;
use crate::gateway::Gateway;
use crate::keys::{Client, Reserved};
use crate::loads::Ticket;
use crate::memory::Held;
use crate::routing::{Route, hash, prefix_affinity::PREFIX_BYTES};
use crate::workers::Seat;
use axum::Json;
use axum::http::HeaderValue;
use axum::response::{IntoResponse, Response};
use std::pin::pin;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;
use tokio::time::Instant;
use vicuna_protocol::inference::{Generate, Message};
use vicuna_protocol::tools::Reading;

/// Who asks, and what the headers say.
pub struct Caller {
    pub client: Client,
    /// Where a stream broke off that the client wants the rest of.
    pub position: Option<Position>,
    pub session: Option<String>,
    /// What the model is called in the answer, where its name is a secret.
    pub alias: Option<&'static str>,
    pub deadline: Deadline,
    /// What the request takes of the memory for requests.
    pub held: Held,
}

/// What a request is made of, once it is let in.
pub struct Admitted {
    pub shape: Shape,
    pub ask: Ask,
    pub caller: Caller,
    pub reserved: Reserved,
    pub ticket: Ticket,
    pub choices: Vec<Arc<Choice>>,
    pub seats: Vec<Seat>,
    pub news: Arc<Notify>,
}

/// A request that workers work on. Dropping it gives it up and tells them.
pub struct Request {
    pub shape: Shape,
    pub ask: Ask,
    pub choices: Vec<Arc<Choice>>,
    pub ticket: Ticket,
    /// Notified when any choice has something new.
    pub news: Arc<Notify>,
    /// The client has all of it, or knows why not.
    pub settled: bool,
    gateway: Arc<Gateway>,
    client: Client,
    deadline: Deadline,
    held: Held,
    seats: Vec<Seat>,
    /// Tokens that the client's key has been charged with for it.
    charged: u32,
    /// Tokens that it may use; given back after what it used is charged.
    _reserved: Reserved,
    /// To be run by whoever waits for news.
    pub drivers: Drivers,
}

pub async fn answer(
    gateway: &Arc<Gateway>,
    endpoint: Endpoint,
    ask: Ask,
    caller: Caller,
) -> Result<Response, ApiError> {
    if gateway.draining.is_cancelled() {
        return Err(ApiError::shutting_down());
    }
    match caller.position.clone().filter(|_| ask.stream) {
        Some(position) => {
            let request = resume::resume(gateway, endpoint, ask, caller, &position).await?;
            stream::respond(request, position.choices).await
        }
        None => {
            let streamed = ask.stream;
            let request = admit(gateway, endpoint, ask, caller)?;
            match streamed {
                true => stream::respond(request, Vec::new()).await,
                false => respond(request).await,
            }
        }
    }
}

fn admit(gateway: &Arc<Gateway>, endpoint: Endpoint, ask: Ask, mut caller: Caller) -> Result<Request, ApiError> {
    let mut offer = gateway.offer_for(&caller.client, &ask.model)?;
    // The newest worker may be of an older version than others.
    if let Some(newest) = offer.as_mut().filter(|newest| ask.ends_by().is_some() && !newest.min_tokens) {
        Arc::make_mut(newest).min_tokens = gateway.registry.heeds_ends(&ask.model);
    }
    ask.check(offer.as_deref())?;
    check_count(&ask, gateway.limits.max_queue)?;
    if !caller.held.has_choices(ask.candidates as usize) {
        return Err(ApiError::too_many_requests());
    }
    let reserved = gateway.admit(&caller.client, ask.tokens())?;
    let mut ticket = gateway.loads.take(&ask.model);
    let id = resume::owned_id(endpoint, &caller);
    let shape = Shape { endpoint, id, created: now_seconds(), model: ask.model.clone(), alias: caller.alias };
    let news = Arc::new(Notify::new());
    let mut choices = Vec::new();
    for (index, prompt) in ask.prompts.iter().enumerate() {
        let job = Arc::new(job(gateway, &shape, &ask, prompt, index, &caller));
        choices.extend((0..ask.candidates).map(|index| Arc::new(Choice::new(job.clone(), index, news.clone()))));
    }
    let seats = gateway.registry.admit(choices.clone(), gateway.limits.max_queue).map_err(|_| {
        let error = ApiError::queue_full(&shape.model);
        ticket.ended(error.status.as_u16());
        error
    })?;
    if choices.iter().any(|choice| choice.is_queued()) && !gateway.registry.has_worker(&shape.model) {
        ticket.is_cold();
    }
    Ok(Request::new(gateway, Admitted { shape, ask, caller, reserved, ticket, choices, seats, news }))
}

/// What would not fit into an empty queue never will.
fn check_count(ask: &Ask, max_queue: usize) -> Result<(), ApiError> {
    let wanted = ask.prompts.len() * ask.candidates as usize;
    if wanted <= max_queue {
        return Ok(());
    }
    let message = format!(
        "The request asks for {wanted} answers, `n` or `best_of` of each prompt; at most {max_queue} may wait here at a \
         time. Ask for fewer, or in several requests."
    );
    Err(ApiError::bad_field("n", message))
}

/// What a prompt's request is called on the wire: choices are told apart by it and their index.
pub fn job_id(request: &str, prompt: usize) -> String {
    match prompt {
        0 => request.to_owned(),
        prompt => format!("{request}.{prompt}"),
    }
}

fn job(gateway: &Gateway, shape: &Shape, ask: &Ask, prompt: &Prompt, index: usize, caller: &Caller) -> Job {
    let mut generate = Generate {
        request: job_id(&shape.id, index),
        model: shape.model.clone(),
        sampling: Some(ask.sampling.clone()),
        logprobs: ask.logprobs.or((ask.candidates > ask.n).then_some(0)),
        format: ask.format.clone(),
        tools_json: ask.tools.as_ref().map(|tools| tools.json.clone()).unwrap_or_default(),
        tool_use: ask.tools.as_ref().map(|tools| tools.wanted.clone()),
        priority: caller.client.priority(),
        whole: !ask.stream,
        ..Generate::default()
    };
    match prompt {
        Prompt::Chat(messages) => generate.messages = messages.clone(),
        Prompt::Text(text) => generate.prompt = Some(text.clone()),
        Prompt::Tokens(tokens) => generate.prompt_tokens = tokens.clone(),
    }
    // The text of token ids is only known from their scores.
    let scored = ask.echo && (ask.logprobs.is_some() || matches!(prompt, Prompt::Tokens(_)));
    generate.prompt_logprobs = scored.then(|| ask.logprobs.unwrap_or_default());
    let session = caller.session.as_ref().or(ask.session.as_ref());
    let route = Route {
        prefix: prefix_hash(&shape.model, prompt),
        session: session.map(|session| hash(&[caller.client.name().as_bytes(), session.as_bytes()])),
        draw: rand::random(),
    };
    let limits = &gateway.limits;
    let patience = if ask.stream { limits.stream_queue_timeout } else { limits.queue_timeout };
    Job { generate, key: caller.client.name().to_owned(), route, patience }
}

/// Of what a prompt begins with.
fn prefix_hash(model: &str, prompt: &Prompt) -> u64 {
    let mut bytes = Vec::with_capacity(PREFIX_BYTES);
    let mut push = |part: &[u8]| {
        let room = PREFIX_BYTES - bytes.len();
        bytes.extend_from_slice(&part[..part.len().min(room)]);
    };
    match prompt {
        Prompt::Chat(messages) => {
            for Message { role, content, .. } in messages {
                push(role.as_bytes());
                push(content.as_bytes());
            }
        }
        Prompt::Text(text) => push(text.as_bytes()),
        Prompt::Tokens(tokens) => tokens.iter().for_each(|token| push(&token.to_le_bytes())),
    }
    hash(&[model.as_bytes(), &bytes])
}

pub fn now_seconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

impl Request {
    pub fn new(gateway: &Arc<Gateway>, admitted: Admitted) -> Self {
        let Admitted { shape, ask, caller, reserved, ticket, choices, seats, news } = admitted;
        let Caller { client, held, deadline, .. } = caller;
        let mut drivers = Drivers::default();
        choices.iter().for_each(|choice| drivers.add(&gateway.registry, choice, &gateway.limits));
        let mut request = Self {
            shape,
            ask,
            choices,
            ticket,
            news,
            settled: false,
            gateway: gateway.clone(),
            client,
            deadline,
            held,
            seats,
            charged: 0,
            _reserved: reserved,
            drivers,
        };
        // What there is of it already was charged where it came from.
        request.charged = request.used();
        request
    }

    /// Another connection goes on with it, and asks for it anew.
    pub fn pass_to(&mut self, ask: Ask, caller: Caller) {
        let Caller { client, held, deadline, .. } = caller;
        (self.ask, self.client, self.held, self.deadline) = (ask, client, held, deadline);
    }

    /// Ends it for its deadline.
    pub fn expire(&mut self) -> ApiError {
        let answers = self.glance();
        let tokens = answers.iter().map(|news| news.position).sum();
        let started = answers.iter().any(|news| news.worker.is_some());
        let error = self.deadline.error(&self.shape.model, started, tokens);
        self.settle(error.status.as_u16());
        error
    }

    pub fn deadline(&self) -> Deadline {
        self.deadline
    }

    /// All choices as they stand, with what is beyond `seen`, which is remembered.
    pub fn look(&mut self, seen: &mut [Seen]) -> Vec<News> {
        let all: Vec<_> = self.choices.iter().zip(seen.iter()).map(|(choice, seen)| choice.news(*seen)).collect();
        for (news, seen) in all.iter().zip(seen.iter_mut()) {
            seen.bytes += news.text.len();
            seen.tokens = seen.tokens.max(news.position);
        }
        self.account(&all);
        all
    }

    /// All choices as they stand, without what they say.
    pub fn glance(&mut self) -> Vec<News> {
        let nothing = Seen { bytes: usize::MAX, tokens: usize::MAX };
        let all: Vec<_> = self.choices.iter().map(|choice| choice.news(nothing)).collect();
        self.account(&all);
        all
    }

    fn account(&mut self, all: &[News]) {
        if all.iter().any(|news| news.worker.is_some()) {
            self.ticket.started();
        }
        if let Some(begun) = all.iter().filter_map(|news| news.begun).min() {
            self.ticket.first_token(begun);
        }
        self.held.has_answers(self.choices.iter().map(|choice| choice.bytes()).sum());
    }

    pub fn usage(&self, answers: &[News]) -> Usage {
        let mut usage = Usage::of(&self.choices, answers);
        if self.ask.only_prompt {
            usage.completion = 0;
        }
        usage
    }

    pub fn gateway(&self) -> &Gateway {
        &self.gateway
    }

    /// How it ended, in a status of HTTP; nobody will come back for it.
    pub fn settle(&mut self, code: u16) {
        self.ticket.ended(code);
        self.settled = true;
    }

    /// Tokens of it so far.
    fn used(&mut self) -> u32 {
        let answers = self.glance();
        self.usage(&answers).total()
    }

    /// Takes what is not charged yet from the client's quota.
    fn charge(&mut self) {
        let used = self.used();
        self.client.charge(used.saturating_sub(self.charged));
        self.charged = self.charged.max(used);
    }

    /// Keeps what there is for a client that may come back.
    fn park(&self) {
        let stream: Vec<_> =
            self.choices.iter().map(|choice| (choice.job.clone(), choice.index, choice.transcript())).collect();
        if stream.iter().any(|(_, _, transcript)| !transcript.tokens.is_empty()) {
            self.gateway.parked.put(&self.shape.id, stream, Instant::now());
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let may_come_back = self.ask.stream && !self.settled;
        // First nothing may come any more: what is kept is then what was charged.
        self.seats.iter().for_each(|seat| seat.leave(may_come_back));
        self.charge();
        if may_come_back {
            self.park();
        }
    }
}

async fn respond(mut request: Request) -> Result<Response, ApiError> {
    let (news, gateway) = (request.news.clone(), request.gateway.clone());
    let deadline = request.deadline;
    let mut stopped = pin!(gateway.stopped.cancelled());
    loop {
        let answers = request.glance();
        if let Some(error) = answers.iter().find_map(failed) {
            request.settle(error.status.as_u16());
            return Err(request.shape.told(error));
        }
        if answers.iter().all(is_ended) {
            return Ok(whole(&mut request));
        }
        tokio::select! {
            () = news.notified() => {}
            never = request.drivers.run() => match never {},
            () = deadline.passed() => return Err(request.expire()),
            () = &mut stopped => {
                let error = ApiError::shutting_down();
                request.settle(error.status.as_u16());
                return Err(error);
            }
        }
    }
}

fn whole(request: &mut Request) -> Response {
    let mut seen = vec![Seen::default(); request.choices.len()];
    let answers = request.look(&mut seen);
    let best = likeliest(&answers, request.ask.n as usize, request.ask.candidates as usize);
    let wholes = best.into_iter().map(|index| whole_choice(request, index, &answers[index])).collect();
    let fingerprint = answers.iter().find_map(|news| news.fingerprint.clone());
    let body = request.shape.whole(wholes, request.usage(&answers), fingerprint.as_deref());
    let mut response = Json(body).into_response();
    name(&mut response, &request.shape, &answers);
    request.settle(200);
    response
}

/// Indices of the `n` answers of each prompt that are the answer; where there are more candidates, the likeliest by token.
fn likeliest(answers: &[News], n: usize, candidates: usize) -> Vec<usize> {
    let mut all: Vec<_> = (0..answers.len()).collect();
    if candidates > n {
        for prompt in all.chunks_mut(candidates) {
            prompt.sort_by(|a, b| mean_logprob(&answers[*b]).total_cmp(&mean_logprob(&answers[*a])));
        }
    }
    all.chunks(candidates).flat_map(|prompt| &prompt[..n.min(prompt.len())]).copied().collect()
}

/// Of an answer's tokens; one without any is the least likely.
fn mean_logprob(news: &News) -> f64 {
    let sum: f64 = news.logprobs.iter().map(|token| f64::from(token.logprob)).sum();
    if news.logprobs.is_empty() { f64::NEG_INFINITY } else { sum / news.logprobs.len() as f64 }
}

fn whole_choice(request: &Request, index: usize, news: &News) -> Whole {
    let ask = &request.ask;
    let reason = match &news.phase {
        Phase::Ended(Outcome::Done { finish_reason, .. }) => Some(finish_reason.clone()),
        _ => None,
    };
    let choice = &request.choices[index];
    if request.shape.endpoint == Endpoint::Completion {
        let (mut text, mut tokens) = if ask.echo { echoed(choice) } else { Default::default() };
        let prompt = tokens.len();
        let reason = if ask.only_prompt { Some("length".to_owned()) } else { reason };
        if !ask.only_prompt {
            text.push_str(&news.text);
            tokens.extend(news.logprobs.iter().cloned());
        }
        let logprobs = ask.logprobs.map(|_| logprobs::completion(&tokens, prompt, 0, ask.token_names));
        return Whole { text, calls: Vec::new(), legacy: false, logprobs, finish_reason: reason };
    }
    let reading = read(ask, news, &news.text, true);
    let called = !reading.calls.is_empty();
    let ids = reading.calls.into_iter().enumerate();
    Whole {
        text: reading.content,
        calls: ids.map(|(number, call)| (request.shape.call_id(index, number), call)).collect(),
        legacy: ask.is_legacy(),
        logprobs: ask.logprobs.map(|_| logprobs::chat(&news.logprobs, ask.token_names)),
        finish_reason: reason.map(|reason| finish_reason(&reason, called, ask).to_owned()),
    }
}

/// Text and calls in what was said so far. `ended`: no more comes.
pub fn read(ask: &Ask, news: &News, said: &str, ended: bool) -> Reading {
    let Some((tools, dialect)) = ask.tools.as_ref().zip(news.dialect) else {
        return Reading { content: said.to_owned(), calls: Vec::new() };
    };
    let mut reading = dialect.read(said, ended, &tools.names);
    if tools.wanted.single {
        reading.calls.truncate(1);
    }
    reading
}

pub fn finish_reason<'a>(reason: &'a str, called: bool, ask: &Ask) -> &'a str {
    match called && reason == "stop" {
        true if ask.is_legacy() => "function_call",
        true => "tool_calls",
        false => reason,
    }
}

/// The prompt as part of an answer: its text, and its tokens' log probabilities where they are there.
pub fn echoed(choice: &Choice) -> (String, Vec<vicuna_protocol::inference::TokenLogprob>) {
    let scores = choice.transcript().prompt_scores;
    let text = match &choice.job.generate.prompt {
        Some(prompt) => prompt.clone(),
        None => {
            let bytes: Vec<_> = scores.iter().flat_map(|token| token.bytes.iter().copied()).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        }
    };
    (text, scores)
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

/// Says what the request is called here and which worker answers, for people who look.
pub fn name(response: &mut Response, shape: &Shape, answers: &[News]) {
    let worker = answers.first().and_then(|news| shape.shown(news.worker.as_deref()));
    for (name, value) in [("x-request-id", Some(shape.id.as_str())), ("x-vicuna-worker", worker)] {
        if let Some(Ok(value)) = value.map(HeaderValue::from_str) {
            response.headers_mut().insert(name, value);
        }
    }
}
