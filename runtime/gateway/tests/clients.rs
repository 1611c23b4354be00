//! OpenAI's own clients, and Gradio's chat interface, unchanged, which `tests/tools/{openai,gradio}.sh` install.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use serde_json::json;
use std::path::{Path, PathBuf};
use support::{MODEL, TestGateway, Worker, gateway, scored};
use tokio::process::Command;
use vicuna_protocol::inference::gateway_message::Body as FromGateway;
use vicuna_protocol::inference::generate::Format;
use vicuna_protocol::inference::worker_message::Body as FromWorker;
use vicuna_protocol::inference::{Embedding, Embeddings, Generate, PromptScores};

const WORDS: usize = 4;
/// SHA-256 of sk-team.
const TEAM: &str = "3fc923743166bae134970eb2789df5145d8b8041e050acf18067986818f41d13";

async fn able_worker(gateway: &TestGateway, name: &str) -> Worker {
    let able = |hello: &mut vicuna_protocol::inference::WorkerHello| {
        hello.models[0].tool_dialect = "hermes".into();
        hello.models[0].json_schema = true;
        hello.models[0].min_tokens = true;
        hello.models[0].embedding_dimensions = 2;
    };
    gateway.worker_with(name, able).await
}

/// Answers everything until it is lost; tells the request with which that is to happen.
async fn serve(worker: &mut Worker) -> Generate {
    loop {
        match worker.next().await.unwrap() {
            FromGateway::Generate(generate) => {
                let moves = generate.messages.iter().any(|message| message.content == "move");
                if moves && generate.generated.is_empty() {
                    worker.speak(&generate, 0..2).await;
                    return generate;
                }
                answer(worker, &generate).await;
            }
            FromGateway::Embed(embed) => {
                let vector = Embedding { values: vec![1.0, 0.0] };
                let vectors = vec![vector; embed.inputs.len()];
                worker
                    .send(FromWorker::Embeddings(Embeddings { request: embed.request, vectors, prompt_tokens: 2 }))
                    .await;
            }
            _ => {}
        }
    }
}

async fn answer(worker: &Worker, generate: &Generate) {
    if generate.prompt_logprobs.is_some() {
        let (request, choice) = (generate.request.clone(), generate.choice);
        let scores = PromptScores { request, choice, first: 0, tokens: vec![scored(0), scored(1)] };
        worker.send(FromWorker::PromptScores(scores)).await;
    }
    let have = generate.generated.len();
    if !generate.tools_json.is_empty() {
        let call = r#"<tool_call>{"name": "weather", "arguments": {"in": "Rome"}}</tool_call>"#;
        let count = if generate.messages[0].content == "twice" { 2 } else { 1 };
        let said = vec![call; count].join("\n");
        let (begun, rest) = said.split_at(said.find("Rome").unwrap());
        worker.say(generate, 0, begun).await;
        worker.say(generate, 1, rest).await;
        return worker.done(generate, 2).await;
    }
    if matches!(generate.format, Some(Format::JsonSchema(_))) {
        worker.say(generate, 0, r#"{"in": "Rome"}"#).await;
        return worker.done(generate, 1).await;
    }
    match generate.logprobs {
        Some(_) => worker.speak_scored(generate, have..WORDS).await,
        None => worker.speak(generate, have..WORDS).await,
    }
    worker.done(generate, WORDS as u32).await;
}

#[tokio::test]
async fn openai_s_python_client_works_unchanged() {
    if let Some(folder) = installed("openai-python-") {
        drive(Command::new("python3").env("PYTHONPATH", folder), "openai_client.py", None).await;
    }
}

#[tokio::test]
async fn openai_s_javascript_client_works_unchanged() {
    if let Some(folder) = installed("openai-node-") {
        drive(&mut Command::new("node"), "openai_client.mjs", Some(&folder)).await;
    }
}

#[tokio::test]
async fn gradio_s_chat_interface_works_unchanged() {
    let (gradio, openai) = (installed("gradio-"), installed("openai-python-"));
    if let Some((gradio, openai)) = gradio.zip(openai) {
        let path = format!("{}:{}", gradio.display(), openai.display());
        drive(Command::new("python3").env("PYTHONPATH", path), "gradio_chat.py", None).await;
    }
}

/// The newest folder of the cache with a name that begins like this; says so where there is none.
fn installed(prefix: &str) -> Option<PathBuf> {
    let cache = std::env::var_os("VICUNA_CACHE").map(PathBuf::from);
    let entries = cache.and_then(|cache| std::fs::read_dir(cache).ok()).into_iter().flatten();
    let folders = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
    let newest = folders.filter(named).max();
    if newest.is_none() {
        eprintln!("skipped: no {prefix}*, run tests/tools/openai.sh and tests/tools/gradio.sh");
    }
    newest
}

async fn drive(program: &mut Command, script: &str, folder: Option<&Path>) {
    let keys_folder = tempfile::tempdir().unwrap();
    let keys = keys_folder.path().join("keys.json");
    std::fs::write(&keys, json!({ "keys": [{ "name": "team", "sha256": TEAM }] }).to_string()).unwrap();
    let gateway = gateway(&["--api-keys-file", &keys.display().to_string()]).await;
    let mut first = able_worker(&gateway, "w-1").await;
    let script = format!("{}/tests/clients/{script}", env!("CARGO_MANIFEST_DIR"));
    let mut client =
        program.args([&script, &gateway.url("/v1"), MODEL]).args(folder).kill_on_drop(true).spawn().unwrap();
    serve(&mut first).await;
    // Long enough for the client to hear that it waits.
    tokio::time::sleep(std::time::Duration::from_millis(2500)).await;
    drop(first);
    let mut second = able_worker(&gateway, "w-2").await;
    let status = tokio::select! {
        status = client.wait() => status.unwrap(),
        _ = serve(&mut second) => panic!("one move is enough"),
    };
    assert!(status.success());
}
