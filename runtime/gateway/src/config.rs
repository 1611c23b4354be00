//! What the gateway is told at its start.

use crate::routing::PolicyName;
use clap::Parser;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// OpenAI's API in front of many models, whose streams survive the loss of a worker.
#[derive(Clone, Debug, Parser)]
#[command(name = "vicuna-gateway", version)]
pub struct Config {
    /// Name of this replica, in logs and reports.
    #[arg(long, env = "POD_NAME", default_value = "vicuna-gateway")]
    pub name: String,
    /// OpenAI's API and the pages.
    #[arg(long, env = "VICUNA_LISTEN", default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,
    /// Where workers attach (gRPC over TLS).
    #[arg(long, env = "VICUNA_WORKERS_LISTEN", default_value = "0.0.0.0:9443")]
    pub workers_listen: SocketAddr,
    /// /metrics, /healthz and /readyz.
    #[arg(long, env = "VICUNA_METRICS", default_value = "0.0.0.0:9090")]
    pub metrics: SocketAddr,
    /// Certificate chain for workers, PEM; read again when it changes, like all files here.
    #[arg(long, env = "VICUNA_TLS_CERT")]
    pub tls_cert: PathBuf,
    /// Its private key, PEM.
    #[arg(long, env = "VICUNA_TLS_KEY")]
    pub tls_key: PathBuf,
    /// Certificate chain for clients, PEM: the API then speaks HTTPS instead of HTTP.
    #[arg(long, env = "VICUNA_HTTPS_CERT", requires = "https_key")]
    pub https_cert: Option<PathBuf>,
    /// Its private key, PEM.
    #[arg(long, env = "VICUNA_HTTPS_KEY", requires = "https_cert")]
    pub https_key: Option<PathBuf>,
    /// The published trust: jwks.json, with which workers' tokens are verified, and ca.crt.
    #[arg(long, env = "VICUNA_TRUST_DIR", default_value = "/etc/vicuna/trust")]
    pub trust_dir: PathBuf,
    /// Digests of the API keys, their models and quotas, JSON; without it everybody may ask.
    #[arg(long, env = "VICUNA_API_KEYS_FILE")]
    pub api_keys_file: Option<PathBuf>,
    /// Operator that load is reported to, `https://…`; without it nothing is reported.
    #[arg(long, env = "VICUNA_OPERATOR", requires = "operator_token_file")]
    pub operator: Option<String>,
    /// Token for the operator, audience vicuna-coordinator; read anew at every connection.
    #[arg(long, env = "VICUNA_OPERATOR_TOKEN_FILE")]
    pub operator_token_file: Option<PathBuf>,
    /// Host and port at which all gateways, this one among them, are reached by workers: `HOST:PORT`, where every
    /// address of the host is a gateway. Workers from outside that reach one of them only are passed on to the others.
    #[arg(long, env = "VICUNA_PEERS", value_parser = address)]
    pub peers: Option<Address>,
    /// Which worker a request goes to.
    #[arg(long, env = "VICUNA_ROUTING", value_enum, default_value = "least-loaded")]
    pub routing: PolicyName,
    /// Folder for the arena's votes, which must outlive this process; without it they are in memory.
    #[arg(long, env = "VICUNA_ARENA_VOTES_FOLDER")]
    pub arena_votes_folder: Option<PathBuf>,
    /// MiB of votes in this replica's file; more are refused.
    #[arg(long, env = "VICUNA_ARENA_VOTES_MIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub arena_votes_mib: u64,
    /// Votes a minute of one voter: an API key, or an address where no keys are asked for.
    #[arg(long, env = "VICUNA_ARENA_VOTES_PER_MINUTE", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub arena_votes_per_minute: u32,
    #[command(flatten)]
    pub limits: Limits,
}

/// Bounds on what clients can ask and on how long anything waits.
#[derive(Clone, Debug, clap::Args)]
pub struct Limits {
    /// Clients' connections at a time.
    #[arg(long, env = "VICUNA_MAX_CONNECTIONS", default_value_t = 16_384, value_parser = count)]
    pub max_connections: usize,
    /// Bytes in a request's body.
    #[arg(long, env = "VICUNA_MAX_BODY_BYTES", default_value_t = 1 << 20)]
    pub max_body_bytes: usize,
    /// MiB that all requests and their answers may take, about; more are refused. Streams kept for
    /// clients that come back take up to 64 besides.
    #[arg(long, env = "VICUNA_MAX_REQUEST_MEMORY_MIB", default_value_t = 192, value_parser = count)]
    pub max_request_memory_mib: usize,
    /// Choices (`n`, `best_of`) of one prompt. Those of all prompts of a request must fit into --max-queue.
    #[arg(long, env = "VICUNA_MAX_CHOICES", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_choices: u32,
    /// Prompts in one request to /v1/completions, or to FastChat's token check.
    #[arg(long, env = "VICUNA_MAX_PROMPTS", default_value_t = 64, value_parser = count)]
    pub max_prompts: usize,
    /// Inputs in one request to /v1/embeddings.
    #[arg(long, env = "VICUNA_MAX_INPUTS", default_value_t = 2048, value_parser = count)]
    pub max_inputs: usize,
    /// Requests that are not ended, over all models.
    #[arg(long, env = "VICUNA_MAX_IN_FLIGHT", default_value_t = 4096)]
    pub max_in_flight: usize,
    /// Choices that wait for a worker, in each model.
    #[arg(long, env = "VICUNA_MAX_QUEUE", default_value_t = 256)]
    pub max_queue: usize,
    /// How long a request waits for its first worker.
    #[arg(long = "queue-timeout-seconds", env = "VICUNA_QUEUE_TIMEOUT_SECONDS", default_value = "60", value_parser = seconds)]
    pub queue_timeout: Duration,
    /// How long a stream waits for its first worker: the client hears from us meanwhile, and a model
    /// that nobody used for a while takes minutes to load.
    #[arg(long = "stream-queue-timeout-seconds", env = "VICUNA_STREAM_QUEUE_TIMEOUT_SECONDS", default_value = "600", value_parser = seconds)]
    pub stream_queue_timeout: Duration,
    /// How long a stream that lost its worker waits for another.
    #[arg(long = "resume-timeout-seconds", env = "VICUNA_RESUME_TIMEOUT_SECONDS", default_value = "120", value_parser = seconds)]
    pub resume_timeout: Duration,
    /// How long a worker may send nothing for a stream before another takes it over.
    #[arg(long = "stall-timeout-seconds", env = "VICUNA_STALL_TIMEOUT_SECONDS", default_value = "120", value_parser = seconds)]
    pub stall_timeout: Duration,
    /// How long a worker may send no load report before it counts as gone.
    #[arg(long = "worker-timeout-seconds", env = "VICUNA_WORKER_TIMEOUT_SECONDS", default_value = "5", value_parser = seconds)]
    pub worker_timeout: Duration,
    /// For a client's TLS handshake and headers; a connection may also be idle for so long.
    #[arg(long = "header-timeout-seconds", env = "VICUNA_HEADER_TIMEOUT_SECONDS", default_value = "30", value_parser = seconds)]
    pub header_timeout: Duration,
    /// How long a client may read nothing of what is sent to it.
    #[arg(long = "write-timeout-seconds", env = "VICUNA_WRITE_TIMEOUT_SECONDS", default_value = "60", value_parser = seconds)]
    pub write_timeout: Duration,
    /// How long a stream whose client went away can be continued with Last-Event-ID.
    #[arg(long = "return-seconds", env = "VICUNA_RETURN_SECONDS", default_value = "60", value_parser = seconds)]
    pub return_timeout: Duration,
    /// How long streams may go on after SIGTERM.
    #[arg(long = "drain-seconds", env = "VICUNA_DRAIN_SECONDS", default_value = "25", value_parser = seconds)]
    pub drain_timeout: Duration,
}

/// A host by its name, and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    pub host: String,
    pub port: u16,
}

fn address(text: &str) -> Result<Address, String> {
    let parts = text.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
    match parts {
        Some((host, port)) if !host.is_empty() && port > 0 => Ok(Address { host: host.to_owned(), port }),
        _ => Err(format!("{text:?}: give HOST:PORT, as in vicuna-gateway-workers.vicuna-system.svc:9443")),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if seconds > 0.0 && seconds <= 86_400.0 => Ok(duration),
        _ => Err(format!("{text} seconds: give more than 0 and at most 86400")),
    }
}

fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=1_000_000) => Ok(count),
        _ => Err(format!("{text:?}: give a number from 1 to 1000000")),
    }
}
