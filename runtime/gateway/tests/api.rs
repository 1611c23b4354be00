//! OpenAI's API: answers, errors, limits, and what the operator hears of it.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use serde_json::{Value, json};
use std::sync::Arc;
use support::{MODEL, chat, gateway, gateway_reporting, in_time, text, trust};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};
use vicuna_protocol::coordinator::load_reports_server::{LoadReports, LoadReportsServer};
use vicuna_protocol::coordinator::{LoadAck, LoadReport, ModelLoad};

#[tokio::test]
async fn choices_are_counted_together() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker("w-1").await;
    let answer = gateway.ask(json!({ "n": 2, "seed": 5 }));
    for _ in 0..2 {
        let generate = worker.generate().await;
        assert_eq!(generate.sampling.as_ref().unwrap().seed, 5);
        let length = 2 + generate.choice as usize;
        worker.speak(&generate, 0..length).await;
        worker.done(&generate, length as u32).await;
    }
    let (status, body) = in_time(answer).await.unwrap();
    assert_eq!(status, 200);
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["choices"][0]["message"]["content"], text(0..2));
    assert_eq!(body["choices"][1]["message"]["content"], text(0..3));
    let details = json!({ "cached_tokens": 0 });
    let usage =
        json!({ "prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "prompt_tokens_details": details });
    assert_eq!(body["usage"], usage);
}

#[tokio::test]
async fn completions_send_the_text_as_it_is() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker("w-1").await;
    let body = json!({ "model": MODEL, "prompt": "Once", "max_tokens": 3 });
    let answer = tokio::spawn(gateway.post("/v1/completions", body));
    let generate = worker.generate().await;
    assert_eq!(generate.prompt.as_deref(), Some("Once"));
    assert!(generate.messages.is_empty());
    worker.speak(&generate, 0..3).await;
    worker.done(&generate, 3).await;
    let answer = in_time(answer).await.unwrap();
    assert_eq!(answer.headers()["x-request-id"], generate.request.as_str());
    let body: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
    assert_eq!(body["object"], "text_completion");
    assert_eq!(body["choices"][0]["text"], text(0..3));
}

#[tokio::test]
async fn errors_have_openai_s_shape_and_say_what_to_do() {
    let gateway = gateway(&["--max-body-bytes", "2000"]).await;
    let _worker = gateway.worker("w-1").await;
    let status = async |path: &str, body: Value| {
        let response = gateway.post(path, body).await;
        let status = response.status().as_u16();
        let body: Value = serde_json::from_str(&response.text().await.unwrap()).unwrap();
        (status, body["error"].clone())
    };
    let path = "/v1/chat/completions";
    let (code, error) = status(path, chat(json!({ "model": "team/other" }))).await;
    assert_eq!((code, &error["code"], &error["param"]), (404, &json!("model_not_found"), &json!("model")));
    assert!(error["message"].as_str().unwrap().contains(MODEL), "{error}");
    let (code, error) = status(path, chat(json!({ "temperature": "hot" }))).await;
    assert_eq!((code, &error["param"]), (400, &json!("temperature")));
    let tool = json!({ "type": "function", "function": { "name": "f" } });
    let (code, error) = status(path, chat(json!({ "tools": [tool] }))).await;
    assert_eq!((code, &error["code"]), (400, &json!("unsupported_parameter")));
    let (code, error) = status(path, chat(json!({ "user": "x".repeat(3000) }))).await;
    assert_eq!((code, &error["code"]), (413, &json!("request_too_large")));
    assert_eq!(status("/v1/embeddings", json!({ "model": MODEL, "input": "x" })).await.0, 400);
    assert_eq!(status("/v1/edits", json!({})).await.0, 404);
    assert_eq!(gateway.get(path).await.0, 405);
}

#[tokio::test]
async fn models_are_those_that_workers_offer() {
    let gateway = gateway(&[]).await;
    assert_eq!(gateway.get("/v1/models").await.1["data"], json!([]));
    let _worker = gateway.worker("w-1").await;
    let (_, list) = gateway.get("/v1/models").await;
    assert_eq!(list["data"][0]["id"], MODEL);
    let (status, model) = gateway.get(&format!("/v1/models/{MODEL}")).await;
    assert_eq!((status, &model["owned_by"]), (200, &json!("team")));
    assert_eq!(gateway.get("/v1/models/team/other").await.0, 404);
    let page = reqwest::get(gateway.url("/")).await.unwrap();
    assert!(page.headers().contains_key("content-security-policy"));
    assert!(page.text().await.unwrap().contains("/ui/app.js"));
}

#[tokio::test]
async fn a_full_queue_is_429_and_no_worker_in_time_is_503() {
    let gateway = gateway(&["--max-queue", "1", "--queue-timeout-seconds", "0.4"]).await;
    let mut worker = gateway.worker_with("w-1", |hello| hello.slots = 1).await;
    let running = gateway.ask(json!({}));
    let generate = worker.generate().await;
    let waiting = gateway.ask(json!({}));
    let loads = gateway.running.gateway.loads.clone();
    in_time(async {
        while loads.demand(MODEL).queued < 1 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let response = gateway.post("/v1/chat/completions", chat(json!({}))).await;
    assert_eq!(response.status(), 429);
    assert!(response.headers().contains_key("retry-after"));
    let (status, body) = in_time(gateway.ask(json!({ "n": 2 }))).await.unwrap();
    assert_eq!((status, &body["error"]["param"]), (400, &json!("n")), "it would not fit into an empty queue");
    let (status, body) = in_time(waiting).await.unwrap();
    assert_eq!((status, &body["error"]["code"]), (503, &json!("no_capacity")));
    worker.done(&generate, 0).await;
    assert_eq!(in_time(running).await.unwrap().0, 200);
    assert_eq!(loads.unfinished(), 0);
}

#[tokio::test]
async fn what_requests_hold_is_bounded_in_bytes() {
    let gateway = gateway(&["--max-request-memory-mib", "1", "--stream-queue-timeout-seconds", "60"]).await;
    let mut worker = gateway.worker("w-1").await;
    let large = "x".repeat(200 << 10);
    let first = gateway.ask(json!({ "user": large }));
    let generate = worker.generate().await;
    let response = gateway.post("/v1/chat/completions", chat(json!({ "user": large }))).await;
    assert_eq!(response.status(), 429);
    assert!(response.headers().contains_key("retry-after"));
    let small = gateway.ask(json!({}));
    let other = worker.generate().await;
    worker.done(&other, 0).await;
    assert_eq!(in_time(small).await.unwrap().0, 200, "there is room for a small one");
    worker.done(&generate, 0).await;
    assert_eq!(in_time(first).await.unwrap().0, 200);
    assert_eq!(gateway.running.gateway.memory.used(), 0);
}

#[tokio::test]
async fn a_worker_without_a_fitting_token_is_refused() {
    let gateway = gateway(&[]).await;
    let hello = || vicuna_protocol::inference::WorkerHello {
        worker: "w".into(),
        slots: 1,
        models: vec![vicuna_protocol::inference::ModelOffer {
            name: MODEL.into(),
            max_length: 8,
            ..Default::default()
        }],
        ..Default::default()
    };
    let other_audience = gateway.trust.token("vicuna-coordinator", "team", "w");
    let refused = gateway.attach(other_audience, hello()).await.err().unwrap();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    let other_namespace = gateway.trust.token("vicuna-gateway", "rival", "w");
    let mut attached = gateway.attach(other_namespace, hello()).await.unwrap();
    assert_eq!(attached.next().await.unwrap_err().code(), tonic::Code::PermissionDenied);
    assert_eq!(gateway.get("/v1/models").await.1["data"], json!([]));
}

/// Hears reports, and says which models there are.
struct Operator(mpsc::Sender<LoadReport>);

const AT_ZERO: &str = "team/asleep";

#[tonic::async_trait]
impl LoadReports for Operator {
    type ReportStream = ReceiverStream<Result<LoadAck, Status>>;

    async fn report(&self, request: Request<Streaming<LoadReport>>) -> Result<Response<Self::ReportStream>, Status> {
        assert!(request.metadata().contains_key("authorization"));
        let (reports, mut inbound) = (self.0.clone(), request.into_inner());
        let (acks, outbound) = mpsc::channel(1);
        tokio::spawn(async move {
            while let Ok(Some(report)) = inbound.message().await {
                let heard = reports.send(report).await.is_ok();
                if !heard || acks.send(Ok(LoadAck { models: vec![AT_ZERO.into()] })).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(outbound)))
    }
}

#[tokio::test]
async fn the_operator_hears_of_each_request_once() {
    let trust = trust();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let (reports, mut heard) = mpsc::channel(16);
    let read = |name: &str| std::fs::read(trust.path(name)).unwrap();
    let identity = Identity::from_pem(read("tls.crt"), read("tls.key"));
    let server = Server::builder()
        .tls_config(ServerTlsConfig::new().identity(identity))
        .unwrap()
        .add_service(LoadReportsServer::new(Operator(reports)))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    trust.token("vicuna-coordinator", "vicuna-system", "gateway-0");
    let token = trust.path("vicuna-coordinator.vicuna-system.gateway-0.token").display().to_string();
    let gateway = gateway_reporting(trust, &["--operator", &url, "--operator-token-file", &token]).await;

    let mut worker = gateway.worker_with("w-1", |hello| hello.slots = 2).await;
    let both = [gateway.ask(json!({ "n": 2 })), gateway.ask(json!({}))];
    let begun = [worker.generate().await, worker.generate().await];
    let mut until = async |expected: &dyn Fn(&ModelLoad) -> bool| -> Arc<ModelLoad> {
        loop {
            let report = in_time(heard.recv()).await.unwrap();
            assert_eq!(report.gateway, "gateway-0");
            if let Some(load) = report.models.into_iter().find(|load| expected(load)) {
                return Arc::new(load);
            }
        }
    };
    let load = until(&|load| load.unfinished == 2).await;
    assert_eq!((load.model.as_str(), load.queued), (MODEL, 1));
    assert_eq!(load.workers, ["w-1"]);
    for generate in &begun {
        worker.done(generate, 0).await;
    }
    let last = worker.generate().await;
    worker.done(&last, 0).await;
    for answer in both {
        assert_eq!(in_time(answer).await.unwrap().0, 200);
    }
    let load = until(&|load| load.model == MODEL && load.unfinished == 0).await;
    assert_eq!(load.queued, 0);

    // A model that never had a worker: a request waits, the operator hears of it and starts one.
    until(&|load| load.model == AT_ZERO).await;
    let asleep = tokio::spawn(gateway.post("/v1/chat/completions", chat(json!({ "model": AT_ZERO }))));
    let load = until(&|load| load.model == AT_ZERO && load.unfinished == 1).await;
    assert_eq!((load.queued, load.workers.len()), (1, 0));
    let mut woken = gateway.worker_with("w-2", |hello| hello.models[0].name = AT_ZERO.into()).await;
    let generate = woken.generate().await;
    woken.done(&generate, 0).await;
    assert_eq!(in_time(asleep).await.unwrap().status(), 200);
}
