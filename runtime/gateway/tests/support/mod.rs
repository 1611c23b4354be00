//! A gateway on free ports, workers that a test plays, and clients.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod trust;

use clap::Parser;
use futures::StreamExt;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Status, Streaming};
use vicuna_gateway::config::Config;
use vicuna_gateway::gateway::{self, Running};
use vicuna_protocol::auth::TokenFile;
use vicuna_protocol::inference::gateway_message::Body as FromGateway;
use vicuna_protocol::inference::worker_message::Body as FromWorker;
use vicuna_protocol::inference::workers_client::WorkersClient;
use vicuna_protocol::inference::{
    Batch, Delta, Done, GatewayMessage, Generate, Load, ModelOffer, TokenLogprob, WorkerHello, WorkerMessage,
};
use vicuna_protocol::tls;

/// Nothing here takes longer, unless it hangs.
const DEADLINE: Duration = Duration::from_secs(60);
pub const MODEL: &str = "team/chat";

pub use trust::Trust;

pub async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("in time")
}

pub struct TestGateway {
    pub running: Running,
    pub trust: Arc<Trust>,
}

pub async fn gateway(flags: &[&str]) -> TestGateway {
    gateway_reporting(Trust::new(), flags).await
}

pub fn trust() -> Trust {
    Trust::new()
}

/// Another with the same certificates, whose tokens are signed with a key of its own.
pub fn trust_like(trust: &Trust) -> Arc<Trust> {
    Arc::new(trust.with_own_key())
}

pub async fn gateway_reporting(trust: Trust, flags: &[&str]) -> TestGateway {
    gateway_of(Arc::new(trust), flags).await
}

/// One that trusts what the others with this trust do.
pub async fn gateway_of(trust: Arc<Trust>, flags: &[&str]) -> TestGateway {
    let text = |name: &str| trust.path(name).display().to_string();
    let (cert, key, folder) = (text("tls.crt"), text("tls.key"), text(""));
    let free = "127.0.0.1:0";
    let mut arguments = vec![
        "gateway",
        "--name",
        "gateway-0",
        "--listen",
        free,
        "--workers-listen",
        free,
        "--metrics",
        free,
        "--tls-cert",
        &cert,
        "--tls-key",
        &key,
        "--trust-dir",
        &folder,
    ];
    arguments.extend_from_slice(flags);
    let config = Config::parse_from(arguments);
    let running = gateway::start(&config).await.unwrap();
    TestGateway { running, trust }
}

impl TestGateway {
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.running.http)
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        answer(reqwest::get(self.url(path)).await.unwrap()).await
    }

    pub async fn metrics(&self) -> String {
        let url = format!("http://{}/metrics", self.running.metrics);
        reqwest::get(url).await.unwrap().text().await.unwrap()
    }

    /// As somebody with an API key.
    pub async fn ask_as(&self, key: &str, method: reqwest::Method, path: &str, body: Value) -> reqwest::Response {
        let request = reqwest::Client::new().request(method, self.url(path));
        let request = request.header("authorization", format!("Bearer {key}")).body(body.to_string());
        in_time(request.send()).await.unwrap()
    }

    pub fn post(&self, path: &str, body: Value) -> impl Future<Output = reqwest::Response> + use<> {
        let request = reqwest::Client::new().post(self.url(path));
        let request = request.header("content-type", "application/json").body(body.to_string());
        async move { in_time(request.send()).await.unwrap() }
    }

    /// A chat request with these headers, in the background: status and body once it has ended.
    pub fn ask_with(&self, headers: &[(&'static str, String)], extra: Value) -> AbortOnDropHandle<(u16, Value)> {
        let mut request = reqwest::Client::new().post(self.url("/v1/chat/completions")).body(chat(extra).to_string());
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let response = async move { in_time(request.send()).await.unwrap() };
        AbortOnDropHandle::new(tokio::spawn(async move { answer(response.await).await }))
    }

    /// A streamed chat request with these headers, in the background.
    pub fn stream_with(&self, headers: &[(&'static str, String)], extra: Value) -> AbortOnDropHandle<Stream> {
        let mut body = chat(extra);
        body["stream"] = json!(true);
        let mut request = reqwest::Client::new().post(self.url("/v1/chat/completions")).body(body.to_string());
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let response = async move { in_time(request.send()).await.unwrap() };
        AbortOnDropHandle::new(tokio::spawn(async move { Stream::new(response.await) }))
    }

    /// A chat request in the background: status and body once it has ended.
    pub fn ask(&self, extra: Value) -> AbortOnDropHandle<(u16, Value)> {
        let response = self.post("/v1/chat/completions", chat(extra));
        AbortOnDropHandle::new(tokio::spawn(async move { answer(response.await).await }))
    }

    /// A streamed chat request in the background.
    pub fn stream(&self, extra: Value) -> AbortOnDropHandle<Stream> {
        let mut body = chat(extra);
        body["stream"] = json!(true);
        body["stream_options"] = json!({ "include_usage": true });
        let response = self.post("/v1/chat/completions", body);
        AbortOnDropHandle::new(tokio::spawn(async move { Stream::new(response.await) }))
    }

    pub async fn worker(&self, name: &str) -> Worker {
        self.worker_with(name, |_| ()).await
    }

    pub async fn worker_with(&self, name: &str, change: impl FnOnce(&mut WorkerHello)) -> Worker {
        self.try_worker(name, change).await.unwrap()
    }

    pub async fn try_worker(&self, name: &str, change: impl FnOnce(&mut WorkerHello)) -> Result<Worker, Status> {
        let mut hello = WorkerHello {
            worker: name.into(),
            node: "node".into(),
            capacity: "Spot".into(),
            models: vec![ModelOffer {
                name: MODEL.into(),
                weights_digest: "digest-a".into(),
                template: "chatml".into(),
                max_length: 64,
                ..ModelOffer::default()
            }],
            slots: 4,
            ..WorkerHello::default()
        };
        change(&mut hello);
        let token = self.trust.token("vicuna-gateway", "team", name);
        self.welcomed(token, hello).await
    }

    /// A worker outside the cluster, with a token of no pod.
    pub async fn external_worker(&self, name: &str) -> Worker {
        let offer = ModelOffer { name: MODEL.into(), max_length: 64, ..ModelOffer::default() };
        let hello = WorkerHello {
            worker: name.into(),
            models: vec![offer],
            slots: 4,
            instance: format!("instance of {name}"),
            ..WorkerHello::default()
        };
        self.welcomed(self.trust.external_token("team"), hello).await.unwrap()
    }

    async fn welcomed(&self, token: TokenFile, hello: WorkerHello) -> Result<Worker, Status> {
        let name = hello.worker.clone();
        let mut worker = self.attach(token, hello).await?;
        assert!(matches!(worker.next().await?, FromGateway::Welcome(_)));
        self.wait_for_worker(&name).await;
        Ok(worker)
    }

    /// The welcome is sent just before the worker is entered.
    pub async fn wait_for_worker(&self, name: &str) {
        let registry = &self.running.gateway.registry;
        let attached = || registry.models().iter().any(|model| model.workers.iter().any(|worker| worker == name));
        in_time(async {
            while !attached() {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    pub async fn attach(&self, token: TokenFile, hello: WorkerHello) -> Result<Worker, Status> {
        let url = format!("https://127.0.0.1:{}", self.running.workers.port());
        let channel = tls::channel(&url, &self.trust.path("ca.crt"), "vicuna-gateway").unwrap();
        let (outbound, messages) = mpsc::channel(64);
        outbound.send(message(FromWorker::Hello(hello))).await.unwrap();
        let request = token.sign(Request::new(ReceiverStream::new(messages)))?;
        let inbound = in_time(WorkersClient::new(channel).attach(request)).await?.into_inner();
        let load = Arc::new(Mutex::new(Load { slots: 4, ..Load::default() }));
        let (heartbeat, reported) = (outbound.clone(), load.clone());
        let heartbeat = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(50));
            loop {
                ticks.tick().await;
                let load = *reported.lock();
                if heartbeat.send(message(FromWorker::Load(load))).await.is_err() {
                    return;
                }
            }
        });
        Ok(Worker { inbound, outbound, load, heartbeat: AbortOnDropHandle::new(heartbeat) })
    }
}

fn message(body: FromWorker) -> WorkerMessage {
    WorkerMessage { body: Some(body) }
}

pub fn spoken(generate: &Generate, range: std::ops::Range<usize>) -> FromWorker {
    FromWorker::Delta(Delta {
        request: generate.request.clone(),
        choice: generate.choice,
        position: range.start as u32,
        tokens: tokens(range.clone()),
        text: text(range),
        prompt_tokens: 7,
        ..Delta::default()
    })
}

pub fn ended(generate: &Generate, completion_tokens: u32) -> FromWorker {
    FromWorker::Done(Done {
        request: generate.request.clone(),
        choice: generate.choice,
        finish_reason: "stop".into(),
        prompt_tokens: 7,
        completion_tokens,
        ..Done::default()
    })
}

pub fn batch(bodies: impl IntoIterator<Item = FromWorker>) -> FromWorker {
    FromWorker::Batch(Batch { messages: bodies.into_iter().map(message).collect() })
}

pub fn chat(extra: Value) -> Value {
    let mut body = json!({ "model": MODEL, "messages": [{ "role": "user", "content": "Hi" }] });
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

async fn answer(response: reqwest::Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let text = in_time(response.text()).await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")))
}

/// A worker that the test plays. Its tokens are 100, 101 …, its text is "w0 w1 …". Dropped, its
/// connection breaks.
pub struct Worker {
    inbound: Streaming<GatewayMessage>,
    outbound: mpsc::Sender<WorkerMessage>,
    /// What it says of its load.
    pub load: Arc<Mutex<Load>>,
    heartbeat: AbortOnDropHandle<()>,
}

pub fn text(range: std::ops::Range<usize>) -> String {
    range.map(|index| format!("w{index} ")).collect()
}

pub fn tokens(range: std::ops::Range<usize>) -> Vec<u32> {
    range.map(|index| 100 + index as u32).collect()
}

/// The log probability of token `index` of an answer.
pub fn scored(index: usize) -> TokenLogprob {
    let bytes = text(index..index + 1).into_bytes();
    let top = TokenLogprob { token: 7, bytes: b"other".to_vec(), logprob: -2.0, top: Vec::new() };
    TokenLogprob { token: 100 + index as u32, bytes, logprob: -0.5, top: vec![top] }
}

impl Worker {
    pub async fn next(&mut self) -> Result<FromGateway, Status> {
        match in_time(self.inbound.message()).await? {
            Some(GatewayMessage { body: Some(body) }) => Ok(body),
            other => Err(Status::cancelled(format!("{other:?}"))),
        }
    }

    pub async fn generate(&mut self) -> Generate {
        match self.next().await.unwrap() {
            FromGateway::Generate(generate) => generate,
            other => panic!("{other:?}"),
        }
    }

    pub async fn send(&self, body: FromWorker) {
        self.outbound.send(message(body)).await.unwrap();
    }

    pub async fn speak(&self, generate: &Generate, range: std::ops::Range<usize>) {
        self.send(spoken(generate, range)).await;
    }

    pub async fn done(&self, generate: &Generate, completion_tokens: u32) {
        self.send(ended(generate, completion_tokens)).await;
    }

    /// Speaks with log probabilities: the token's, and one alternative.
    pub async fn speak_scored(&self, generate: &Generate, range: std::ops::Range<usize>) {
        let delta = Delta {
            request: generate.request.clone(),
            choice: generate.choice,
            position: range.start as u32,
            tokens: tokens(range.clone()),
            text: text(range.clone()),
            logprobs: range.map(scored).collect(),
            prompt_tokens: 7,
        };
        self.send(FromWorker::Delta(delta)).await;
    }

    /// Says text, whatever its tokens are.
    pub async fn say(&self, generate: &Generate, position: usize, text: &str) {
        let delta = Delta {
            request: generate.request.clone(),
            choice: generate.choice,
            position: position as u32,
            tokens: tokens(position..position + 1),
            text: text.to_owned(),
            ..Delta::default()
        };
        self.send(FromWorker::Delta(delta)).await;
    }

    /// Says nothing any more, but stays connected.
    pub fn fall_silent(&self) {
        self.heartbeat.abort();
    }
}

/// Server-sent events as they come.
pub struct Stream {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub worker: Option<String>,
    body: futures::stream::BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    /// Everything so far.
    pub raw: String,
}

impl Stream {
    pub fn new(response: reqwest::Response) -> Self {
        let worker = response.headers().get("x-vicuna-worker");
        Self {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            worker: worker.map(|worker| worker.to_str().unwrap().to_owned()),
            body: response.bytes_stream().boxed(),
            raw: String::new(),
        }
    }

    /// Reads what comes next.
    pub async fn more(&mut self) {
        let bytes = in_time(self.body.next()).await.expect("more to come").unwrap();
        self.raw.push_str(std::str::from_utf8(&bytes).unwrap());
    }

    /// Reads on until the text holds `expected`.
    pub async fn until(&mut self, expected: &str) {
        while !self.text().contains(expected) {
            self.more().await;
        }
    }

    pub async fn read_to_end(&mut self) {
        while let Some(bytes) = in_time(self.body.next()).await {
            self.raw.push_str(std::str::from_utf8(&bytes.unwrap()).unwrap());
        }
        // OpenAI's Python client fails on an event without data, a comment alone included.
        for event in self.raw.split_terminator("\n\n") {
            assert_eq!(event.lines().filter(|line| line.starts_with("data: ")).count(), 1, "{event:?}");
        }
    }

    pub fn events(&self) -> Vec<Value> {
        let data = self.raw.lines().filter_map(|line| line.strip_prefix("data: "));
        data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    /// The id of the last event, with which a client comes back.
    pub fn last_event_id(&self) -> String {
        let mut ids = self.raw.lines().filter_map(|line| line.strip_prefix("id: "));
        ids.next_back().unwrap().to_owned()
    }

    pub fn text(&self) -> String {
        let events = self.events();
        let parts = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
        parts.collect()
    }
}
