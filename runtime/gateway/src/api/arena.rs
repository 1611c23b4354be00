//! The arena's endpoints: a pair, its answers, its vote, and all votes.

use super::answer::Caller;
use super::answer::now_seconds;
use super::delivery::{Delivery, GivenUp, delivery};
use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::request::Ask;
use super::shape::Endpoint;
use super::{answer, client, limits, receive};

use crate::arena::votes::{Vote, VoteError, Winner};
use crate::arena::{Battle, Side};
use crate::config::Limits;
use crate::gateway::Gateway;
use crate::keys::Client;
use crate::serve::Peer;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// What a client may set of a request in the arena: nothing whose answer would tell the two apart.
const FIELDS: [&str; 5] = ["messages", "temperature", "top_p", "max_tokens", "seed"];
/// Questions of a pair.
const MAX_TURNS: u32 = 1000;

pub fn router() -> Router<Arc<Gateway>> {
    Router::new()
        .route("/api/v1/arena/battles", post(begin))
        .route("/api/v1/arena/battles/{ticket}/vote", post(vote))
        .route("/api/v1/arena/battles/{ticket}/{side}", post(ask))
        .route("/api/v1/arena/votes", get(votes))
}

/// Two models of those that the client may use and that have a worker.
async fn begin(State(gateway): State<Arc<Gateway>>, headers: HeaderMap) -> Result<Json<Value>, ApiError> {
    let client = client(&gateway, &headers)?;
    let models = gateway.registry.models().into_iter();
    let ready = models.filter(|model| !model.workers.is_empty() && client.may_use(&model.name));
    let ready: Vec<_> = ready.map(|model| model.name).collect();
    let battle = Battle::draw(&ready, client.name(), now_seconds()).ok_or_else(|| ApiError::no_pair(ready.len()))?;
    gateway.metrics.arena_battles.inc();
    let ticket = gateway.arena.seal.seal(&battle);
    let ticket = ticket.ok_or_else(|| ApiError::votes_not_stored("this gateway cannot read its key"))?;
    Ok(Json(json!({ "battle": ticket, "stored_in": gateway.arena.votes.stored_in() })))
}

fn battle(gateway: &Gateway, client: &Client, ticket: &str) -> Result<Battle, ApiError> {
    gateway.arena.open(ticket, client.name(), now_seconds())
}

/// An answer of one of the two, as a stream; as of /v1/chat/completions, without anything that names the model.
async fn ask(
    State(gateway): State<Arc<Gateway>>,
    Path((ticket, side)): Path<(String, String)>,
    request: Request,
) -> Result<Response, ApiError> {
    let side = Side::parse(&side).ok_or_else(|| ApiError::no_such_path(request.uri().path()))?;
    let (mut caller, body) = receive(&gateway, request).await?;
    let battle = battle(&gateway, &caller.client, &ticket)?;
    caller.alias = Some(side.name());
    let client = caller.client.clone();
    let answer = async {
        let ask = parse(&body, battle.model(side), &gateway.limits)?;
        drop(body);
        answer::answer(&gateway, Endpoint::Chat, ask, caller).await
    };
    let answer = answer.await.map_err(|error| error.veiled(side.name()));
    Ok(limits::told(&client, answer))
}

fn parse(body: &[u8], model: &str, limits: &Limits) -> Result<Ask, ApiError> {
    let fields = Fields::parse(body)?;
    let given = FIELDS.iter().filter_map(|name| Some(((*name).to_owned(), fields.get(name)?.clone())));
    let mut given: Map<_, _> = given.collect();
    given.insert("model".to_owned(), model.into());
    given.insert("stream".to_owned(), true.into());
    Ask::chat(Value::Object(given).to_string().as_bytes(), limits)
}

/// Only whoever has voted learns the names.
async fn vote(
    State(gateway): State<Arc<Gateway>>,
    Path(ticket): Path<String>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0.to_string());
    let (Caller { client, held: _held, .. }, body) = receive(&gateway, request).await?;
    let battle = battle(&gateway, &client, &ticket)?;
    let vote = read_vote(&Fields::parse(&body)?, battle)?;
    let voter = if client.name().is_empty() { peer.unwrap_or_default() } else { format!("key {}", client.name()) };
    let told = |outcome: &str| gateway.metrics.arena_votes.with_label_values(&[outcome]).inc();
    gateway.arena.voters.take(&voter, Instant::now()).map_err(|wait| {
        told("too_many");
        ApiError::too_many_votes(gateway.arena.voters.per_minute(), wait)
    })?;
    let winner = vote.winner.name();
    let names = json!({
        "model_a": vote.model_a, "model_b": vote.model_b, "stored_in": gateway.arena.votes.stored_in(),
    });
    let store = gateway.clone();
    let stored = tokio::task::spawn_blocking(move || store.arena.votes.add(&vote)).await;
    match stored {
        Ok(Ok(())) => {
            told(winner);
            Ok(Json(names))
        }
        Ok(Err(VoteError::Twice)) => {
            told("twice");
            Err(ApiError::voted_already())
        }
        Ok(Err(error)) => {
            told("not_stored");
            tracing::error!(%error, "a vote is not stored");
            Err(ApiError::votes_not_stored("the gateway's log says why"))
        }
        Err(error) => Err(ApiError::votes_not_stored(&error.to_string())),
    }
}

fn read_vote(fields: &Fields, battle: Battle) -> Result<Vote, ApiError> {
    let winner = Winner::named(fields.string("winner")?);
    let winner = winner.ok_or_else(|| wrong("winner", "a, b, tie or both-bad"))?;
    Ok(Vote {
        winner,
        turn: fields.integer("turns", 1, 1..=MAX_TURNS)?,
        anony: true,
        tstamp: now_seconds(),
        conversation_a: fields.get("conversation_a").cloned(),
        conversation_b: fields.get("conversation_b").cloned(),
        id: battle.id,
        model_a: battle.a,
        model_b: battle.b,
        judge: battle.key,
    })
}

/// The votes on models that the client may use both of.
async fn votes(State(gateway): State<Arc<Gateway>>, headers: HeaderMap) -> Result<Response, ApiError> {
    let client = client(&gateway, &headers)?;
    let (delivery, body) = delivery(gateway.limits.write_timeout);
    tokio::spawn(async move {
        if let Ok(()) = export(&gateway, &client, &delivery).await {
            delivery.end();
        }
    });
    let headers = [
        (header::CONTENT_TYPE, "application/x-ndjson"),
        (header::CONTENT_DISPOSITION, "attachment; filename=\"votes.jsonl\""),
        (header::CACHE_CONTROL, "no-store"),
    ];
    Ok((headers, body).into_response())
}

async fn export(gateway: &Gateway, client: &Client, delivery: &Delivery) -> Result<(), GivenUp> {
    // Files are read by a thread that may wait, as far ahead as this holds.
    let (sender, mut lines) = mpsc::channel(16);
    let arena = gateway.arena.clone();
    let reading = move || arena.votes.read().try_for_each(|line| sender.blocking_send(line));
    let _reading = AbortOnDropHandle::new(tokio::task::spawn_blocking(reading));
    while let Some(line) = lines.recv().await {
        let Ok(vote) = serde_json::from_str::<Vote>(&line) else {
            continue;
        };
        if client.may_use(&vote.model_a) && client.may_use(&vote.model_b) {
            delivery.hand(&line).await?;
        }
    }
    Ok(())
}
