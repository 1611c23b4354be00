//! Models and workers as they are, and as it happens.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::{MODEL, Stream, TestGateway, gateway, in_time, text};
use vicuna_gateway::api::live::MAX_READERS;
use vicuna_protocol::inference::worker_message::Body as FromWorker;
use vicuna_protocol::inference::{Draining, Load};

const LIVE: &str = "/api/v1/live";

struct Watcher(Stream);

impl Watcher {
    async fn of(gateway: &TestGateway) -> Self {
        Self(Stream::new(in_time(reqwest::get(gateway.url(LIVE))).await.unwrap()))
    }

    fn data(&self, event: &str) -> Vec<Value> {
        let begins = format!("event: {event}\ndata: ");
        let events = self.0.raw.split_terminator("\n\n").filter_map(|text| text.strip_prefix(&begins));
        events.map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    /// Reads on until the newest state is like this.
    async fn until(&mut self, is_so: impl Fn(&Value) -> bool) -> Value {
        loop {
            match self.data("state").pop().filter(&is_so) {
                Some(state) => return state,
                None => self.0.more().await,
            }
        }
    }

    async fn until_told(&mut self, what: &str) -> Value {
        loop {
            match self.data("happening").into_iter().find(|happening| happening["what"] == what) {
                Some(happening) => return happening,
                None => self.0.more().await,
            }
        }
    }
}

#[tokio::test]
async fn one_sees_where_a_worker_runs_and_how_full_it_is() {
    let gateway = gateway(&[]).await;
    let worker = gateway.worker_with("w-1", |hello| hello.pool = "cheap".into()).await;
    let load = Load { running: 2, waiting: 1, slots: 4, tokens_per_second: 12.5, kv_tokens: 100, kv_tokens_free: 25 };
    *worker.load.lock() = load;
    let mut watcher = Watcher::of(&gateway).await;
    let state = watcher.until(|state| state["workers"][0]["running"] == 2).await;
    let shown = &state["workers"][0];
    assert_eq!(shown["place"], json!({ "node": "node", "pool": "cheap", "capacity": "Spot" }));
    assert_eq!((&shown["worker"], &shown["state"]), (&json!("w-1"), &json!("ready")));
    assert_eq!((&shown["kv_used"], &shown["tokens_per_second"]), (&json!(75), &json!(12.5)));
    assert_eq!(state["models"], json!([{ "name": MODEL, "workers": 1, "unfinished": 0, "queued": 0 }]));
}

#[tokio::test]
async fn drains_losses_and_resumes_are_told_as_they_happen() {
    let gateway = gateway(&[]).await;
    let mut first = gateway.worker("w-1").await;
    let mut watcher = Watcher::of(&gateway).await;
    let asked = gateway.stream(json!({}));
    let generate = first.generate().await;
    first.speak(&generate, 0..2).await;
    let mut stream = in_time(asked).await.unwrap();
    first.send(FromWorker::Draining(Draining { deadline_ms: 1000 })).await;
    let told = watcher.until_told("draining").await;
    assert_eq!((&told["worker"], &told["streams"]), (&json!("w-1"), &json!(1)));
    watcher.until(|state| state["workers"][0]["state"] == "draining").await;
    drop(first);
    assert_eq!(watcher.until_told("gone").await["streams"], 1);
    let mut second = gateway.worker("w-2").await;
    let generate = second.generate().await;
    second.speak(&generate, 2..3).await;
    second.done(&generate, 3).await;
    stream.read_to_end().await;
    assert_eq!(stream.text(), text(0..3));
    let told = watcher.until_told("resumed").await;
    assert_eq!((&told["worker"], &told["models"]), (&json!("w-2"), &json!([MODEL])));
    // Who comes later hears it, too, and nobody hears anything twice.
    let mut late = Watcher::of(&gateway).await;
    late.until_told("resumed").await;
    let numbers: Vec<_> = watcher.data("happening").iter().map(|told| told["number"].as_u64().unwrap()).collect();
    assert!(numbers.is_sorted_by(|one, next| one < next), "{numbers:?}");
}

#[tokio::test]
async fn a_key_sees_only_what_concerns_its_models() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.json");
    let entry = |name: &str, models: &[&str]| json!({ "name": name, "sha256": hex::encode(Sha256::digest(name)), "models": models });
    let entries = [entry("team", &["team/*"]), entry("stranger", &["other/*"])];
    std::fs::write(&keys, json!({ "keys": entries }).to_string()).unwrap();
    let gateway = gateway(&["--api-keys-file", keys.to_str().unwrap()]).await;
    let _worker = gateway.worker("w-1").await;
    let watch = async |key| Watcher(Stream::new(gateway.ask_as(key, Method::GET, LIVE, Value::Null).await));
    let mut own = watch("team").await;
    own.until(|state| state["workers"][0]["worker"] == "w-1").await;
    own.until_told("attached").await;
    let mut stranger = watch("stranger").await;
    let state = stranger.until(|_| true).await;
    assert_eq!((&state["workers"], &state["models"]), (&json!([]), &json!([])));
    assert!(!stranger.0.raw.contains("w-1"), "{}", stranger.0.raw);
    assert_eq!(in_time(reqwest::get(gateway.url(LIVE))).await.unwrap().status(), 401);
}

#[tokio::test]
async fn there_are_places_for_so_many_watchers_and_a_place_is_free_when_one_goes() {
    let gateway = gateway(&[]).await;
    let mut watchers = Vec::new();
    for _ in 0..MAX_READERS {
        watchers.push(Watcher::of(&gateway).await);
    }
    let one_more = Watcher::of(&gateway).await;
    assert_eq!((one_more.0.status, watchers[0].0.status), (429, 200));
    drop(watchers.pop());
    in_time(async { while Watcher::of(&gateway).await.0.status != 200 {} }).await;
}

#[tokio::test]
async fn a_gateway_that_stops_does_not_wait_for_those_who_watch() {
    let gateway = gateway(&[]).await;
    let mut watcher = Watcher::of(&gateway).await;
    watcher.until(|_| true).await;
    let stopping = tokio::spawn(gateway.running.stop());
    in_time(stopping).await.unwrap();
}
