//! Two models without their names, and votes on them.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::{Stream, TestGateway, Worker, gateway, in_time, text};

const BATTLES: &str = "/api/v1/arena/battles";
const ONE: &str = "team/quokka";
const OTHER: &str = "team/wombat";

async fn worker(gateway: &TestGateway, model: &str, name: &str) -> Worker {
    let offers = |hello: &mut vicuna_protocol::inference::WorkerHello| {
        hello.models[0].name = model.into();
        hello.models[0].weights_digest = format!("digest-of-{model}");
    };
    gateway.worker_with(name, offers).await
}

async fn begin(gateway: &TestGateway) -> String {
    let body = in_time(gateway.post(BATTLES, json!({})).await.text()).await.unwrap();
    let body: Value = serde_json::from_str(&body).unwrap();
    body["battle"].as_str().unwrap_or_else(|| panic!("{body}")).to_owned()
}

fn question() -> Value {
    json!({ "messages": [{ "role": "user", "content": "Hi" }] })
}

fn tells(shown: &str) -> bool {
    ["quokka", "wombat", "digest", "secret-worker"].iter().any(|word| shown.contains(word))
}

async fn json_of(response: reqwest::Response) -> (u16, Value) {
    let status = response.status().as_u16();
    (status, serde_json::from_str(&in_time(response.text()).await.unwrap()).unwrap())
}

#[tokio::test]
async fn nothing_tells_who_the_two_are_before_the_vote() {
    let gateway = gateway(&[]).await;
    let _one = worker(&gateway, ONE, "secret-worker-0").await;
    let mut first = worker(&gateway, OTHER, "secret-worker-1").await;
    let ticket = begin(&gateway).await;
    assert!(!tells(&ticket));
    // One of the two sides is the model that this worker has; the other's waits, which does not matter here.
    let path = |side: &str| format!("{BATTLES}/{ticket}/{side}");
    let asked = ["a", "b"].map(|side| {
        let response = gateway.post(&path(side), question());
        tokio::spawn(async move { Stream::new(response.await) })
    });
    let generate = first.generate().await;
    assert_eq!(generate.model, OTHER);
    first.speak(&generate, 0..2).await;
    let [a, b] = asked;
    let mut stream = tokio::select! { stream = a => stream.unwrap(), stream = b => stream.unwrap() };
    // Its worker is lost, which the client is told.
    stream.until(&text(0..2)).await;
    drop(first);
    let mut second = worker(&gateway, OTHER, "secret-worker-2").await;
    let generate = second.generate().await;
    second.speak(&generate, 2..4).await;
    second.done(&generate, 4).await;
    stream.read_to_end().await;
    assert_eq!(stream.text(), text(0..4));
    assert!(stream.raw.contains(": resumed\n") && stream.raw.contains("\"model\":\""), "{}", stream.raw);
    assert!(!tells(&stream.raw), "{}", stream.raw);
    assert!(!tells(&format!("{:?}", stream.headers)), "{:?}", stream.headers);
    let (status, names) = json_of(gateway.post(&path("vote"), json!({ "winner": "a" })).await).await;
    assert_eq!(status, 200, "{names}");
    let mut names = ["model_a", "model_b"].map(|name| names[name].as_str().unwrap().to_owned());
    names.sort();
    assert_eq!(names, [ONE, OTHER]);
}

#[tokio::test]
async fn a_model_that_cannot_answer_does_not_give_its_name_away() {
    let gateway = gateway(&["--queue-timeout-seconds", "0.1", "--stream-queue-timeout-seconds", "0.1"]).await;
    let workers = [worker(&gateway, ONE, "secret-worker-0").await, worker(&gateway, OTHER, "secret-worker-1").await];
    let ticket = begin(&gateway).await;
    drop(workers);
    let (status, error) = json_of(gateway.post(&format!("{BATTLES}/{ticket}/b"), question()).await).await;
    assert!(status == 502 || status == 503, "{status}");
    let message = error["error"]["message"].as_str().unwrap();
    assert!(message.contains("Model b") && !tells(&error.to_string()), "{error}");
    let (status, error) = json_of(gateway.post(&format!("{BATTLES}/{ticket}/b"), json!({})).await).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("messages")), "what is wrong with a request is told");
}

#[tokio::test]
async fn a_guessed_name_is_not_confirmed_by_going_on_with_the_stream() {
    let gateway = gateway(&[]).await;
    let mut workers = [worker(&gateway, ONE, "w-0").await, worker(&gateway, OTHER, "w-1").await];
    let ticket = begin(&gateway).await;
    let asked = tokio::spawn({
        let response = gateway.post(&format!("{BATTLES}/{ticket}/a"), question());
        async move { Stream::new(response.await) }
    });
    let [one, other] = &mut workers;
    let (generate, worker) = tokio::select! {
        generate = one.generate() => (generate, &*one),
        generate = other.generate() => (generate, &*other),
    };
    worker.speak(&generate, 0..2).await;
    let mut stream = asked.await.unwrap();
    stream.until(&text(0..2)).await;
    let id = stream.last_event_id();
    drop(stream);
    let guess = gateway.stream_with(&[("last-event-id", id)], json!({ "model": generate.model }));
    assert_eq!(in_time(guess).await.unwrap().status, 404);
}

/// A gateway with a key for everything, and one for the first model and `quiet/*`.
async fn gateway_with_keys(votes: &std::path::Path) -> TestGateway {
    let entry = |name: &str, models: &[&str]| json!({ "name": name, "sha256": hex::encode(Sha256::digest(name)), "models": models });
    let keys = json!({ "keys": [entry("all", &["*"]), entry("also-all", &["*"]), entry("some", &[ONE, "quiet/*"])] });
    std::fs::write(votes.join("keys.json"), keys.to_string()).unwrap();
    let (keys, folder) = (votes.join("keys.json"), votes.join("votes"));
    gateway(&["--api-keys-file", keys.to_str().unwrap(), "--arena-votes-folder", folder.to_str().unwrap()]).await
}

#[tokio::test]
async fn votes_are_of_a_key_count_once_and_are_exported_to_those_who_may_use_the_models() {
    let folder = tempfile::tempdir().unwrap();
    let gateway = gateway_with_keys(folder.path()).await;
    let _workers = [worker(&gateway, ONE, "w-0").await, worker(&gateway, OTHER, "w-1").await];
    let ask = |key: &'static str, method: Method, path: String, body: Value| {
        let gateway = &gateway;
        async move { gateway.ask_as(key, method, &path, body).await }
    };
    let (status, error) = json_of(ask("some", Method::POST, BATTLES.into(), json!({})).await).await;
    assert_eq!((status, &error["error"]["code"]), (503, &json!("no_pair")), "one model is no pair");
    let (_, begun) = json_of(ask("all", Method::POST, BATTLES.into(), json!({})).await).await;
    assert_eq!(begun["stored_in"], "file");
    let path = format!("{BATTLES}/{}/vote", begun["battle"].as_str().unwrap());
    let vote = json!({ "winner": "both-bad", "turns": 2, "conversation_a": [{ "role": "user", "content": "Hi" }] });
    let (status, _) = json_of(ask("also-all", Method::POST, path.clone(), vote.clone()).await).await;
    assert_eq!(status, 404, "another key's pair is not known");
    let (status, error) = json_of(ask("all", Method::POST, path.clone(), json!({ "winner": "c" })).await).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("winner")));
    let (status, _) = json_of(ask("all", Method::POST, path.clone(), vote.clone()).await).await;
    assert_eq!(status, 200);
    let (status, error) = json_of(ask("all", Method::POST, path, vote).await).await;
    assert_eq!((status, &error["error"]["code"]), (409, &json!("voted_already")));

    let export = |key| async move {
        let response = ask(key, Method::GET, "/api/v1/arena/votes".into(), Value::Null).await;
        in_time(response.text()).await.unwrap()
    };
    let lines = export("all").await;
    assert_eq!(lines.lines().count(), 1, "{lines}");
    let line: Value = serde_json::from_str(&lines).unwrap();
    assert_eq!((&line["winner"], &line["judge"], &line["turn"]), (&json!("tie (bothbad)"), &json!("all"), &json!(2)));
    assert_eq!(line["conversation_a"][0]["content"], "Hi");
    assert_eq!(export("some").await, "", "it may not use both models");
    let refused = reqwest::get(gateway.url("/api/v1/arena/votes")).await.unwrap();
    assert_eq!(refused.status(), 401);
}

#[tokio::test]
async fn one_voter_has_so_many_votes_a_minute_and_votes_are_counted() {
    let gateway = gateway(&["--arena-votes-per-minute", "2"]).await;
    let _workers = [worker(&gateway, ONE, "w-0").await, worker(&gateway, OTHER, "w-1").await];
    for (winner, expected) in [("a", 200), ("tie", 200), ("b", 429)] {
        let path = format!("{BATTLES}/{}/vote", begin(&gateway).await);
        let response = gateway.post(&path, json!({ "winner": winner })).await;
        let waits = response.headers().contains_key("retry-after");
        let (status, body) = json_of(response).await;
        assert_eq!((status, waits), (expected, expected == 429), "{body}");
    }
    let metrics = gateway.metrics().await;
    for line in
        ["arena_battles_total 3", "arena_votes_total{outcome=\"tie\"} 1", "arena_votes_total{outcome=\"too_many\"} 1"]
    {
        assert!(metrics.contains(line), "{metrics}");
    }
}
