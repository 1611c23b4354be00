//! TLS, and clients that hold what they do not use.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use axum::body::Body;
use axum::http::Request;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use std::time::Duration;
use support::{MODEL, TestGateway, chat, gateway, gateway_reporting, in_time, text, trust};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use vicuna_protocol::inference::Cancel;
use vicuna_protocol::inference::gateway_message::Body as FromGateway;

async fn connect(gateway: &TestGateway) -> TcpStream {
    TcpStream::connect(gateway.running.http).await.unwrap()
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_without_a_restart() {
    let gateway = gateway(&[]).await;
    let _before = gateway.worker("w-1").await;
    gateway.trust.renew();
    // Workers trust the new CA at once; the gateway looks at its files every few seconds.
    let after = in_time(async {
        loop {
            if let Ok(worker) = gateway.try_worker("w-2", |_| ()).await {
                return worker;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    after.await;
    let workers = gateway.running.gateway.registry.model(MODEL).unwrap().workers;
    assert_eq!(workers, ["w-1", "w-2"], "connections that are there stay");
}

#[tokio::test]
async fn clients_are_served_over_https_where_there_is_a_certificate_for_them() {
    let trust = trust();
    let (cert, key) = (trust.path("tls.crt"), trust.path("tls.key"));
    let (cert, key) = (cert.display().to_string(), key.display().to_string());
    let gateway = gateway_reporting(trust, &["--https-cert", &cert, "--https-key", &key]).await;
    let address = gateway.running.http;
    let ca = reqwest::Certificate::from_pem(&std::fs::read(gateway.trust.path("ca.crt")).unwrap()).unwrap();
    let client = reqwest::Client::builder().tls_certs_only([ca]).resolve("vicuna-gateway", address).build().unwrap();
    let url = format!("https://vicuna-gateway:{}/v1/models", address.port());
    assert_eq!(in_time(client.get(&url).send()).await.unwrap().status(), 200);
    let plain = reqwest::get(format!("http://{address}/v1/models")).await;
    assert!(plain.is_err(), "no HTTP where there is HTTPS");
}

#[tokio::test]
async fn a_client_that_does_not_finish_its_headers_is_closed() {
    let gateway = gateway(&["--header-timeout-seconds", "0.3"]).await;
    for begun in ["", "P", "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"] {
        let mut client = connect(&gateway).await;
        client.write_all(begun.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        in_time(client.read_to_end(&mut answer)).await.unwrap_or_default();
        assert!(!String::from_utf8_lossy(&answer).contains("200 OK"), "{begun:?}");
    }
}

#[tokio::test]
async fn connections_over_the_bound_wait_for_others_to_end() {
    let gateway = gateway(&["--max-connections", "1"]).await;
    let mut first = connect(&gateway).await;
    // Once it is answered it has the only place.
    first.write_all(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    in_time(first.read_u8()).await.unwrap();
    let url = gateway.url("/v1/models");
    let second = tokio::spawn(async move { reqwest::get(url).await.unwrap().status() });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!second.is_finished());
    drop(first);
    assert_eq!(in_time(second).await.unwrap(), 200);
}

#[tokio::test]
async fn too_many_headers_are_refused() {
    let gateway = gateway(&[]).await;
    let mut client = connect(&gateway).await;
    let headers: String = (0..200).map(|index| format!("x-{index}: y\r\n")).collect();
    client.write_all(format!("GET / HTTP/1.1\r\nhost: x\r\n{headers}\r\n").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    in_time(client.read_to_end(&mut answer)).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 431"), "{}", String::from_utf8_lossy(&answer));
}

#[tokio::test]
async fn a_client_that_does_not_read_is_given_up() {
    let gateway = gateway(&["--write-timeout-seconds", "0.3"]).await;
    let mut worker = gateway.worker_with("w-1", |hello| hello.models[0].max_length = 1 << 20).await;
    let mut client = connect(&gateway).await;
    let body = chat(json!({ "stream": true })).to_string();
    let length = body.len();
    let request = format!("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n{body}");
    client.write_all(request.as_bytes()).await.unwrap();
    let generate = worker.generate().await;
    // More than the kernel keeps for both sides.
    let megabyte = "x".repeat(1 << 20);
    for position in 0..32 {
        worker.say(&generate, position, &megabyte).await;
    }
    let FromGateway::Cancel(Cancel { request, .. }) = worker.next().await.unwrap() else {
        panic!("expected a cancel");
    };
    assert_eq!(request, generate.request);
}

#[tokio::test]
async fn a_stream_of_http_2_that_is_not_read_is_given_up_and_its_connection_is_not() {
    let gateway = gateway(&["--write-timeout-seconds", "0.3"]).await;
    let mut worker = gateway.worker_with("w-1", |hello| hello.models[0].max_length = 1 << 20).await;
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http::<Body>();
    let ask = |extra: Value| {
        let request = Request::post(gateway.url("/v1/chat/completions")).body(Body::from(chat(extra).to_string()));
        client.request(request.unwrap())
    };
    let unread = tokio::spawn(ask(json!({ "stream": true })));
    let generate = worker.generate().await;
    // More than a client of HTTP/2 takes without reading.
    let piece = "x".repeat(1 << 18);
    for position in 0..32 {
        worker.say(&generate, position, &piece).await;
    }
    let unread = in_time(unread).await.unwrap().unwrap();
    let FromGateway::Cancel(Cancel { request, .. }) = worker.next().await.unwrap() else {
        panic!("expected a cancel");
    };
    assert_eq!(request, generate.request);
    let (loads, memory) = (gateway.running.gateway.loads.clone(), gateway.running.gateway.memory.clone());
    in_time(async {
        while loads.unfinished() > 0 || memory.used() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let other = tokio::spawn(ask(json!({})));
    let generate = worker.generate().await;
    worker.done(&generate, 0).await;
    assert_eq!(in_time(other).await.unwrap().unwrap().status(), 200);
    drop(unread);
}

#[tokio::test]
async fn a_stream_may_last_longer_than_headers_and_writes_may_take() {
    let gateway = gateway(&["--header-timeout-seconds", "0.2", "--write-timeout-seconds", "0.2"]).await;
    let mut worker = gateway.worker("w-1").await;
    let stream = gateway.stream(json!({}));
    let generate = worker.generate().await;
    worker.speak(&generate, 0..1).await;
    let mut stream = stream.await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    worker.speak(&generate, 1..2).await;
    worker.done(&generate, 2).await;
    stream.read_to_end().await;
    assert_eq!(stream.text(), text(0..2));
}
