//! What dashboards and autoscalers hear of waiting, cold starts, moves and routing.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use serde_json::json;
use support::{TestGateway, gateway, in_time};

/// Reads metrics on until they hold this line.
async fn until_told(gateway: &TestGateway, line: &str) {
    in_time(async {
        while !gateway.metrics().await.lines().any(|told| told == line) {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_waits_for_a_model_is_told_in_vllm_s_words_and_how_long_it_did() {
    let gateway = gateway(&[]).await;
    drop(gateway.worker("w-0").await);
    until_told(&gateway, "vicuna_gateway_workers 0").await;
    let answer = gateway.ask(json!({}));
    until_told(&gateway, r#"vllm:num_requests_waiting{model_name="team/chat"} 1"#).await;
    let mut worker = gateway.worker("w-1").await;
    let generate = worker.generate().await;
    until_told(&gateway, r#"vllm:num_requests_waiting{model_name="team/chat"} 0"#).await;
    worker.speak(&generate, 0..1).await;
    worker.done(&generate, 1).await;
    assert_eq!(in_time(answer).await.unwrap().0, 200);
    let answer = gateway.ask(json!({}));
    let generate = worker.generate().await;
    worker.speak(&generate, 0..1).await;
    worker.done(&generate, 1).await;
    assert_eq!(in_time(answer).await.unwrap().0, 200);
    until_told(&gateway, r#"vicuna_gateway_queue_seconds_count{model="team/chat"} 2"#).await;
    until_told(&gateway, r#"vicuna_gateway_cold_start_seconds_count{model="team/chat"} 1"#).await;
}

#[tokio::test]
async fn who_waits_for_a_busy_worker_does_not_wait_for_a_cold_start() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker_with("w-1", |hello| hello.slots = 1).await;
    let answers = [gateway.ask(json!({})), gateway.ask(json!({}))];
    until_told(&gateway, r#"vicuna_gateway_queued{model="team/chat"} 1"#).await;
    for _ in 0..2 {
        let generate = worker.generate().await;
        worker.speak(&generate, 0..1).await;
        worker.done(&generate, 1).await;
    }
    for answer in answers {
        assert_eq!(in_time(answer).await.unwrap().0, 200);
    }
    until_told(&gateway, r#"vicuna_gateway_queue_seconds_count{model="team/chat"} 2"#).await;
    assert!(!gateway.metrics().await.contains("vicuna_gateway_cold_start_seconds_count"));
}

#[tokio::test]
async fn the_gap_of_a_move_and_the_favourites_of_a_policy_are_counted() {
    let gateway = gateway(&["--routing", "prefix-affinity"]).await;
    let mut first = gateway.worker("w-1").await;
    let stream = gateway.stream(json!({}));
    let generate = first.generate().await;
    first.speak(&generate, 0..1).await;
    let mut stream = stream.await.unwrap();
    stream.until("w0").await;
    until_told(&gateway, r#"vicuna_gateway_routed_total{policy="prefix-affinity",worker="favourite"} 1"#).await;
    drop(first);
    let mut second = gateway.worker("w-2").await;
    let generate = second.generate().await;
    second.speak(&generate, 1..2).await;
    second.done(&generate, 2).await;
    stream.read_to_end().await;
    until_told(&gateway, r#"vicuna_gateway_resume_gap_seconds_count{model="team/chat"} 1"#).await;
    until_told(&gateway, r#"vicuna_gateway_routed_total{policy="prefix-affinity",worker="favourite"} 2"#).await;
}
