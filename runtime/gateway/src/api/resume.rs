//! A client comes back for the rest of a stream, here or after its gateway is gone.

use super::answer::{Admitted, Caller, Request, job_id, now_seconds};
use super::error::ApiError;
use super::position::Position;
use super::request::Ask;
use super::shape::{Endpoint, Shape};
use crate::choice::{Choice, Job, Outcome, Transcript, Variant};
use crate::gateway::Gateway;
use crate::keys::Client;
use crate::parked::Stream;
use crate::routing::{Route, hash};
use std::sync::Arc;
use tokio::sync::Notify;
use tokio::time::Instant;
use vicuna_protocol::inference::{Generate, TranscriptChoice};

/// Ids of answers whose model is a secret begin so: by another path, with a guessed model, they cannot be
/// gone on with, which would tell that the guess was right.
const SECRET: &str = "arena-";

/// A new request's id. It ends in a mark of the key that it belongs to: with another one nobody gets
/// the rest of it, at no gateway.
pub fn owned_id(endpoint: Endpoint, caller: &Caller) -> String {
    let id = endpoint.new_id();
    let id = if caller.alias.is_some() { format!("{SECRET}{id}") } else { id };
    match caller.client.name() {
        "" => id,
        name => format!("{id}-{}", mark(&id, name)),
    }
}

fn owns(client: &Client, request: &str) -> bool {
    match client.name() {
        "" => true,
        name => request.rsplit_once('-').is_some_and(|(id, found)| found == mark(id, name)),
    }
}

fn mark(id: &str, name: &str) -> String {
    format!("{:016x}", hash(&[id.as_bytes(), name.as_bytes()]))
}

/// The request that `position` is of, on its way again.
pub async fn resume(
    gateway: &Arc<Gateway>,
    endpoint: Endpoint,
    ask: Ask,
    caller: Caller,
    position: &Position,
) -> Result<Request, ApiError> {
    let model = gateway.model_for(&caller.client, &ask.model)?.name;
    let unknown = || ApiError::unknown_stream(&position.request);
    let wanted = ask.prompts.len() * ask.n as usize;
    let is_secret = position.request.starts_with(SECRET);
    let fits = position.choices.len() == wanted && is_secret == caller.alias.is_some();
    if !owns(&caller.client, &position.request) || !fits {
        return Err(unknown());
    }
    // What is left of it is not known yet.
    let reserved = gateway.admit(&caller.client, 0)?;
    if let Some(mut request) = gateway.takeovers.take(&position.request).await {
        if request.shape.model != model || request.choices.len() != wanted {
            return Err(unknown());
        }
        gateway.metrics.returns.inc();
        tracing::info!(request = position.request, "a client takes its stream over from another connection");
        request.pass_to(ask, caller);
        return Ok(request);
    }
    let stream = match gateway.parked.take(&position.request, Instant::now()) {
        Some(stream) if stream.iter().all(|(job, _, _)| job.model() == model) => stream,
        _ => remembered(gateway, &model, &ask, &caller, &position.request).await,
    };
    if stream.len() != wanted {
        return Err(unknown());
    }
    let ticket = gateway.loads.take(&model);
    gateway.metrics.returns.inc();
    tracing::info!(request = position.request, "a client comes back for its stream");
    let (id, alias) = (position.request.clone(), caller.alias);
    let shape = Shape { endpoint, id, created: now_seconds(), model, alias };
    let news = Arc::new(Notify::new());
    let restored = |(job, index, transcript)| Arc::new(Choice::restored(job, index, news.clone(), transcript));
    let choices: Vec<_> = stream.into_iter().map(restored).collect();
    let seats = gateway.registry.restore(choices.clone());
    Ok(Request::new(gateway, Admitted { shape, ask, caller, reserved, ticket, choices, seats, news }))
}

/// What workers remember of a request, choice by choice; empty if that is not enough to go on.
async fn remembered(gateway: &Gateway, model: &str, ask: &Ask, caller: &Caller, request: &str) -> Stream {
    let mut stream = Vec::new();
    for prompt in 0..ask.prompts.len() {
        let id = job_id(request, prompt);
        let mut known = gateway.registry.transcripts(model, &id).await;
        known.retain(|(choice, _)| {
            choice.generate.as_ref().is_some_and(|generate| generate.model == model && generate.request == id)
        });
        let Some(generate) = known.iter().find_map(|(choice, _)| choice.generate.clone()) else {
            return Vec::new();
        };
        let job = Arc::new(job(gateway, generate, caller));
        stream.extend((0..ask.n).map(|index| (job.clone(), index, best(&known, index))));
    }
    stream
}

fn job(gateway: &Gateway, generate: Generate, caller: &Caller) -> Job {
    // What was there when that worker took it is in its transcript.
    let generate = Generate { generated: Vec::new(), choice: 0, ..generate };
    let route = Route { draw: rand::random(), ..Route::default() };
    let patience = gateway.limits.stream_queue_timeout;
    Job { generate, key: caller.client.name().to_owned(), route, patience }
}

/// The longest of the transcripts of one choice: a request that has moved is known to several.
fn best(known: &[(TranscriptChoice, Variant)], index: u32) -> Transcript {
    let of_it =
        known.iter().filter(|(choice, _)| choice.generate.as_ref().is_some_and(|generate| generate.choice == index));
    let longest = of_it.max_by_key(|(choice, _)| (!choice.finish_reason.is_empty(), choice.tokens.len()));
    longest.map(|(choice, variant)| transcript(choice, variant)).unwrap_or_default()
}

fn transcript(choice: &TranscriptChoice, variant: &Variant) -> Transcript {
    let ended = (!choice.finish_reason.is_empty()).then(|| Outcome::Done {
        finish_reason: choice.finish_reason.clone(),
        prompt_tokens: choice.prompt_tokens,
        completion_tokens: choice.tokens.len() as u32,
        // The worker that is asked does not say.
        cached_tokens: 0,
    });
    Transcript {
        tokens: choice.tokens.clone(),
        text: choice.text.clone(),
        logprobs: choice.logprobs.clone(),
        prompt_scores: Vec::new(),
        variant: Some(variant.clone()),
        prompt_tokens: choice.prompt_tokens,
        done: ended,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(index: u32, tokens: &[u32], finish_reason: &str) -> (TranscriptChoice, Variant) {
        let choice = TranscriptChoice {
            generate: Some(Generate { choice: index, ..Generate::default() }),
            tokens: tokens.to_vec(),
            finish_reason: finish_reason.into(),
            ..TranscriptChoice::default()
        };
        let variant =
            Variant { weights_digest: "d".into(), template: "".into(), quantization: "".into(), dialect: None };
        (choice, variant)
    }

    #[test]
    fn the_length_of_the_prompt_comes_with_what_a_worker_remembers() {
        let (mut known, variant) = choice(0, &[1, 2], "stop");
        known.prompt_tokens = 7;
        let Some(Outcome::Done { prompt_tokens, completion_tokens, .. }) = transcript(&known, &variant).done else {
            panic!("it had ended");
        };
        assert_eq!((prompt_tokens, completion_tokens), (7, 2));
    }

    #[test]
    fn the_longest_transcript_counts_and_a_finished_one_most() {
        let known = [choice(0, &[1], ""), choice(0, &[1, 2], ""), choice(1, &[1, 2, 3], ""), choice(1, &[1], "stop")];
        assert_eq!(best(&known, 0).tokens, [1, 2]);
        assert!(best(&known, 1).done.is_some());
        assert_eq!(best(&known, 2), Transcript::default());
    }
}
