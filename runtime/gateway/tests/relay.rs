//! A worker outside that reaches one of two gateways serves the clients of both.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use serde_json::json;
use support::{MODEL, TestGateway, Worker, batch, ended, gateway, gateway_of, in_time, spoken, text};
use vicuna_protocol::inference::gateway_message::Body as FromGateway;
use vicuna_protocol::inference::worker_message::Body as FromWorker;
use vicuna_protocol::inference::{TokenRenewed, TranscriptOf, WorkerHello};

/// The gateway that the worker reaches, and the other one.
async fn two_gateways() -> (TestGateway, TestGateway, Worker) {
    let far = gateway(&[]).await;
    let peers = format!("127.0.0.1:{}", far.running.workers.port());
    let near = gateway_of(far.trust.clone(), &["--peers", &peers]).await;
    let worker = near.external_worker("w-1").await;
    far.wait_for_worker("w-1").await;
    (near, far, worker)
}

#[tokio::test]
async fn answers_go_to_the_gateway_that_asked() {
    let (near, far, mut worker) = two_gateways().await;
    let stream = far.stream(json!({}));
    let of_far = worker.generate().await;
    worker.speak(&of_far, 0..2).await;
    let mut stream = stream.await.unwrap();
    stream.until(&text(0..2)).await;

    let answer = near.ask(json!({}));
    let of_near = worker.generate().await;
    worker.speak(&of_near, 0..1).await;
    worker.speak(&of_far, 2..3).await;
    worker.done(&of_near, 1).await;
    worker.done(&of_far, 3).await;
    let (status, body) = in_time(answer).await.unwrap();
    assert_eq!((status, &body["choices"][0]["message"]["content"]), (200, &json!(text(0..1))));
    stream.read_to_end().await;
    assert_eq!(stream.text(), text(0..3));
}

#[tokio::test]
async fn a_batch_is_taken_apart_for_those_who_asked() {
    let (near, far, mut worker) = two_gateways().await;
    let at_far = far.ask(json!({}));
    let of_far = worker.generate().await;
    let at_near = near.ask(json!({}));
    let of_near = worker.generate().await;
    assert!(of_far.whole && of_near.whole);
    let said = [spoken(&of_far, 0..2), spoken(&of_near, 0..1), ended(&of_near, 1), ended(&of_far, 2)];
    worker.send(batch(said)).await;
    for (answer, count) in [(at_near, 1), (at_far, 2)] {
        let (status, body) = in_time(answer).await.unwrap();
        assert_eq!((status, &body["choices"][0]["message"]["content"]), (200, &json!(text(0..count))));
    }

    worker.send(batch([batch([])])).await;
    assert_eq!(worker.next().await.unwrap_err().code(), tonic::Code::InvalidArgument);
}

#[tokio::test]
async fn what_a_client_of_the_other_gateway_gives_up_is_cancelled() {
    let (_near, far, mut worker) = two_gateways().await;
    let stream = far.stream(json!({}));
    let generate = worker.generate().await;
    worker.speak(&generate, 0..2).await;
    let mut stream = stream.await.unwrap();
    stream.until(&text(0..2)).await;
    drop(stream);
    let FromGateway::Cancel(cancel) = worker.next().await.unwrap() else { panic!("expected a cancel") };
    assert_eq!((cancel.request, cancel.keep), (generate.request, true));
}

#[tokio::test]
async fn a_client_can_go_on_at_the_other_gateway() {
    let (near, far, mut worker) = two_gateways().await;
    let stream = far.stream(json!({}));
    let generate = worker.generate().await;
    worker.speak(&generate, 0..2).await;
    let mut stream = stream.await.unwrap();
    stream.until(&text(0..2)).await;
    let id = stream.last_event_id();
    drop(stream);
    assert!(matches!(worker.next().await.unwrap(), FromGateway::Cancel(_)));

    let stream = near.stream_with(&[("last-event-id", id)], json!({}));
    let FromGateway::TranscriptOf(TranscriptOf { request }) = worker.next().await.unwrap() else {
        panic!("expected a question");
    };
    let known = vicuna_protocol::inference::TranscriptChoice {
        generate: Some(generate.clone()),
        tokens: support::tokens(0..2),
        text: text(0..2),
        ..Default::default()
    };
    let transcript = vicuna_protocol::inference::Transcript { request, choices: vec![known] };
    worker.send(FromWorker::Transcript(transcript)).await;
    let again = worker.generate().await;
    assert_eq!(again.generated, support::tokens(0..2));
    worker.speak(&again, 2..3).await;
    worker.done(&again, 3).await;
    let mut stream = stream.await.unwrap();
    stream.read_to_end().await;
    assert_eq!(stream.text(), text(2..3));
}

#[tokio::test]
async fn a_worker_that_goes_is_gone_at_both() {
    let (near, far, worker) = two_gateways().await;
    drop(worker);
    for gateway in [&near, &far] {
        let there = || gateway.running.gateway.registry.model(MODEL).is_some_and(|model| !model.workers.is_empty());
        in_time(async {
            while there() {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn a_pod_is_not_passed_on() {
    let far = gateway(&[]).await;
    let peers = format!("127.0.0.1:{}", far.running.workers.port());
    let near = gateway_of(far.trust.clone(), &["--peers", &peers]).await;
    let _pod = near.worker("pod-1").await;
    // Passed on after the pod, it is there before.
    let _external = near.external_worker("w-1").await;
    far.wait_for_worker("w-1").await;
    assert_eq!(far.running.gateway.registry.model(MODEL).unwrap().workers, ["w-1"]);
}

#[tokio::test]
async fn a_worker_is_passed_on_with_its_renewed_token() {
    let far = gateway(&[]).await;
    let near = support::trust_like(&far.trust);
    near.accept(&[&near, &far.trust]);
    let peers = format!("127.0.0.1:{}", far.running.workers.port());
    let near = gateway_of(near, &["--peers", &peers]).await;
    // The other gateway does not know who signed its first token.
    let worker = near.external_worker("w-1").await;
    for token in ["no token".to_owned(), far.trust.external_token("other").read().unwrap()] {
        worker.send(FromWorker::TokenRenewed(TokenRenewed { token })).await;
    }
    let token = far.trust.external_token("team").read().unwrap();
    worker.send(FromWorker::TokenRenewed(TokenRenewed { token })).await;
    far.wait_for_worker("w-1").await;
}

#[tokio::test]
async fn a_token_that_ran_out_or_is_for_somebody_else_is_refused_in_clear_words() {
    let gateway = gateway(&[]).await;
    let cases = [
        (gateway.trust.expired_token("team", 3600), "has run out"),
        (gateway.trust.token("vicuna-coordinator", "team", "pod"), "--audience vicuna-gateway"),
    ];
    for (token, expected) in cases {
        let hello = WorkerHello { worker: "w".into(), slots: 1, ..WorkerHello::default() };
        let refused = gateway.attach(token, hello).await.err().unwrap();
        assert_eq!(refused.code(), tonic::Code::Unauthenticated);
        assert!(refused.message().contains(expected), "{refused}");
    }
}
