//! A gateway in this process, and workers as processes of their own in front of a model on disk.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test uses a part; one stops where what it relies on is not there"
)]

#[path = "../../../gateway/tests/support/trust.rs"]
mod trust;

use clap::Parser;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vicuna_gateway::config::Config;
use vicuna_gateway::gateway::{self, Running};

pub const MODEL: &str = "team/tiny";
const WAIT: Duration = Duration::from_secs(120);

pub struct Served {
    pub gateway: Running,
    /// The gateway's tasks run here.
    _runtime: tokio::runtime::Runtime,
    trust: trust::Trust,
    model: PathBuf,
    folder: tempfile::TempDir,
}

/// Killed when this is dropped.
pub struct Worker(Child);

impl Served {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tiny = vicuna_model::tiny::tiny(1);
        let model = folder.path().join("tiny");
        let template = tiny.chat_template.as_deref();
        vicuna_model::save(&model, &tiny.config, &tiny.tensors, &tiny.tokenizer, template).unwrap();
        let trust = trust::Trust::new();
        let file = |name: &str| trust.path(name).display().to_string();
        let free = "127.0.0.1:0";
        let config = Config::parse_from([
            "gateway",
            "--listen",
            free,
            "--workers-listen",
            free,
            "--metrics",
            free,
            "--tls-cert",
            &file("tls.crt"),
            "--tls-key",
            &file("tls.key"),
            "--trust-dir",
            &file(""),
        ]);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let gateway = runtime.block_on(gateway::start(&config)).unwrap();
        Self { gateway, _runtime: runtime, trust, model, folder }
    }

    pub fn http(&self) -> SocketAddr {
        self.gateway.http
    }

    /// What the README has an administrator make: the CA's certificate and a token of no pod, in one file.
    pub fn bundle(&self) -> PathBuf {
        let ca = std::fs::read_to_string(self.trust.path("ca.crt")).unwrap();
        let token = self.trust.external_token("team").read().unwrap();
        let path = self.folder.path().join("join");
        std::fs::write(&path, format!("{ca}\n{token}\n")).unwrap();
        path
    }

    /// One with nothing but the gateway's address, that file and a model, in an environment that holds nothing.
    pub fn worker(&self, home: &str) -> Worker {
        self.worker_of(home, &self.model, &[])
    }

    /// One of the model at this path, with more arguments.
    pub fn worker_of(&self, home: &str, model: &Path, more: &[&str]) -> Worker {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vicuna-worker"));
        let kept = ["PATH", "LD_LIBRARY_PATH"].map(|name| (name, std::env::var_os(name).unwrap_or_default()));
        command.env_clear().envs(kept).env("HOME", self.home(home)).env("RUST_LOG", "warn");
        // The default port may be another's on the machine of a test.
        command.env("VICUNA_METRICS", "127.0.0.1:0");
        let uri = format!("file://{}", model.display());
        command
            .args(["--gateway", &format!("https://{}", self.gateway.workers)])
            .arg("--token-file")
            .arg(self.bundle());
        command.args(["--model-name", MODEL, "--model-uri", &uri]).args(more);
        Worker(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }

    /// Where the model is.
    pub fn model(&self) -> &Path {
        &self.model
    }

    pub fn home(&self, name: &str) -> PathBuf {
        let home = self.folder.path().join(name);
        std::fs::create_dir_all(&home).unwrap();
        home
    }

    /// Until so many have the model.
    pub fn until_ready(&self, workers: usize) {
        let ready = || self.gateway.gateway.registry.model(MODEL).map_or(0, |model| model.workers.len());
        until(&format!("{workers} workers"), || ready() == workers);
    }
}

impl Worker {
    /// Without a word.
    pub fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // One that has ended already needs no end.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + WAIT;
    while !happened() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a folder holds anything below it.
pub fn is_used(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
}
