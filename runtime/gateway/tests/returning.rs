//! Clients that come back for the rest of a stream with `Last-Event-ID`, here or at another gateway.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use serde_json::json;
use support::{MODEL, TestGateway, Worker, gateway, in_time, text, tokens};
use vicuna_protocol::inference::gateway_message::Body as FromGateway;
use vicuna_protocol::inference::worker_message::Body as FromWorker;
use vicuna_protocol::inference::{Generate, Transcript, TranscriptChoice};

async fn kept_cancel(worker: &mut Worker) -> String {
    match worker.next().await.unwrap() {
        FromGateway::Cancel(cancel) => {
            assert!(cancel.keep, "the worker is to remember it");
            cancel.request
        }
        other => panic!("{other:?}"),
    }
}

/// Streams three tokens, then loses the client; tells the request and the id of the last event.
async fn broken_off(gateway: &TestGateway, worker: &mut Worker) -> (Generate, String) {
    let stream = gateway.stream(json!({}));
    let generate = worker.generate().await;
    worker.speak(&generate, 0..3).await;
    let mut stream = stream.await.unwrap();
    stream.until(&text(0..3)).await;
    (generate, stream.last_event_id())
}

#[tokio::test]
async fn a_client_gets_the_rest_and_nothing_twice() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker("w-1").await;
    let (generate, id) = broken_off(&gateway, &mut worker).await;
    assert_eq!(kept_cancel(&mut worker).await, generate.request);

    let stream = gateway.stream_with(&[("last-event-id", id)], json!({}));
    let again = worker.generate().await;
    assert_eq!((&again.request, &again.sampling), (&generate.request, &generate.sampling));
    assert_eq!(again.generated, tokens(0..3));
    worker.speak(&again, 3..5).await;
    worker.done(&again, 5).await;
    let mut stream = stream.await.unwrap();
    stream.read_to_end().await;
    assert_eq!(stream.text(), text(3..5));
    let roles = stream.events().iter().filter(|event| !event["choices"][0]["delta"]["role"].is_null()).count();
    assert_eq!(roles, 0, "the client has the opening already");
    assert!(gateway.metrics().await.contains("vicuna_gateway_returns_total 1"));
}

#[tokio::test]
async fn every_choice_goes_on_from_where_the_client_has_it() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker("w-1").await;
    let stream = gateway.stream(json!({ "n": 2 }));
    let first = worker.generate().await;
    let second = worker.generate().await;
    worker.speak(&first, 0..1).await;
    worker.done(&first, 1).await;
    worker.speak(&second, 0..2).await;
    let mut stream = stream.await.unwrap();
    while !stream.raw.contains("w1 ") || !stream.raw.contains("\"stop\"") {
        stream.more().await;
    }
    let id = stream.last_event_id();
    assert!(id.contains("1.3!") && id.contains("2.6"), "{id}");
    drop(stream);
    kept_cancel(&mut worker).await;

    let stream = gateway.stream_with(&[("last-event-id", id)], json!({ "n": 2 }));
    let again = worker.generate().await;
    assert_eq!((again.choice, again.generated.len()), (second.choice, 2));
    worker.speak(&again, 2..3).await;
    worker.done(&again, 3).await;
    let mut stream = stream.await.unwrap();
    stream.read_to_end().await;
    let events = stream.events();
    let texts: Vec<_> = events
        .iter()
        .filter_map(|event| {
            Some((event["choices"][0]["index"].as_u64()?, event["choices"][0]["delta"]["content"].as_str()?))
        })
        .collect();
    assert_eq!(texts, [(u64::from(second.choice), "w2 ")]);
    let ends = events.iter().filter(|event| event["choices"][0]["finish_reason"] == "stop").count();
    assert_eq!(ends, 1, "the end of the first is known already");
}

#[tokio::test]
async fn another_gateway_asks_the_workers_what_they_remember() {
    let first = gateway(&[]).await;
    let mut worker = first.worker("w-1").await;
    let (generate, id) = broken_off(&first, &mut worker).await;
    drop(first);

    let second = gateway(&[]).await;
    let mut worker = second.worker("w-1").await;
    let stream = second.stream_with(&[("last-event-id", id)], json!({}));
    let FromGateway::TranscriptOf(question) = worker.next().await.unwrap() else {
        panic!("expected a question");
    };
    assert_eq!(question.request, generate.request);
    // The worker was a token ahead of the client.
    let known = TranscriptChoice {
        generate: Some(generate.clone()),
        tokens: tokens(0..4),
        text: text(0..4),
        ..TranscriptChoice::default()
    };
    let transcript = Transcript { request: question.request, choices: vec![known] };
    worker.send(FromWorker::Transcript(transcript)).await;
    let again = worker.generate().await;
    assert_eq!((&again.request, &again.messages), (&generate.request, &generate.messages));
    assert_eq!((again.generated.clone(), &again.sampling), (tokens(0..4), &generate.sampling));
    worker.speak(&again, 4..6).await;
    worker.done(&again, 6).await;
    let mut stream = stream.await.unwrap();
    stream.read_to_end().await;
    assert_eq!(stream.text(), text(3..6));
}

#[tokio::test]
async fn what_nobody_remembers_is_told_so() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker("w-1").await;
    let id = "chatcmpl-0:3.9".to_owned();
    let stream = gateway.stream_with(&[("last-event-id", id)], json!({}));
    let FromGateway::TranscriptOf(question) = worker.next().await.unwrap() else {
        panic!("expected a question");
    };
    worker.send(FromWorker::Transcript(Transcript { request: question.request, choices: Vec::new() })).await;
    let mut stream = stream.await.unwrap();
    assert_eq!(stream.status, 404);
    stream.more().await;
    assert!(stream.raw.contains("unknown_stream"), "{}", stream.raw);
    let wrong = gateway.stream_with(&[("last-event-id", "nonsense".to_owned())], json!({ "model": MODEL }));
    assert_eq!(wrong.await.unwrap().status, 404);
}

/// The ids of a stream's events.
fn ids(raw: &str) -> Vec<String> {
    raw.lines().filter_map(|line| line.strip_prefix("id: ")).map(str::to_owned).collect()
}

#[tokio::test]
async fn what_comes_before_the_text_is_not_told_again() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker("w-1").await;
    let body = json!({ "model": MODEL, "prompt": "Once ", "echo": true, "stream": true });
    let response = tokio::spawn(gateway.post("/v1/completions", body.clone()));
    let generate = worker.generate().await;
    worker.speak(&generate, 0..2).await;
    let mut response = response.await.unwrap();
    let raw = String::from_utf8(in_time(response.chunk()).await.unwrap().unwrap().to_vec()).unwrap();
    assert!(raw.contains("Once "), "{raw}");
    drop(response);
    kept_cancel(&mut worker).await;

    let request = reqwest::Client::new().post(gateway.url("/v1/completions")).header("last-event-id", &ids(&raw)[0]);
    let response = tokio::spawn(request.body(body.to_string()).send());
    let again = worker.generate().await;
    worker.done(&again, 2).await;
    let raw = in_time(response.await.unwrap().unwrap().text()).await.unwrap();
    assert!(raw.contains(&text(0..2)) && !raw.contains("Once "), "{raw}");
}

#[tokio::test]
async fn no_position_lies_between_a_text_and_the_call_behind_it() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker_with("w-1", |hello| hello.models[0].tool_dialect = "hermes".into()).await;
    let tools = json!([{ "type": "function", "function": { "name": "weather" } }]);
    let said = "I look. <tool_call>{\"name\":\"weather\",\"arguments\":{}}</tool_call>";
    let stream = gateway.stream(json!({ "tools": tools.clone() }));
    let generate = worker.generate().await;
    worker.say(&generate, 0, said).await;
    let mut stream = stream.await.unwrap();
    stream.until("I look.").await;
    let all = ids(&stream.raw);
    drop(stream);
    kept_cancel(&mut worker).await;
    let told = all.iter().position(|id| !id.ends_with('+')).unwrap();

    // From before the text all of it comes, and behind it nothing is missing.
    for (id, calls) in [(&all[told - 1], 1), (&all[told], 0)] {
        let stream = gateway.stream_with(&[("last-event-id", id.clone())], json!({ "tools": tools.clone() }));
        let again = worker.generate().await;
        let mut stream = stream.await.unwrap();
        if calls > 0 {
            stream.until("I look.").await;
            assert_eq!(stream.raw.matches("\"weather\"").count(), calls, "{}", stream.raw);
            drop(stream);
            kept_cancel(&mut worker).await;
        } else {
            worker.done(&again, 1).await;
            stream.read_to_end().await;
            assert_eq!((stream.raw.matches("\"weather\"").count(), stream.text().as_str()), (calls, ""));
            assert!(stream.raw.contains("\"tool_calls\""), "{}", stream.raw);
        }
    }
}

#[tokio::test]
async fn a_client_takes_its_stream_over_from_a_connection_that_still_lives() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker("w-1").await;
    let old = gateway.stream(json!({}));
    let generate = worker.generate().await;
    worker.speak(&generate, 0..3).await;
    let mut old = old.await.unwrap();
    old.until(&text(0..3)).await;
    let id = old.last_event_id();

    let new = gateway.stream_with(&[("last-event-id", id)], json!({}));
    old.read_to_end().await;
    assert!(old.raw.contains("\"taken_over\""), "{}", old.raw);
    worker.speak(&generate, 3..5).await;
    let mut new = new.await.unwrap();
    worker.done(&generate, 5).await;
    new.read_to_end().await;
    assert_eq!((new.text(), old.text()), (text(3..5), text(0..3)), "the worker was not even asked again");
    let metrics = gateway.metrics().await;
    assert!(metrics.contains("vicuna_gateway_returns_total 1"), "{metrics}");
    assert!(metrics.contains("vicuna_gateway_requests_total{code=\"200\",model=\"team/chat\"} 1"), "it is one request");
}
