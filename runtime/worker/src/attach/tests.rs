//! A worker against a gateway in the same process, over a real connection.

use super::*;
use crate::metrics::Metrics;
use crate::model::Files;
use crate::on_request::Loader;
use crate::options::Options;
use crate::scheduler::Scheduler;
use clap::Parser;
use std::collections::{BTreeSet, VecDeque};
use std::pin::Pin;
use tokio_stream::Stream as TokioStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Response;
use vicuna_protocol::inference::failure::Code;
use vicuna_protocol::inference::workers_server::{Workers, WorkersServer};
use vicuna_protocol::inference::{CONTEXT_LENGTH_EXCEEDED, LoadModel, Message, Sampling, TranscriptOf, WorkerMessage};

const WAIT: Duration = Duration::from_secs(20);

/// One attached worker, as the gateway sees it.
struct Attached {
    from_worker: Streaming<WorkerMessage>,
    /// Of a batch, what is not looked at yet.
    batch: VecDeque<Body>,
    to_worker: mpsc::Sender<Result<GatewayMessage, Status>>,
}

struct FakeGateway(mpsc::Sender<Attached>);

#[tonic::async_trait]
impl Workers for FakeGateway {
    type AttachStream = Pin<Box<dyn TokioStream<Item = Result<GatewayMessage, Status>> + Send>>;

    async fn attach(&self, request: Request<Streaming<WorkerMessage>>) -> Result<Response<Self::AttachStream>, Status> {
        if request.metadata().get("authorization").is_none_or(|value| value != "Bearer secret") {
            return Err(Status::unauthenticated("no token"));
        }
        let (to_worker, messages) = mpsc::channel(16);
        let attached = Attached { from_worker: request.into_inner(), batch: VecDeque::new(), to_worker };
        self.0.send(attached).await.map_err(|_| Status::unavailable("gone"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }
}

impl Attached {
    async fn send(&self, body: FromGateway) {
        self.to_worker.send(Ok(GatewayMessage { body: Some(body) })).await.unwrap();
    }

    async fn receive(&mut self) -> Option<Body> {
        let message = tokio::time::timeout(WAIT, self.from_worker.message()).await.expect("no message in time");
        message.unwrap().map(|message| message.body.unwrap())
    }

    /// The next message that is not Load.
    async fn next(&mut self) -> Body {
        loop {
            let body = match self.batch.pop_front() {
                Some(body) => body,
                None => self.receive().await.expect("the worker closed its stream"),
            };
            match body {
                Body::Load(_) | Body::Progress(_) => {}
                Body::Batch(batch) => {
                    self.batch = batch.messages.into_iter().filter_map(|message| message.body).collect()
                }
                other => return other,
            }
        }
    }
}

struct Setup {
    workers: mpsc::Receiver<Attached>,
    health: Arc<Health>,
    draining: watch::Sender<Option<u64>>,
    closing: CancellationToken,
    running: tokio::task::JoinHandle<()>,
    _files: tempfile::TempDir,
}

async fn set_up() -> Setup {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, workers) = mpsc::channel(4);
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let server = tonic::transport::Server::builder().add_service(WorkersServer::new(FakeGateway(sender)));
    tokio::spawn(server.serve_with_incoming(incoming));
    let files = tempfile::tempdir().unwrap();
    let (shared, draining) = shared(&url, files.path());
    let (health, closing) = (shared.health.clone(), shared.closing.clone());
    let running = tokio::spawn(run(Arc::new(shared)));
    Setup { workers, health, draining, closing, running, _files: files }
}

fn shared(url: &str, folder: &std::path::Path) -> (Shared, watch::Sender<Option<u64>>) {
    let token = folder.join("token");
    std::fs::write(&token, "secret\n").unwrap();
    let model = vicuna_model::tiny::tiny(2);
    let path = folder.join("model");
    vicuna_model::save(&path, &model.config, &model.tensors, &model.tokenizer, model.chat_template.as_deref()).unwrap();
    let arguments = ["worker", "--model-name", "default/tiny", "--model-uri", "file:///unused", "--gateway", url];
    let options = Options::parse_from(arguments);
    let adapters = [("default/tiny:a", 5), ("default/tiny:b", 6)].map(|(name, seed)| {
        let path = folder.join(format!("adapter-{seed}"));
        vicuna_model::tiny::save_adapter(&path, seed, 4, &["all-linear"]).unwrap();
        (name.to_owned(), path)
    });
    let files = Files { model: path, base: None, adapters: adapters.into() };
    let served = crate::model::load("default/tiny", &files, &options, tch::Device::Cpu).unwrap();
    let metrics = Metrics::new().unwrap();
    let tokens = metrics.tokens.clone();
    let (scheduler, handle) = Scheduler::new("default/tiny", served.engine, 2, metrics);
    std::thread::spawn(move || scheduler.run());
    let (draining, deadline) = watch::channel(None);
    let health = Arc::new(Health::new(folder.join("none")));
    health.serving();
    let gateways =
        Gateways { url: url.to_owned(), server_name: String::new(), ca: None, token: TokenFile::new(&token) };
    let (models, _) = Models::new();
    models.enter(served.models, handle).unwrap();
    let hello = WorkerHello { worker: "w".into(), slots: 2, ..WorkerHello::default() };
    let shared = Shared {
        gateways,
        hello,
        models: Arc::new(models),
        health,
        tokens,
        draining: deadline,
        closing: CancellationToken::new(),
    };
    (shared, draining)
}

fn question(request: &str, model: &str, max_tokens: u32) -> FromGateway {
    FromGateway::Generate(Generate {
        request: request.into(),
        model: model.into(),
        messages: vec![Message { role: "user".into(), content: "Who are you?".into(), ..Message::default() }],
        sampling: Some(Sampling { max_tokens, temperature: 1.0, ..Sampling::default() }),
        ..Generate::default()
    })
}

async fn attached(setup: &mut Setup) -> Attached {
    let mut worker = tokio::time::timeout(WAIT, setup.workers.recv()).await.expect("no worker in time").unwrap();
    match worker.next().await {
        Body::Hello(hello) => {
            assert_eq!(hello.models[0].name, "default/tiny");
            let names: Vec<_> = hello.models.iter().map(|offer| offer.name.as_str()).collect();
            assert_eq!(names, ["default/tiny", "default/tiny:a", "default/tiny:b"]);
            let digests: BTreeSet<_> = hello.models.iter().map(|offer| &offer.weights_digest).collect();
            assert!(digests.len() == 3 && digests.iter().all(|digest| digest.len() == 64), "{digests:?}");
        }
        other => panic!("{other:?} came before the hello"),
    }
    worker.send(FromGateway::Welcome(GatewayWelcome { gateway: "g".into(), takes_batches: true })).await;
    worker
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_attaches_answers_and_attaches_again_when_the_stream_ends() {
    let mut setup = set_up().await;
    let mut worker = attached(&mut setup).await;
    worker.send(question("r", "default/tiny", 5)).await;
    let mut tokens = 0;
    loop {
        match worker.next().await {
            Body::Delta(delta) => {
                assert_eq!((delta.request.as_str(), delta.position), ("r", tokens));
                tokens += delta.tokens.len() as u32;
            }
            Body::Done(done) => {
                assert_eq!(done.completion_tokens, tokens);
                assert!(done.prompt_tokens > 10);
                break;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    assert!(setup.health.readiness().is_ok());
    drop(worker);
    let _again = attached(&mut setup).await;
}

/// The tokens of each request, all of which end.
async fn tokens_of<const N: usize>(worker: &mut Attached, requests: [&str; N]) -> [Vec<u32>; N] {
    let mut tokens = [const { Vec::new() }; N];
    let mut ended = 0;
    while ended < N {
        match worker.next().await {
            Body::Delta(delta) => {
                let at = requests.iter().position(|request| *request == delta.request).unwrap();
                tokens[at].extend(delta.tokens);
            }
            Body::Done(_) => ended += 1,
            other => panic!("unexpected {other:?}"),
        }
    }
    tokens
}

#[tokio::test(flavor = "multi_thread")]
async fn each_name_answers_with_its_own_adapter_and_is_resumed_with_it() {
    let mut setup = set_up().await;
    let mut worker = attached(&mut setup).await;
    let ask = |request: &str, model: &str, generated: &[u32]| {
        let FromGateway::Generate(mut generate) = question(request, model, 12) else { panic!("no request") };
        generate.sampling = Some(Sampling { max_tokens: 12, ..Sampling::default() });
        generate.generated = generated.to_vec();
        FromGateway::Generate(generate)
    };
    for model in ["default/tiny", "default/tiny:a", "default/tiny:b"] {
        worker.send(ask(model, model, &[])).await;
    }
    let answers = tokens_of(&mut worker, ["default/tiny", "default/tiny:a", "default/tiny:b"]).await;
    assert!(answers.iter().all(|tokens| tokens.len() > 3), "{answers:?}");
    assert!(answers[0] != answers[1] && answers[1] != answers[2] && answers[0] != answers[2], "{answers:?}");
    for (model, whole) in ["default/tiny", "default/tiny:a", "default/tiny:b"].into_iter().zip(&answers) {
        worker.send(ask("rest", model, &whole[..3])).await;
        assert_eq!(tokens_of(&mut worker, ["rest"]).await[0], whole[3..], "{model}");
    }
}

#[test]
fn adapters_that_do_not_fit_are_named_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let config = vicuna_model::Config { hidden: 32, ..vicuna_model::tiny::config() };
    let model = vicuna_model::tiny::of_config(config, 2);
    let path = folder.path().join("model");
    vicuna_model::save(&path, &model.config, &model.tensors, &model.tokenizer, model.chat_template.as_deref()).unwrap();
    let adapter = folder.path().join("adapter");
    vicuna_model::tiny::save_adapter(&adapter, 1, 4, &["q_proj"]).unwrap();
    let arguments = ["worker", "--model-name", "n/s", "--model-uri", "file:///unused", "--gateway", "http://g:1"];
    let load = |adapter: PathBuf| {
        let files = Files { model: path.clone(), base: None, adapters: vec![("n/s:a".to_owned(), adapter)] };
        let loaded = crate::model::load("n/s", &files, &Options::parse_from(arguments), tch::Device::Cpu);
        explain(&loaded.err().expect("loaded"))
    };
    let other_base = load(adapter);
    assert!(other_base.contains("another base model"), "{other_base}");
    let no_adapter = load(path.clone());
    assert!(no_adapter.contains("n/s:a") && no_adapter.contains("adapter_config.json"), "{no_adapter}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_request_is_told_to_the_client() {
    let mut setup = set_up().await;
    let mut worker = attached(&mut setup).await;
    let unknown_role = FromGateway::Generate(Generate {
        request: "role".into(),
        model: "default/tiny".into(),
        messages: vec![Message { role: "wizard".into(), ..Message::default() }],
        ..Generate::default()
    });
    let too_long = FromGateway::Generate(Generate {
        request: "long".into(),
        model: "default/tiny".into(),
        prompt_tokens: vec![5; 1 << 16],
        ..Generate::default()
    });
    for (message, expected) in [
        (question("model", "default/other", 5), "default/other"),
        (unknown_role, "wizard"),
        (FromGateway::Generate(Generate { model: "default/tiny".into(), ..Generate::default() }), "messages is empty"),
        (too_long, "no room for an answer"),
    ] {
        worker.send(message).await;
        match worker.next().await {
            Body::Failure(failure) => {
                assert_eq!(failure.code, Code::Invalid as i32);
                assert!(failure.message.contains(expected), "{}", failure.message);
                let reason = if failure.request == "long" { CONTEXT_LENGTH_EXCEEDED } else { "" };
                assert_eq!(failure.reason, reason);
            }
            other => panic!("unexpected {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_become_vectors_of_length_one() {
    let mut setup = set_up().await;
    let mut worker = attached(&mut setup).await;
    let text = EmbedInput { text: "the theme".into(), tokens: vec![] };
    let ids = EmbedInput { text: String::new(), tokens: vec![5, 6, 7] };
    let model = "default/tiny".to_owned();
    let inputs = vec![text.clone(), ids, text];
    worker.send(FromGateway::Embed(Embed { request: "e".into(), model, inputs })).await;
    let Body::Embeddings(found) = worker.next().await else { panic!("no embeddings") };
    assert_eq!(found.vectors.len(), 3);
    assert_eq!(found.vectors[0], found.vectors[2]);
    assert_ne!(found.vectors[0], found.vectors[1]);
    for vector in &found.vectors {
        assert_eq!(vector.values.len(), vicuna_model::tiny::config().hidden);
        let length: f32 = vector.values.iter().map(|value| value * value).sum();
        assert!((length - 1.0).abs() < 1e-5);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_counted_without_a_completion() {
    let mut setup = set_up().await;
    let mut worker = attached(&mut setup).await;
    let prompt = Some("the theme".to_owned());
    let count = CountTokens { request: "c".into(), model: "default/tiny".into(), prompt, ..CountTokens::default() };
    worker.send(FromGateway::CountTokens(count)).await;
    let Body::TokenCount(found) = worker.next().await else { panic!("no count") };
    let expected = vicuna_model::tiny::tokenizer().encode("the theme", true).unwrap().len();
    assert_eq!((found.tokens as usize, found.max_length), (expected, 512));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_gateway_gets_the_transcript_of_a_request_whose_gateway_is_gone() {
    let mut setup = set_up().await;
    let mut first = attached(&mut setup).await;
    first.send(question("r", "default/tiny", 400)).await;
    let Body::Delta(delta) = first.next().await else { panic!("no token") };
    drop(first);
    let mut second = attached(&mut setup).await;
    let deadline = Instant::now() + WAIT;
    let choice = loop {
        second.send(FromGateway::TranscriptOf(TranscriptOf { request: "r".into() })).await;
        let Body::Transcript(mut found) = second.next().await else { panic!("no transcript") };
        if let Some(choice) = found.choices.pop() {
            break choice;
        }
        assert!(Instant::now() < deadline, "no transcript in time");
    };
    assert_eq!(choice.tokens[0], delta.tokens[0]);
    assert_eq!(choice.generate.unwrap().messages[0].content, "Who are you?");
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_is_announced_and_the_stream_closes_after_the_last_message() {
    let mut setup = set_up().await;
    let mut worker = attached(&mut setup).await;
    setup.draining.send_replace(Some(77));
    assert!(matches!(worker.next().await, Body::Draining(Draining { deadline_ms: 77 })));
    setup.closing.cancel();
    let end = tokio::time::timeout(WAIT, async { while let Ok(Some(_)) = worker.from_worker.message().await {} });
    end.await.expect("the worker did not close its stream");
    drop(worker);
    tokio::time::timeout(WAIT, setup.running).await.expect("the worker did not end").unwrap();
}

#[test]
fn a_gateway_url_needs_scheme_host_and_port() {
    assert_eq!(parts("https://gateway.vicuna-system.svc:9443").unwrap().2, 9443);
    assert_eq!(parts("http://[::1]:80").unwrap().1, "::1");
    assert!(parts("gateway:9443").is_err());
    assert!(parts("https://gateway").is_err());
}

/// A worker with two models on request and room for one of them.
async fn set_up_on_request() -> Setup {
    let files = tempfile::tempdir().unwrap();
    let saved = |seed: u64| {
        let model = vicuna_model::tiny::tiny(seed);
        let path = files.path().join(format!("model-{seed}"));
        let template = model.chat_template.as_deref();
        vicuna_model::save(&path, &model.config, &model.tensors, &model.tokenizer, template).unwrap();
        format!("default/{seed}=file://{}", path.display())
    };
    let arguments = [
        "worker",
        "--gateway",
        "http://g:1",
        "--kv-memory-mib",
        "1",
        "--on-request-memory-mib",
        "2",
        "--on-request",
        &saved(7),
        "--on-request",
        &saved(8),
    ];
    let options = Options::parse_from(arguments);
    let (models, wanted) = Models::new();
    let models = Arc::new(models);
    let metrics = Metrics::new().unwrap();
    let tokens = metrics.tokens.clone();
    let (ended, mut unexpected) = mpsc::channel(1);
    let loader =
        Loader::new(&options, &files.path().join("scratch"), tch::Device::Cpu, metrics, models.clone(), ended).unwrap();
    tokio::spawn(loader.run(wanted));
    tokio::spawn(async move {
        assert_eq!(unexpected.recv().await, None, "a scheduler ended unexpectedly");
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, workers) = mpsc::channel(4);
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let server = tonic::transport::Server::builder().add_service(WorkersServer::new(FakeGateway(sender)));
    tokio::spawn(server.serve_with_incoming(incoming));
    let token = files.path().join("token");
    std::fs::write(&token, "secret\n").unwrap();
    let (draining, deadline) = watch::channel(None);
    let health = Arc::new(Health::new(files.path().join("none")));
    health.serving();
    let gateways = Gateways { url, server_name: String::new(), ca: None, token: TokenFile::new(&token) };
    let hello = WorkerHello { worker: "w".into(), slots: 2, ..WorkerHello::default() };
    let closing = CancellationToken::new();
    let shared = Shared {
        gateways,
        hello,
        models,
        health: health.clone(),
        tokens,
        draining: deadline,
        closing: closing.clone(),
    };
    let running = tokio::spawn(run(Arc::new(shared)));
    Setup { workers, health, draining, closing, running, _files: files }
}

/// The names that are loaded, once `name` is.
async fn until_loaded(worker: &mut Attached, name: &str) -> Vec<String> {
    loop {
        if let Body::Offers(offers) = worker.next().await {
            let loaded: Vec<_> =
                offers.models.into_iter().filter(|offer| !offer.on_request).map(|offer| offer.name).collect();
            if loaded.iter().any(|loaded| loaded == name) {
                return loaded;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_loaded_on_request_and_makes_room_for_another_when_nothing_runs_in_it() {
    let mut setup = set_up_on_request().await;
    let mut worker = tokio::time::timeout(WAIT, setup.workers.recv()).await.expect("no worker in time").unwrap();
    let Body::Hello(hello) = worker.next().await else { panic!("no hello") };
    assert!(hello.models.len() == 2 && hello.models.iter().all(|offer| offer.on_request));
    worker.send(question("early", "default/7", 5)).await;
    let early = loop {
        match worker.next().await {
            Body::Failure(failure) => break failure,
            Body::Offers(_) => {}
            other => panic!("unexpected {other:?}"),
        }
    };
    assert_eq!(early.code(), Code::Overloaded, "it goes back to its gateway, and the model is wanted");
    for model in ["default/7", "default/8", "default/7"] {
        worker.send(FromGateway::LoadModel(LoadModel { model: model.into() })).await;
        assert_eq!(until_loaded(&mut worker, model).await, [model], "there is room for one");
        worker.send(question(model, model, 5)).await;
        loop {
            match worker.next().await {
                Body::Done(done) => break assert_eq!(done.completion_tokens, 5),
                Body::Delta(_) | Body::Offers(_) => {}
                other => panic!("unexpected {other:?}"),
            }
        }
    }
}
