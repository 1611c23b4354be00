//! API keys, quotas and priorities, as clients meet them.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use serde_json::{Value, json};
use std::path::PathBuf;
use support::{MODEL, chat, gateway, in_time};
use vicuna_protocol::inference::worker_message::Body as FromWorker;
use vicuna_protocol::inference::{Failure, failure};

/// SHA-256 of sk-team, sk-rival and sk-urgent.
const TEAM: &str = "3fc923743166bae134970eb2789df5145d8b8041e050acf18067986818f41d13";
const RIVAL: &str = "d491c3232d1533b3ef21c3173f6b486c4a63bd887dab8a0567384baa11201004";
const URGENT: &str = "bfaff3c907e01159c70821aa1dcc3830bf2ba6e5f99f23410791349e945ad138";

fn keys_file(folder: &tempfile::TempDir, keys: Value) -> String {
    let path: PathBuf = folder.path().join("keys.json");
    std::fs::write(&path, json!({ "keys": keys }).to_string()).unwrap();
    path.display().to_string()
}

async fn post(url: &str, key: Option<&str>, body: Value) -> (u16, Value, reqwest::header::HeaderMap) {
    let mut request = reqwest::Client::new().post(url).body(body.to_string());
    if let Some(key) = key {
        request = request.bearer_auth(key);
    }
    let response = in_time(request.send()).await.unwrap();
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    (status, serde_json::from_str(&response.text().await.unwrap()).unwrap(), headers)
}

#[tokio::test]
async fn only_known_keys_get_in_and_see_only_their_models() {
    let folder = tempfile::tempdir().unwrap();
    let file = keys_file(
        &folder,
        json!([
            { "name": "team", "sha256": TEAM, "models": ["team/*"] },
            { "name": "rival", "sha256": RIVAL, "models": ["rival/*"] },
        ]),
    );
    let gateway = gateway(&["--api-keys-file", &file]).await;
    let mut worker = gateway.worker("w-1").await;
    let url = gateway.url("/v1/chat/completions");
    for stranger in [None, Some("sk-nobody")] {
        let (status, body, _) = post(&url, stranger, chat(json!({}))).await;
        assert_eq!((status, &body["error"]["code"]), (401, &json!("invalid_api_key")));
        assert!(!body.to_string().contains("sk-nobody"));
    }
    let (status, body, _) = post(&url, Some("sk-rival"), chat(json!({}))).await;
    assert_eq!(status, 404);
    assert!(!body["error"]["message"].as_str().unwrap().contains("available: team"), "{body}");
    let list = reqwest::Client::new().get(gateway.url("/v1/models")).bearer_auth("sk-rival").send();
    let list: Value = serde_json::from_str(&list.await.unwrap().text().await.unwrap()).unwrap();
    assert_eq!(list["data"], json!([]));

    let answer = tokio::spawn(async move { post(&url, Some("sk-team"), chat(json!({}))).await });
    let generate = worker.generate().await;
    worker.done(&generate, 0).await;
    assert_eq!(in_time(answer).await.unwrap().0, 200);
    let page = reqwest::get(gateway.url("/")).await.unwrap();
    assert_eq!(page.status(), 200, "the page itself needs no key");
}

#[tokio::test]
async fn used_up_quotas_are_429_with_the_time_to_wait() {
    let folder = tempfile::tempdir().unwrap();
    let file = keys_file(
        &folder,
        json!([
            { "name": "team", "sha256": TEAM, "requestsPerMinute": 1 },
            { "name": "rival", "sha256": RIVAL, "models": [MODEL], "tokensPerMinute": 10 },
        ]),
    );
    let gateway = gateway(&["--api-keys-file", &file]).await;
    let mut worker = gateway.worker("w-1").await;
    let url = gateway.url("/v1/chat/completions");
    for (key, used) in [("sk-team", "requests"), ("sk-rival", "tokens")] {
        let asked = url.clone();
        let answer = tokio::spawn(async move { post(&asked, Some(key), chat(json!({}))).await });
        let generate = worker.generate().await;
        // Seven of the prompt: 47 together.
        worker.speak(&generate, 0..40).await;
        worker.done(&generate, 40).await;
        assert_eq!(in_time(answer).await.unwrap().0, 200);
        let (status, body, headers) = post(&url, Some(key), chat(json!({}))).await;
        assert_eq!((status, &body["error"]["code"]), (429, &json!("rate_limit_exceeded")));
        assert!(body["error"]["message"].as_str().unwrap().contains(used), "{body}");
        assert!(headers["retry-after"].to_str().unwrap().parse::<u32>().unwrap() > 1);
    }
    assert!(gateway.metrics().await.contains("vicuna_gateway_over_quota_total 2"));
}

#[tokio::test]
async fn what_a_running_request_may_use_is_set_aside_until_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let file = keys_file(&folder, json!([{ "name": "team", "sha256": TEAM, "tokensPerMinute": 100 }]));
    let gateway = gateway(&["--api-keys-file", &file]).await;
    let mut worker = gateway.worker("w-1").await;
    let url = gateway.url("/v1/chat/completions");
    let ask = |max_tokens: u32| {
        let (url, body) = (url.clone(), chat(json!({ "max_tokens": max_tokens })));
        tokio::spawn(async move { post(&url, Some("sk-team"), body).await })
    };
    let first = ask(80);
    let generate = worker.generate().await;
    let (status, body, _) = in_time(ask(50)).await.unwrap();
    assert_eq!((status, &body["error"]["code"]), (429, &json!("rate_limit_exceeded")), "only 20 are not spoken for");
    worker.speak(&generate, 0..1).await;
    worker.done(&generate, 1).await;
    assert_eq!(in_time(first).await.unwrap().0, 200);
    let second = ask(50);
    let generate = worker.generate().await;
    worker.done(&generate, 0).await;
    assert_eq!(in_time(second).await.unwrap().0, 200, "most was given back");
}

#[tokio::test]
async fn urgent_requests_go_first_and_make_room_in_a_full_queue() {
    let folder = tempfile::tempdir().unwrap();
    let file = keys_file(
        &folder,
        json!([{ "name": "team", "sha256": TEAM }, { "name": "urgent", "sha256": URGENT, "priority": 10 }]),
    );
    let gateway = gateway(&["--api-keys-file", &file, "--max-queue", "2"]).await;
    let mut worker = gateway.worker_with("w-1", |hello| hello.slots = 1).await;
    let ask = |key: &'static str, user: &str| {
        let (url, body) = (gateway.url("/v1/chat/completions"), chat(json!({ "seed": user.len() })));
        tokio::spawn(async move { post(&url, Some(key), body).await })
    };
    let loads = gateway.running.gateway.loads.clone();
    let queued = async |count| {
        in_time(async {
            while loads.demand(MODEL).queued != count {
                tokio::task::yield_now().await;
            }
        })
        .await;
    };
    let running = ask("sk-team", "1");
    let generate = worker.generate().await;
    let older = ask("sk-team", "22");
    queued(1).await;
    let younger = ask("sk-team", "333");
    queued(2).await;
    let urgent = ask("sk-urgent", "4444");
    let (status, body, _) = in_time(younger).await.unwrap();
    assert_eq!((status, &body["error"]["code"]), (429, &json!("queue_full")), "it made room");
    worker.done(&generate, 0).await;
    let next = worker.generate().await;
    assert_eq!((next.sampling.as_ref().unwrap().seed, next.priority), (4, 10));
    worker.done(&next, 0).await;
    let last = worker.generate().await;
    worker.done(&last, 0).await;
    for answer in [running, older, urgent] {
        assert_eq!(in_time(answer).await.unwrap().0, 200);
    }
}

#[tokio::test]
async fn answers_and_refusals_tell_what_is_left_in_openai_s_headers() {
    let folder = tempfile::tempdir().unwrap();
    let team = json!({ "name": "team", "sha256": TEAM, "requestsPerMinute": 2, "tokensPerMinute": 1000 });
    let gateway =
        gateway(&["--api-keys-file", &keys_file(&folder, json!([team, { "name": "rival", "sha256": RIVAL }]))]).await;
    let mut worker = gateway.worker("w-1").await;
    let url = gateway.url("/v1/chat/completions");
    for (remaining, status) in [("1", 200), ("0", 200), ("0", 429)] {
        let url = url.clone();
        let answer = tokio::spawn(async move { post(&url, Some("sk-team"), chat(json!({}))).await });
        if status == 200 {
            let generate = worker.generate().await;
            worker.done(&generate, 0).await;
        }
        let (found, body, headers) = in_time(answer).await.unwrap();
        assert_eq!(found, status, "{body}");
        let told = |name: &str| headers[&format!("x-ratelimit-{name}")].to_str().unwrap().to_owned();
        assert_eq!((told("limit-requests"), told("remaining-requests")), ("2".to_owned(), remaining.to_owned()));
        assert_eq!(told("limit-tokens"), "1000");
        assert!(told("reset-requests").ends_with('s'));
    }
    let free = tokio::spawn(async move { post(&url, Some("sk-rival"), chat(json!({}))).await });
    let generate = worker.generate().await;
    worker.done(&generate, 0).await;
    let (_, _, headers) = in_time(free).await.unwrap();
    assert!(headers.keys().all(|name| !name.as_str().starts_with("x-ratelimit")), "{headers:?}");
}

async fn tokens_left(gateway: &support::TestGateway) -> u32 {
    let ask = reqwest::Client::new().post(gateway.url("/v1/chat/completions")).bearer_auth("sk-team");
    let refused = in_time(ask.body(chat(json!({ "temperature": 9 })).to_string()).send()).await.unwrap();
    refused.headers()["x-ratelimit-remaining-tokens"].to_str().unwrap().parse().unwrap()
}

/// Of an event that is longer than what comes at once, the end may be missing.
async fn read_until(stream: &mut support::Stream, expected: &str) {
    while !stream.raw.contains(expected) {
        stream.more().await;
    }
}

/// A hundred tokens come back a second, so that some seconds do not matter beside what is charged.
#[tokio::test]
async fn tokens_are_charged_once_whether_a_request_is_cancelled_come_back_for_or_fails() {
    let folder = tempfile::tempdir().unwrap();
    let file = keys_file(&folder, json!([{ "name": "team", "sha256": TEAM, "tokensPerMinute": 6000 }]));
    let gateway = gateway(&["--api-keys-file", &file]).await;
    let mut worker = gateway.worker_with("w-1", |hello| hello.models[0].max_length = 100_000).await;
    let key = ("authorization", "Bearer sk-team".to_owned());
    assert_eq!(tokens_left(&gateway).await, 6000);

    let stream = gateway.stream_with(std::slice::from_ref(&key), json!({}));
    let generate = worker.generate().await;
    worker.speak(&generate, 0..2000).await;
    let mut stream = stream.await.unwrap();
    read_until(&mut stream, "w1999 ").await;
    let id = stream.last_event_id();
    drop(stream);
    worker.next().await.unwrap();
    let cancelled = tokens_left(&gateway).await;
    assert!((3993..5000).contains(&cancelled), "{cancelled}");

    let stream = gateway.stream_with(&[key.clone(), ("last-event-id", id)], json!({}));
    let generate = worker.generate().await;
    worker.speak(&generate, 2000..4000).await;
    worker.done(&generate, 4000).await;
    stream.await.unwrap().read_to_end().await;
    let ended = tokens_left(&gateway).await;
    assert!((1993..3000).contains(&ended), "only the rest was charged: {ended}");

    let stream = gateway.stream_with(&[key], json!({}));
    let generate = worker.generate().await;
    worker.speak(&generate, 0..1500).await;
    let mut stream = stream.await.unwrap();
    read_until(&mut stream, "w1499 ").await;
    let code = failure::Code::Invalid.into();
    worker.send(FromWorker::Failure(Failure { request: generate.request, code, ..Failure::default() })).await;
    stream.read_to_end().await;
    let failed = tokens_left(&gateway).await;
    assert!(failed + 500 < ended, "{failed} of {ended}");
}
