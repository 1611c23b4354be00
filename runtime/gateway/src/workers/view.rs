//! How a worker stands, for those who watch.

use super::connection::Connection;
use serde::Serialize;
use tokio::time::Instant;

/// All that there is to see, made once for all who look at about the same time.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub taken: Instant,
    /// By name, with how many workers are ready for it.
    pub models: Vec<(String, usize)>,
    pub workers: Vec<WorkerView>,
}

#[derive(Clone, Debug, Serialize)]
pub struct WorkerView {
    /// Of the connection: a worker that comes back has another.
    pub id: u64,
    pub worker: String,
    pub state: State,
    pub place: Place,
    pub models: Vec<String>,
    /// Unix time in milliseconds.
    pub attached_ms: u64,
    pub slots: u32,
    pub running: u32,
    pub waiting: u32,
    pub tokens_per_second: f64,
    /// Tokens that there is room for in all, and how many are in use.
    pub kv_tokens: u64,
    pub kv_used: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Ready,
    /// It has no model yet, or none any more, that is loaded.
    Loading,
    Draining,
    /// For failing again and again.
    LeftOut,
}

/// Where a worker runs, as it says itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Place {
    pub node: String,
    pub pool: String,
    /// OnPrem, Spot, OnDemand or External.
    pub capacity: String,
}

impl WorkerView {
    pub fn of(connection: &Connection) -> Self {
        let (load, draining) = connection.reported();
        let state = match (draining, connection.is_ejected(), connection.has_loaded()) {
            (true, _, _) => State::Draining,
            (false, true, _) => State::LeftOut,
            (false, false, false) => State::Loading,
            (false, false, true) => State::Ready,
        };
        Self {
            id: connection.id,
            worker: connection.worker.to_string(),
            state,
            place: connection.place.clone(),
            models: connection.models(),
            attached_ms: connection.attached_ms,
            slots: connection.slots,
            running: load.running,
            waiting: load.waiting,
            tokens_per_second: load.tokens_per_second,
            kv_tokens: load.kv_tokens,
            kv_used: load.kv_tokens.saturating_sub(load.kv_tokens_free),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;
    use vicuna_protocol::inference::{ModelOffer, WorkerHello};

    #[test]
    fn a_worker_is_ready_once_a_model_is_loaded() {
        let offer = |on_request| vec![ModelOffer { name: "ns/m".into(), on_request, ..ModelOffer::default() }];
        let hello = WorkerHello { worker: "w".into(), models: offer(true), slots: 4, ..WorkerHello::default() };
        let connection = Connection::new(1, "ns", hello, mpsc::channel(1).0);
        assert_eq!(WorkerView::of(&connection).state, State::Loading);
        assert!(connection.offers_now(offer(false)));
        assert_eq!(WorkerView::of(&connection).state, State::Ready);
        connection.drain();
        assert_eq!(WorkerView::of(&connection).state, State::Draining);
    }
}
