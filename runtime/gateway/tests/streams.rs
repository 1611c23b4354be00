//! Streams that outlive their workers.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use serde_json::json;
use support::{MODEL, gateway, in_time, text, tokens};
use vicuna_protocol::inference::gateway_message::Body as FromGateway;
use vicuna_protocol::inference::worker_message::Body as FromWorker;
use vicuna_protocol::inference::{CONTEXT_LENGTH_EXCEEDED, Draining, Failure, ModelOffer, WorkerHello, failure};

#[tokio::test]
async fn a_stream_goes_on_elsewhere_when_its_worker_dies() {
    let gateway = gateway(&[]).await;
    let mut first = gateway.worker("w-1").await;
    let stream = gateway.stream(json!({ "max_tokens": 6 }));
    let begun = first.generate().await;
    assert_eq!(begun.generated, [0u32; 0]);
    first.speak(&begun, 0..3).await;
    let mut stream = stream.await.unwrap();
    stream.until(&text(0..3)).await;
    assert_eq!(stream.worker.as_deref(), Some("w-1"));

    drop(first);
    let mut second = gateway.worker("w-2").await;
    let resumed = second.generate().await;
    assert_eq!(resumed.generated, tokens(0..3));
    assert_eq!((&resumed.request, &resumed.sampling), (&begun.request, &begun.sampling));
    second.speak(&resumed, 3..6).await;
    second.done(&resumed, 6).await;
    stream.read_to_end().await;

    assert_eq!(stream.text(), text(0..6));
    assert!(stream.raw.contains(": resumed on w-2"), "{}", stream.raw);
    assert!(stream.raw.ends_with("data: [DONE]\n\n"));
    assert!(stream.raw.contains(&format!("id: {}:3.9\n", begun.request)), "{}", stream.raw);
    let events = stream.events();
    let usage = events.last().unwrap();
    assert_eq!(usage["usage"]["total_tokens"], 13);
    assert_eq!(usage["vicuna"]["resumes"], 1);
    assert_eq!(events[events.len() - 2]["choices"][0]["finish_reason"], "stop");
    let metrics = gateway.metrics().await;
    assert!(metrics.contains("vicuna_gateway_resumes_total{model=\"team/chat\"} 1"), "{metrics}");
    assert!(metrics.contains("vicuna_gateway_tokens_total{model=\"team/chat\"} 6"), "{metrics}");
}

#[tokio::test]
async fn a_token_reaches_the_client_once() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker("w-1").await;
    let stream = gateway.stream(json!({}));
    let generate = worker.generate().await;
    for range in [0..2, 0..2, 1..2, 2..4] {
        worker.speak(&generate, range).await;
    }
    worker.done(&generate, 4).await;
    let mut stream = stream.await.unwrap();
    stream.read_to_end().await;
    assert_eq!(stream.text(), text(0..4));
}

#[tokio::test]
async fn a_gap_is_a_lost_worker() {
    let gateway = gateway(&[]).await;
    let mut first = gateway.worker("w-1").await;
    let stream = gateway.stream(json!({}));
    let generate = first.generate().await;
    first.speak(&generate, 0..2).await;
    first.speak(&generate, 3..4).await;
    let status = first.next().await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::DataLoss, "{status}");

    let mut second = gateway.worker("w-2").await;
    let resumed = second.generate().await;
    assert_eq!(resumed.generated, tokens(0..2));
    second.speak(&resumed, 2..4).await;
    second.done(&resumed, 4).await;
    let mut stream = stream.await.unwrap();
    stream.read_to_end().await;
    assert_eq!(stream.text(), text(0..4));
}

#[tokio::test]
async fn other_weights_do_not_continue_an_answer() {
    let gateway = gateway(&["--resume-timeout-seconds", "0.2"]).await;
    let mut first = gateway.worker("w-1").await;
    let stream = gateway.stream(json!({}));
    let generate = first.generate().await;
    first.speak(&generate, 0..2).await;
    let mut stream = stream.await.unwrap();
    stream.until(&text(0..2)).await;
    let mut other = gateway.worker_with("w-2", |hello| hello.models[0].weights_digest = "digest-b".into()).await;
    drop(first);
    stream.read_to_end().await;
    let events = stream.events();
    let error = &events.last().unwrap()["error"];
    assert_eq!(error["code"], "not_resumed");
    assert!(error["message"].as_str().unwrap().contains("after 2 tokens"), "{error}");
    assert!(!stream.raw.contains("[DONE]"));
    // The other worker is there for new requests only: the first that it hears of is this one.
    let answer = gateway.ask(json!({}));
    let fresh = other.generate().await;
    assert_ne!(fresh.request, generate.request);
    other.done(&fresh, 0).await;
    assert_eq!(in_time(answer).await.unwrap().0, 200);
}

/// A worker with one slot for a model and two adapters of it.
fn adapted(digest: &'static str) -> impl FnOnce(&mut WorkerHello) {
    move |hello| {
        let offer = |name: &str, digest: &str| ModelOffer {
            name: format!("{MODEL}{name}"),
            weights_digest: digest.to_owned(),
            ..hello.models[0].clone()
        };
        hello.models = vec![offer("", "base"), offer(":a", digest), offer(":b", "digest-of-b")];
        hello.slots = 1;
    }
}

#[tokio::test]
async fn a_stream_of_an_adapter_goes_on_where_that_adapter_is() {
    let gateway = gateway(&[]).await;
    let mut first = gateway.worker_with("w-1", adapted("digest-of-a")).await;
    let name = format!("{MODEL}:a");
    let stream = gateway.stream(json!({ "model": name }));
    let generate = first.generate().await;
    assert_eq!(generate.model, name);
    first.speak(&generate, 0..2).await;
    let mut stream = stream.await.unwrap();
    stream.until(&text(0..2)).await;
    let mut other = gateway.worker_with("w-2", adapted("retrained")).await;
    drop(first);
    let mut same = gateway.worker_with("w-3", adapted("digest-of-a")).await;
    let resumed = same.generate().await;
    assert_eq!((&resumed.model, &resumed.generated), (&name, &tokens(0..2)));
    same.done(&resumed, 2).await;
    stream.read_to_end().await;
    assert!(stream.raw.contains(": resumed on w-3"), "{}", stream.raw);
    // The worker with another adapter of that name has heard of nothing but this.
    let answer = gateway.ask(json!({}));
    let fresh = tokio::select! {
        fresh = other.generate() => fresh,
        fresh = same.generate() => fresh,
    };
    assert_ne!(fresh.request, generate.request);
    drop(answer);
}

#[tokio::test]
async fn a_place_that_one_adapter_leaves_is_another_s() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker_with("w-1", adapted("digest-of-a")).await;
    let mut answers = Vec::new();
    for name in [":a", ":b", ""] {
        answers.push(gateway.ask(json!({ "model": format!("{MODEL}{name}") })));
        let waiting = answers.len();
        in_time(async {
            while gateway.running.gateway.loads.unfinished() < waiting {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
    let mut seen = Vec::new();
    for _ in 0..3 {
        let generate = worker.generate().await;
        worker.done(&generate, 0).await;
        seen.push(generate.model);
    }
    seen.sort_unstable();
    assert_eq!(seen, ["", ":a", ":b"].map(|name| format!("{MODEL}{name}")));
    for answer in answers {
        assert_eq!(in_time(answer).await.unwrap().0, 200);
    }
}

#[tokio::test]
async fn a_worker_that_falls_silent_is_gone() {
    let gateway = gateway(&["--worker-timeout-seconds", "0.5"]).await;
    let mut first = gateway.worker("w-1").await;
    let answer = gateway.ask(json!({}));
    let generate = first.generate().await;
    first.speak(&generate, 0..1).await;
    first.fall_silent();
    assert_eq!(first.next().await.unwrap_err().code(), tonic::Code::Aborted);
    let mut second = gateway.worker("w-2").await;
    let resumed = second.generate().await;
    second.speak(&resumed, 1..2).await;
    second.done(&resumed, 2).await;
    let (status, body) = in_time(answer).await.unwrap();
    assert_eq!(status, 200);
    assert_eq!(body["choices"][0]["message"]["content"], text(0..2));
}

#[tokio::test]
async fn a_failed_answer_moves_to_another_worker_and_a_wrong_request_does_not() {
    let gateway = gateway(&[]).await;
    let mut first = gateway.worker("w-1").await;
    let mut second = gateway.worker("w-2").await;
    let fail = |request: &str, code: failure::Code| {
        FromWorker::Failure(Failure {
            request: request.into(),
            choice: 0,
            code: code.into(),
            message: "the prompt is too long".into(),
            reason: CONTEXT_LENGTH_EXCEEDED.into(),
        })
    };
    let answer = gateway.ask(json!({}));
    let generate = first.generate().await;
    first.send(fail(&generate.request, failure::Code::Internal)).await;
    let again = second.generate().await;
    assert_eq!(again.request, generate.request);
    second.send(fail(&again.request, failure::Code::Invalid)).await;
    let (status, body) = in_time(answer).await.unwrap();
    assert_eq!(status, 400);
    assert_eq!(body["error"]["message"], "the prompt is too long");
    assert_eq!(body["error"]["code"], "context_length_exceeded", "as OpenAI's clients know it");
}

#[tokio::test]
async fn an_overloaded_worker_is_asked_again() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker("w-1").await;
    let answer = gateway.ask(json!({}));
    let generate = worker.generate().await;
    let failure =
        Failure { request: generate.request.clone(), code: failure::Code::Overloaded.into(), ..Failure::default() };
    worker.send(FromWorker::Failure(failure)).await;
    assert!(matches!(worker.next().await.unwrap(), FromGateway::Cancel(_)));
    let again = worker.generate().await;
    assert_eq!(again.request, generate.request);
    worker.done(&again, 0).await;
    assert_eq!(in_time(answer).await.unwrap().0, 200);
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_worker() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker_with("w-1", |hello| hello.slots = 1).await;
    let stream = gateway.stream(json!({}));
    let generate = worker.generate().await;
    worker.speak(&generate, 0..1).await;
    let mut stream = stream.await.unwrap();
    stream.until(&text(0..1)).await;
    let waiting = gateway.ask(json!({}));
    drop(stream);
    let FromGateway::Cancel(cancel) = worker.next().await.unwrap() else {
        panic!("expected a cancel");
    };
    assert_eq!(cancel.request, generate.request);
    // Its slot goes to the one that waits.
    let next = worker.generate().await;
    worker.done(&next, 0).await;
    assert_eq!(in_time(waiting).await.unwrap().0, 200);
    assert!(gateway.metrics().await.contains("code=\"499\""));
}

#[tokio::test]
async fn a_draining_worker_gets_nothing_new() {
    let gateway = gateway(&[]).await;
    let first = gateway.worker("w-1").await;
    let mut second = gateway.worker("w-2").await;
    first.send(FromWorker::Draining(Draining { deadline_ms: 0 })).await;
    let registry = &gateway.running.gateway.registry;
    in_time(async {
        while registry.model(MODEL).unwrap().workers.len() > 1 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    for _ in 0..3 {
        let answer = gateway.ask(json!({}));
        let generate = second.generate().await;
        second.done(&generate, 0).await;
        assert_eq!(in_time(answer).await.unwrap().0, 200);
    }
}

#[tokio::test]
async fn streams_end_before_the_gateway_does() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker("w-1").await;
    let stream = gateway.stream(json!({}));
    let generate = worker.generate().await;
    worker.speak(&generate, 0..1).await;
    let mut stream = stream.await.unwrap();
    stream.until(&text(0..1)).await;

    let (metrics, draining) = (gateway.running.metrics, gateway.running.gateway.draining.clone());
    let stopping = tokio::spawn(gateway.running.stop());
    in_time(draining.cancelled()).await;
    let ready = reqwest::get(format!("http://{metrics}/readyz")).await.unwrap();
    assert_eq!(ready.status(), 503);
    worker.speak(&generate, 1..3).await;
    worker.done(&generate, 3).await;
    stream.read_to_end().await;
    assert_eq!(stream.text(), text(0..3));
    in_time(stopping).await.unwrap();
}

#[tokio::test]
async fn what_does_not_end_in_time_is_told_so_and_can_go_on_elsewhere() {
    let gateway = gateway(&["--drain-seconds", "0.2"]).await;
    let mut worker = gateway.worker("w-1").await;
    let stream = gateway.stream(json!({}));
    let generate = worker.generate().await;
    worker.speak(&generate, 0..1).await;
    let mut stream = stream.await.unwrap();
    stream.until(&text(0..1)).await;
    let stopping = tokio::spawn(gateway.running.stop());
    stream.read_to_end().await;
    assert_eq!(stream.events().last().unwrap()["error"]["code"], "shutting_down");
    let FromGateway::Cancel(cancel) = worker.next().await.unwrap() else {
        panic!("expected a cancel");
    };
    assert!(cancel.keep, "the worker remembers it for another gateway");
    in_time(stopping).await.unwrap();
}

#[tokio::test]
async fn a_worker_that_reports_but_sends_no_token_loses_the_stream() {
    let gateway = gateway(&["--stall-timeout-seconds", "0.4"]).await;
    let mut first = gateway.worker("w-1").await;
    let answer = gateway.ask(json!({}));
    let generate = first.generate().await;
    first.speak(&generate, 0..1).await;
    let mut second = gateway.worker("w-2").await;
    let resumed = second.generate().await;
    assert_eq!(resumed.generated, tokens(0..1));
    assert!(matches!(first.next().await.unwrap(), FromGateway::Cancel(_)));
    second.speak(&resumed, 1..2).await;
    second.done(&resumed, 2).await;
    let (status, body) = in_time(answer).await.unwrap();
    assert_eq!((status, &body["choices"][0]["message"]["content"]), (200, &json!(text(0..2))));
}

#[tokio::test]
async fn every_choice_moves_with_what_there_is_of_it() {
    let gateway = gateway(&[]).await;
    let mut first = gateway.worker("w-1").await;
    let answer = gateway.ask(json!({ "n": 2, "stop": ["never"] }));
    let begun = [first.generate().await, first.generate().await];
    for generate in &begun {
        first.speak(generate, 0..1 + generate.choice as usize).await;
    }
    let moved = |count: usize| format!("tokens_total{{model=\"team/chat\"}} {count}");
    in_time(async {
        while !gateway.metrics().await.contains(&moved(3)) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    drop(first);
    let mut second = gateway.worker("w-2").await;
    for _ in 0..2 {
        let resumed = second.generate().await;
        let have = 1 + resumed.choice as usize;
        assert_eq!(resumed.generated, tokens(0..have));
        assert_eq!(resumed.sampling, begun[resumed.choice as usize].sampling);
        second.speak(&resumed, have..3).await;
        second.done(&resumed, 3).await;
    }
    let (_, body) = in_time(answer).await.unwrap();
    for choice in 0..2 {
        assert_eq!(body["choices"][choice]["message"]["content"], text(0..3));
    }
}

#[tokio::test]
async fn a_stream_waits_for_a_model_that_has_no_worker_and_hears_of_it() {
    let gateway = gateway(&["--queue-timeout-seconds", "0.2"]).await;
    drop(gateway.worker("w-1").await);
    let registry = gateway.running.gateway.registry.clone();
    in_time(async {
        while !registry.model(MODEL).unwrap().workers.is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let (status, body) = in_time(gateway.ask(json!({}))).await.unwrap();
    assert_eq!((status, &body["error"]["code"]), (503, &json!("no_capacity")));
    let mut stream = in_time(gateway.stream(json!({}))).await.unwrap();
    while !stream.raw.contains(": waiting for a worker") {
        stream.more().await;
    }
    let mut worker = gateway.worker("w-2").await;
    let generate = worker.generate().await;
    worker.speak(&generate, 0..2).await;
    worker.done(&generate, 2).await;
    stream.read_to_end().await;
    assert_eq!(stream.text(), text(0..2));
}

#[tokio::test]
async fn a_worker_that_fails_again_and_again_is_left_out() {
    let gateway = gateway(&[]).await;
    let mut first = gateway.worker("w-1").await;
    let mut second = gateway.worker("w-2").await;
    for _ in 0..3 {
        let answer = gateway.ask(json!({}));
        let generate = first.generate().await;
        let failure =
            Failure { request: generate.request.clone(), code: failure::Code::Internal.into(), ..Failure::default() };
        first.send(FromWorker::Failure(failure)).await;
        assert!(matches!(first.next().await.unwrap(), FromGateway::Cancel(_)));
        let again = second.generate().await;
        second.done(&again, 0).await;
        assert_eq!(in_time(answer).await.unwrap().0, 200);
    }
    let answer = gateway.ask(json!({}));
    let generate = second.generate().await;
    second.done(&generate, 0).await;
    assert_eq!(in_time(answer).await.unwrap().0, 200);
    assert!(gateway.metrics().await.contains("vicuna_gateway_ejections_total 1"));
}

#[tokio::test]
async fn a_worker_that_is_here_already_is_refused_and_stays() {
    let gateway = gateway(&[]).await;
    let same = |hello: &mut WorkerHello| hello.instance = "i-1".into();
    let mut worker = gateway.worker_with("w-1", same).await;
    let refused = gateway.try_worker("w-1", same).await.err().unwrap();
    assert_eq!(refused.code(), tonic::Code::AlreadyExists);
    let answer = gateway.ask(json!({}));
    let generate = worker.generate().await;
    worker.done(&generate, 0).await;
    assert_eq!(in_time(answer).await.unwrap().0, 200);
}
