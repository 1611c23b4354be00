//! /v1/embeddings.

use super::answer::{Caller, job_id};
use super::error::ApiError;
use super::request::embeddings::EmbeddingsAsk;
use crate::gateway::Gateway;
use crate::memory::{Held, Memory};
use crate::workers::Registry;
use crate::workers::inquiry::{Answer, Patience, Task};
use axum::body::{Body as HttpBody, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures::stream::{self, StreamExt, TryStreamExt};
use parking_lot::Mutex;
use serde::{Serialize, Serializer};
use std::convert::Infallible;
use std::sync::Arc;
use tokio::time::Instant;
use vicuna_protocol::inference::gateway_message::Body;
use vicuna_protocol::inference::{Embed, EmbedInput, Embedding, Embeddings, ModelOffer};

pub async fn embeddings(gateway: &Gateway, ask: EmbeddingsAsk, caller: &Caller) -> Result<Response, ApiError> {
    let model = gateway.model_for(&caller.client, &ask.model)?;
    let room = Arc::new(Room::new(&gateway.memory, &ask));
    if let Some(offer) = &model.offer {
        ask.check(offer)?;
        room.take(offer)?;
    }
    let _reserved = gateway.admit(&caller.client, ask.tokens())?;
    let mut ticket = gateway.loads.take(&model.name);
    let base64 = ask.base64;
    let answer = embed(gateway, ask, &room, &model.name, caller).await;
    ticket.ended(answer.as_ref().map_or_else(|error| error.status.as_u16(), |_| 200));
    let answer = answer?;
    caller.client.charge(answer.prompt_tokens);
    let text = written(&model.name, &answer, base64)?;
    drop(answer);
    Ok(sent(text, room.held.lock().take()))
}

/// Of a number as it comes, in a worker's message and read.
const BYTES_RECEIVED: usize = 8;
/// Of a number as it goes to the client, about.
const BYTES_IN_BASE64: usize = 6;
const BYTES_IN_TEXT: usize = 13;
/// What an answer has beside each input's numbers.
const BYTES_BESIDE: usize = 64;

fn bytes_written(base64: bool) -> usize {
    if base64 { BYTES_IN_BASE64 } else { BYTES_IN_TEXT }
}

/// Room in the memory for requests: a small request may ask for a great many numbers.
struct Room {
    memory: Arc<Memory>,
    inputs: usize,
    base64: bool,
    /// What is taken, once a worker has said how long its vectors are.
    held: Mutex<Option<Taken>>,
}

struct Taken {
    dimensions: u32,
    _held: Held,
}

impl Room {
    fn new(memory: &Arc<Memory>, ask: &EmbeddingsAsk) -> Self {
        Self { memory: memory.clone(), inputs: ask.inputs.len(), base64: ask.base64, held: Mutex::default() }
    }

    /// For all of the answer, once: what it is made of comes from several workers of the model.
    fn take(&self, offer: &ModelOffer) -> Result<(), ApiError> {
        let dimensions = offer.embedding_dimensions;
        let mut taken = self.held.lock();
        if taken.as_ref().is_some_and(|taken| taken.dimensions >= dimensions) {
            return Ok(());
        }
        let numbers = (dimensions as usize).saturating_mul(BYTES_RECEIVED + bytes_written(self.base64));
        let bytes = self.inputs.saturating_mul(numbers.saturating_add(BYTES_BESIDE));
        let held = self.memory.take(bytes).ok_or_else(ApiError::too_many_requests)?;
        *taken = Some(Taken { dimensions, _held: held });
        Ok(())
    }

    fn dimensions(&self) -> usize {
        self.held.lock().as_ref().map_or(0, |taken| taken.dimensions as usize)
    }
}

/// Inputs that a worker computes at once: the vectors of all that a request may have would be too long for one message.
const INPUTS_AT_ONCE: usize = 256;
/// Parts of one request that are computed at the same time, by several workers where there are some.
const PARTS_AT_ONCE: usize = 4;

/// Of a model that has had no worker yet, what it can do is known once one has come.
async fn embed(
    gateway: &Gateway,
    ask: EmbeddingsAsk,
    room: &Arc<Room>,
    model: &str,
    caller: &Caller,
) -> Result<Embeddings, ApiError> {
    let request = format!("embd-{}", uuid::Uuid::now_v7().simple());
    let limits = &gateway.limits;
    // Of each part: those behind it wait for their turn only once it has ended.
    let patience = Patience { until: caller.deadline.at(), queue: limits.queue_timeout, stall: limits.stall_timeout };
    let ask = Arc::new(ask);
    let task = |(number, inputs): (usize, &[EmbedInput])| {
        let (request, ask, room) = (job_id(&request, number), ask.clone(), room.clone());
        let embed = Embed { request: request.clone(), model: model.to_owned(), inputs: inputs.to_vec() };
        Task {
            model: model.to_owned(),
            key: caller.client.name().to_owned(),
            priority: caller.client.priority(),
            request,
            body: Body::Embed(embed),
            check: Arc::new(move |offer: &ModelOffer| ask.check(offer).and_then(|()| room.take(offer))),
        }
    };
    let tasks: Vec<_> = ask.inputs.chunks(INPUTS_AT_ONCE).enumerate().map(task).collect();
    let parts = stream::iter(tasks).map(|task| part(&gateway.registry, task, limits.max_queue, patience));
    let parts: Result<Vec<_>, ApiError> = parts.buffered(PARTS_AT_ONCE).try_collect().await;
    let parts = parts.map_err(|error| match caller.deadline.has_passed(Instant::now()) {
        true => caller.deadline.error(model, false, 0),
        false => error,
    })?;
    vectors(parts, ask.inputs.len(), room.dimensions())
}

async fn part(
    registry: &Arc<Registry>,
    task: Task,
    max_queue: usize,
    patience: Patience,
) -> Result<Embeddings, ApiError> {
    match registry.compute(&task, max_queue, patience).await? {
        Answer::Embeddings(answer) => Ok(answer),
        _ => Err(ApiError::worker_failed("the worker sent something else than vectors")),
    }
}

/// The parts put together, if they are an answer to what was asked: vectors of one length, and no longer than there is
/// room for.
fn vectors(parts: Vec<Embeddings>, count: usize, longest: usize) -> Result<Embeddings, ApiError> {
    let prompt_tokens = parts.iter().map(|part| part.prompt_tokens).sum();
    let vectors: Vec<_> = parts.into_iter().flat_map(|part| part.vectors).collect();
    let mut lengths = vectors.iter().map(|vector| vector.values.len());
    let first = lengths.next();
    let even = first.is_some_and(|first| (1..=longest).contains(&first) && lengths.all(|length| length == first));
    match even && vectors.len() == count {
        true => Ok(Embeddings { vectors, prompt_tokens, ..Embeddings::default() }),
        false => Err(ApiError::worker_failed("the worker sent other vectors than it was asked for")),
    }
}

/// OpenAI's answer. It borrows the numbers: as values of JSON each would take eight times its size.
#[derive(Serialize)]
struct Whole<'a> {
    object: &'static str,
    model: &'a str,
    data: Vec<Entry<'a>>,
    usage: Usage,
}

#[derive(Serialize)]
struct Entry<'a> {
    object: &'static str,
    index: usize,
    embedding: Numbers<'a>,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: u32,
    total_tokens: u32,
}

/// A list of numbers, or their bytes in base64.
struct Numbers<'a> {
    values: &'a [f32],
    base64: bool,
}

impl Serialize for Numbers<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.base64 {
            let bytes: Vec<u8> = self.values.iter().flat_map(|value| value.to_le_bytes()).collect();
            serializer.serialize_str(&STANDARD.encode(bytes))
        } else {
            self.values.serialize(serializer)
        }
    }
}

fn written(model: &str, answer: &Embeddings, base64: bool) -> Result<Vec<u8>, ApiError> {
    let numbers: usize = answer.vectors.iter().map(|vector| vector.values.len()).sum();
    let whole = Whole {
        object: "list",
        model,
        data: answer.vectors.iter().enumerate().map(|(index, vector)| entry(index, vector, base64)).collect(),
        usage: Usage { prompt_tokens: answer.prompt_tokens, total_tokens: answer.prompt_tokens },
    };
    let mut text = Vec::with_capacity(numbers * bytes_written(base64) + answer.vectors.len() * BYTES_BESIDE);
    let failed = |_| ApiError::worker_failed("the worker's vectors cannot be written");
    serde_json::to_writer(&mut text, &whole).map_err(failed)?;
    Ok(text)
}

fn entry(index: usize, vector: &Embedding, base64: bool) -> Entry<'_> {
    Entry { object: "embedding", index, embedding: Numbers { values: &vector.values, base64 } }
}

/// Bytes of an answer that go out at a time.
const BYTES_AT_ONCE: usize = 64 << 10;

/// Its room is given back once the client has it, however slowly that reads.
fn sent(text: Vec<u8>, taken: Option<Taken>) -> Response {
    let length = text.len().to_string();
    let mut rest = Bytes::from(text);
    let pieces = std::iter::from_fn(move || {
        let _taken = &taken;
        let size = rest.len().min(BYTES_AT_ONCE);
        (size > 0).then(|| Ok::<_, Infallible>(rest.split_to(size)))
    });
    let headers = [(header::CONTENT_TYPE, "application/json".to_owned()), (header::CONTENT_LENGTH, length)];
    (headers, HttpBody::from_stream(stream::iter(pieces))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn an_answer_lists_numbers_or_their_bytes() {
        let vectors = vec![Embedding { values: vec![0.5, -1.0] }];
        let answer = Embeddings { vectors, prompt_tokens: 3, ..Embeddings::default() };
        let read = |base64| -> Value { serde_json::from_slice(&written("ns/m", &answer, base64).unwrap()).unwrap() };
        let entry = |embedding: Value| json!([{ "object": "embedding", "index": 0, "embedding": embedding }]);
        assert_eq!(read(false)["data"], entry(json!([0.5, -1.0])));
        assert_eq!(read(true)["data"], entry(json!("AAAAPwAAgL8=")));
        assert_eq!(read(true)["usage"], json!({ "prompt_tokens": 3, "total_tokens": 3 }));
    }

    #[tokio::test]
    async fn many_numbers_need_room_until_the_client_has_them() {
        let memory = Memory::new(1 << 20);
        let room = Room { memory: memory.clone(), inputs: 100, base64: false, held: Mutex::default() };
        let offer = |embedding_dimensions| ModelOffer { embedding_dimensions, ..ModelOffer::default() };
        assert_eq!(room.take(&offer(1000)).unwrap_err().status.as_u16(), 429);
        assert_eq!((memory.used(), room.dimensions()), (0, 0));
        room.take(&offer(100)).unwrap();
        let used = memory.used();
        room.take(&offer(100)).unwrap();
        assert_eq!((memory.used(), room.dimensions()), (used, 100), "once for all parts");
        let response = sent(vec![b'x'; BYTES_AT_ONCE + 1], room.held.lock().take());
        assert_eq!(memory.used(), used);
        let body = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
        assert_eq!((body.len(), memory.used()), (BYTES_AT_ONCE + 1, 0));
    }
}
