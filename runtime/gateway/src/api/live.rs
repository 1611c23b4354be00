//! Models and workers as they are, and what happens to them, as server-sent events: `state` once a second where
//! it has changed, `happening` at once. A key sees what concerns the models that it may use.

use super::client;
use super::delivery::{Delivery, GivenUp, delivery};
use super::error::ApiError;
use crate::gateway::Gateway;
use crate::keys::Client;
use crate::workers::happenings::Happening;
use crate::workers::view::WorkerView;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{MissedTickBehavior, interval};

/// At a time; one more is told to come back later.
pub const MAX_READERS: usize = 128;
const STATE_INTERVAL: Duration = Duration::from_secs(1);
/// Without a change for so many of them, a comment shows that the connection lives.
const QUIET: u32 = 5;

pub async fn live(State(gateway): State<Arc<Gateway>>, headers: HeaderMap) -> Result<Response, ApiError> {
    let client = client(&gateway, &headers)?;
    let place = gateway.watchers.clone().try_acquire_owned().map_err(|_| ApiError::too_many_requests())?;
    let (delivery, body) = delivery(gateway.limits.write_timeout);
    tokio::spawn(async move {
        tokio::select! {
            _ = write(&gateway, &client, &delivery) => {}
            () = delivery.abandoned() => {}
            () = gateway.draining.cancelled() => {}
        }
        delivery.end();
        drop(place);
    });
    let headers = [
        ("content-type", "text/event-stream"),
        ("x-accel-buffering", "no"),
        (header::CACHE_CONTROL.as_str(), "no-cache"),
    ];
    Ok((headers, body).into_response())
}

async fn write(gateway: &Gateway, client: &Client, delivery: &Delivery) -> Result<(), GivenUp> {
    let (newest, mut next) = gateway.registry.happenings.watch();
    for happening in newest {
        tell(client, &happening, delivery).await?;
    }
    let mut ticks = interval(STATE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut last, mut quiet) = (String::new(), 0);
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                let state = event("state", &state(gateway, client));
                if state != last {
                    delivery.hand(&state).await?;
                    (last, quiet) = (state, 0);
                } else if quiet == QUIET {
                    delivery.hand(": nothing new\n\n").await?;
                    quiet = 0;
                } else {
                    quiet += 1;
                }
            }
            happening = next.recv() => match happening {
                Ok(happening) => tell(client, &happening, delivery).await?,
                // What was missed is gone; the state tells where it led to.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return Ok(()),
            },
        }
    }
}

async fn tell(client: &Client, happening: &Happening, delivery: &Delivery) -> Result<(), GivenUp> {
    let models: Vec<_> = happening.models.iter().filter(|model| client.may_use(model)).cloned().collect();
    if models.is_empty() {
        return Ok(());
    }
    delivery.hand(&event("happening", &Happening { models, ..happening.clone() })).await
}

/// A worker is seen by whoever may use one of its models, and shows no other.
fn state(gateway: &Gateway, client: &Client) -> Value {
    let snapshot = gateway.registry.snapshot(STATE_INTERVAL / 2);
    let workers = snapshot.workers.iter().filter_map(|worker| {
        let models: Vec<_> = worker.models.iter().filter(|model| client.may_use(model)).cloned().collect();
        (!models.is_empty()).then(|| WorkerView { models, ..worker.clone() })
    });
    let models = snapshot.models.iter().filter(|(name, _)| client.may_use(name)).map(|(name, workers)| {
        let demand = gateway.loads.demand(name);
        json!({ "name": name, "workers": workers, "unfinished": demand.unfinished, "queued": demand.queued })
    });
    json!({
        "gateway": gateway.name, "models": models.collect::<Vec<_>>(), "workers": workers.collect::<Vec<_>>(),
    })
}

fn event(name: &str, data: &impl Serialize) -> String {
    // Nothing in it can fail: no map has keys that are not text.
    let data = serde_json::to_string(data).unwrap_or_default();
    format!("event: {name}\ndata: {data}\n\n")
}
