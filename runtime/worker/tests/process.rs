//! The worker as a process: what it says and how it ends.

#![allow(clippy::unwrap_used, reason = "a test stops where what it relies on is not there")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const WAIT: Duration = Duration::from_secs(60);

fn start(folder: &Path, model: &Path, metrics: SocketAddr) -> Child {
    let termination_log = folder.join("termination-log");
    std::fs::write(&termination_log, "").unwrap();
    let uri = format!("file://{}", model.display());
    Command::new(env!("CARGO_BIN_EXE_vicuna-worker"))
        .args(["--model-name", "default/tiny", "--model-uri", &uri, "--model-patience", "0"])
        .args(["--gateway", "http://127.0.0.1:1", "--metrics", &metrics.to_string()])
        .arg("--scratch")
        .arg(folder.join("scratch"))
        .arg("--termination-log")
        .arg(termination_log)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// An address that nobody listens on now.
fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// The whole answer to a GET; empty while nobody listens.
fn get(address: SocketAddr, path: &str) -> String {
    let mut answer = String::new();
    if let Ok(mut stream) = TcpStream::connect(address) {
        write!(stream, "GET {path} HTTP/1.1\r\nhost: worker\r\nconnection: close\r\n\r\n").unwrap();
        stream.read_to_string(&mut answer).unwrap();
    }
    answer
}

fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + WAIT;
    while !happened() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_model_that_is_not_there_ends_the_worker_with_the_reason_where_people_look() {
    let folder = tempfile::tempdir().unwrap();
    let worker = start(folder.path(), &folder.path().join("absent"), free_address());
    let output = worker.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = std::fs::read_to_string(folder.path().join("termination-log")).unwrap();
    assert!(message.contains("absent") && message.contains("does not exist"), "{message}");
    let line: serde_json::Value = serde_json::from_slice(output.stdout.trim_ascii()).unwrap();
    assert_eq!((line["event"].as_str(), line["reason"].as_str()), (Some("modelUnavailable"), Some(message.as_str())));
}

#[test]
fn a_model_that_cannot_be_read_is_named_and_fetched_anew_next_time() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.gguf");
    std::fs::write(&model, b"GGUF but no more").unwrap();
    let output = start(folder.path(), &model, free_address()).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = std::fs::read_to_string(folder.path().join("termination-log")).unwrap();
    assert!(message.contains("model.gguf") && message.contains("not a valid GGUF file"), "{message}");
    assert!(!folder.path().join("scratch/model").exists());
}

#[test]
fn a_loaded_worker_without_a_gateway_is_not_ready_and_ends_well_on_sigterm() {
    let folder = tempfile::tempdir().unwrap();
    let model = vicuna_model::tiny::tiny(1);
    let path = folder.path().join("tiny");
    vicuna_model::save(&path, &model.config, &model.tensors, &model.tokenizer, model.chat_template.as_deref()).unwrap();
    let address = free_address();
    let mut worker = start(folder.path(), &path, address);
    until("loaded", || get(address, "/readyz").contains("no gateway is attached"));
    assert!(get(address, "/readyz").starts_with("HTTP/1.1 503"));
    assert!(get(address, "/healthz").starts_with("HTTP/1.1 200"));
    assert!(get(address, "/metrics").contains("vicuna_worker_tokens_total 0"));
    let pid = worker.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    until("ended", || worker.try_wait().unwrap().is_some());
    assert_eq!(worker.wait().unwrap().code(), Some(0));
}
