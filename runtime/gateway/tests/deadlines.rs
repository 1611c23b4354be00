//! Requests with a deadline of their own, and what waits in one queue.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use serde_json::{Value, json};
use support::{MODEL, gateway, in_time, text};
use vicuna_protocol::inference::gateway_message::Body as FromGateway;
use vicuna_protocol::inference::worker_message::Body as FromWorker;
use vicuna_protocol::inference::{Embedding, Embeddings, ModelOffer};

fn within(seconds: &str) -> [(&'static str, String); 1] {
    [("x-request-timeout", seconds.to_owned())]
}

#[tokio::test]
async fn a_request_that_waits_past_its_deadline_is_told_so_and_never_reaches_a_worker() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker_with("w-1", |hello| hello.slots = 1).await;
    let running = gateway.ask(json!({}));
    let generate = worker.generate().await;
    let (status, body) = in_time(gateway.ask_with(&within("0.2"), json!({ "seed": 7 }))).await.unwrap();
    assert_eq!((status, &body["error"]["code"]), (504, &json!("deadline_exceeded")));
    let message = body["error"]["message"].as_str().unwrap();
    assert!(message.contains("0.2 s (X-Request-Timeout)") && message.contains("waited for a worker"), "{message}");
    let streamed = in_time(gateway.stream_with(&within("0.2"), json!({}))).await.unwrap();
    assert_eq!(streamed.status, 504, "nothing has been sent, so that the status still can tell");

    let last = gateway.ask(json!({ "seed": 8 }));
    worker.done(&generate, 0).await;
    let next = worker.generate().await;
    assert_eq!(next.sampling.as_ref().unwrap().seed, 8);
    worker.done(&next, 0).await;
    for answer in [running, last] {
        assert_eq!(in_time(answer).await.unwrap().0, 200);
    }
    let metrics = gateway.metrics().await;
    assert!(metrics.contains("vicuna_gateway_requests_total{code=\"504\",model=\"team/chat\"} 2"), "{metrics}");
}

#[tokio::test]
async fn a_stream_ends_at_its_deadline_with_an_error_and_its_worker_is_told() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker("w-1").await;
    let stream = gateway.stream_with(&within("2"), json!({}));
    let generate = worker.generate().await;
    worker.speak(&generate, 0..2).await;
    let mut stream = stream.await.unwrap();
    stream.read_to_end().await;
    assert_eq!(stream.text(), text(0..2));
    let events = stream.events();
    let error = &events.last().unwrap()["error"];
    assert_eq!(error["code"], "deadline_exceeded");
    assert!(error["message"].as_str().unwrap().contains("after 2 tokens"), "{error}");
    let FromGateway::Cancel(cancel) = worker.next().await.unwrap() else { panic!("expected a cancel") };
    assert_eq!((cancel.request, cancel.keep), (generate.request, false), "nobody comes back for it");
}

#[tokio::test]
async fn a_deadline_that_is_none_is_refused() {
    let gateway = gateway(&[]).await;
    let _worker = gateway.worker("w-1").await;
    let (status, body) = in_time(gateway.ask_with(&within("soon"), json!({}))).await.unwrap();
    assert_eq!((status, &body["error"]["param"]), (400, &json!("X-Request-Timeout")));
}

async fn embed(url: String, headers: &[(&'static str, String)]) -> (u16, Value) {
    let mut request = reqwest::Client::new().post(url).body(json!({ "model": MODEL, "input": "a" }).to_string());
    for (name, value) in headers {
        request = request.header(*name, value);
    }
    let response = in_time(request.send()).await.unwrap();
    (response.status().as_u16(), serde_json::from_str(&response.text().await.unwrap()).unwrap())
}

#[tokio::test]
async fn embeddings_wait_their_turn_in_the_same_bounded_queue() {
    let gateway = gateway(&["--max-queue", "1"]).await;
    let able = |hello: &mut vicuna_protocol::inference::WorkerHello| {
        hello.slots = 1;
        hello.models[0].embedding_dimensions = 2;
    };
    let mut worker = gateway.worker_with("w-1", able).await;
    let running = gateway.ask(json!({}));
    let generate = worker.generate().await;
    let url = gateway.url("/v1/embeddings");
    let (status, body) = embed(url.clone(), &within("0.2")).await;
    assert_eq!((status, &body["error"]["code"]), (504, &json!("deadline_exceeded")), "the worker has no slot for it");

    let asked = url.clone();
    let waiting = tokio::spawn(async move { embed(asked, &[]).await });
    in_time(async {
        while !gateway.metrics().await.contains("vicuna_gateway_queued{model=\"team/chat\"} 1") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let (status, body) = embed(url, &[]).await;
    assert_eq!((status, &body["error"]["code"]), (429, &json!("queue_full")));
    assert_eq!(in_time(gateway.ask(json!({}))).await.unwrap().0, 429, "it is one queue for all");

    worker.done(&generate, 0).await;
    let FromGateway::Embed(embed) = worker.next().await.unwrap() else { panic!("expected the question") };
    let vectors = vec![Embedding { values: vec![1.0, 0.0] }];
    worker.send(FromWorker::Embeddings(Embeddings { request: embed.request, vectors, prompt_tokens: 1 })).await;
    assert_eq!(in_time(waiting).await.unwrap().0, 200);
    assert_eq!(in_time(running).await.unwrap().0, 200);
}

#[tokio::test]
async fn a_worker_whose_namespace_has_too_many_models_is_told_so() {
    let gateway = gateway(&[]).await;
    let offering = |from: usize| {
        let offer =
            move |number: usize| ModelOffer { name: format!("team/{number}"), max_length: 8, ..ModelOffer::default() };
        move |hello: &mut vicuna_protocol::inference::WorkerHello| hello.models = (from..from + 64).map(offer).collect()
    };
    let mut workers = Vec::new();
    for number in 0..4 {
        workers.push(gateway.worker_with(&format!("w-{number}"), offering(64 * number)).await);
    }
    let refused = gateway.try_worker("w-5", |hello| hello.models[0].name = "team/one-more".into()).await;
    let status = refused.err().unwrap();
    assert_eq!(status.code(), tonic::Code::ResourceExhausted);
    assert!(status.message().contains("serve fewer names"), "{status}");
}
