//! The command line.

use crate::collective::Network;
use crate::coordinator::{Link, Route};
use crate::http::{self, Status};
use crate::memory::command as estimate;
use crate::metrics::Metrics;
use crate::prepare::Place;
use crate::rank::{self, Exit, Parts};
use crate::{export, heap, local, numerics};
use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use vicuna_protocol::auth::TokenFile;
use vicuna_protocol::coordinator::Hello;
use vicuna_protocol::tls;

/// Name in the coordinator's certificate.
const SERVER_NAME: &str = "vicuna-operator";

/// One rank of an elastic training; the operator starts it in a pod.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    rank: Option<RankArguments>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs a whole training in this process, without a cluster.
    Local(local::Arguments),
    /// Writes a model with its tokenizer as one GGUF file.
    Export(export::Arguments),
    /// Says what a training needs in memory, from the model's configuration alone.
    Estimate(estimate::Arguments),
    /// Merges a PEFT adapter into its base model: writes a whole Hugging Face directory.
    Merge(MergeArguments),
}

#[derive(Clone, Debug, clap::Args)]
struct MergeArguments {
    /// The base model: a Hugging Face directory or a GGUF file.
    #[arg(long)]
    base: PathBuf,
    /// The adapter: a directory with adapter_config.json, such as a training's result.
    #[arg(long)]
    adapter: PathBuf,
    /// The directory to write.
    #[arg(long)]
    out: PathBuf,
}

#[derive(Clone, Debug, clap::Args)]
struct RankArguments {
    /// The coordinator, like https://vicuna-operator.vicuna-system.svc:9443.
    #[arg(long, env = "VICUNA_COORDINATOR")]
    coordinator: String,
    /// Certificates that the coordinator's is checked against, PEM.
    #[arg(long, env = "VICUNA_CA", default_value = "/etc/vicuna/trust/ca.crt")]
    ca: PathBuf,
    /// Projected service-account token for audience vicuna-coordinator.
    #[arg(long, env = "VICUNA_TOKEN_FILE", default_value = "/var/run/secrets/vicuna/token")]
    token_file: PathBuf,
    /// Folder for downloads and the result, as large as twice the model.
    #[arg(long, env = "VICUNA_SCRATCH", default_value = "/scratch")]
    scratch: PathBuf,
    /// Where peers connect to.
    #[arg(long, env = "VICUNA_LISTEN", default_value = "0.0.0.0:7600")]
    listen: SocketAddr,
    /// Where /metrics, /healthz and /readyz are served.
    #[arg(long, env = "VICUNA_METRICS", default_value = "0.0.0.0:9090")]
    metrics: SocketAddr,
    /// cpu or cuda; VICUNA_DEVICE if it is not given, and then cpu.
    #[arg(long)]
    device: Option<String>,
    /// Seconds from SIGTERM to SIGKILL, the pod's terminationGracePeriodSeconds.
    #[arg(long, env = "VICUNA_GRACE_SECONDS", default_value_t = 30)]
    grace_seconds: u64,
    #[arg(long, env = "POD_NAME")]
    pod_name: String,
    #[arg(long, env = "POD_UID")]
    pod_uid: String,
    #[arg(long, env = "NODE_NAME")]
    node_name: String,
    /// The address by which peers reach this rank.
    #[arg(long, env = "POD_IP")]
    pod_ip: IpAddr,
}

/// Runs the program.
pub fn main() -> ExitCode {
    start_log();
    let arguments = Arguments::parse();
    heap::keep_freed_memory();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into()),
    };
    let done = match (arguments.command, arguments.rank) {
        (Some(Command::Local(arguments)), _) => runtime.block_on(local::run(arguments)).map(|()| Exit::Done),
        (Some(Command::Export(arguments)), _) => export::run(&arguments).map(|()| Exit::Done),
        (Some(Command::Estimate(arguments)), _) => estimate::run(&arguments).map(|()| Exit::Done),
        (Some(Command::Merge(arguments)), _) => merge(&arguments).map(|()| Exit::Done),
        (None, Some(arguments)) => runtime.block_on(run(arguments)),
        (None, None) => Err(anyhow::anyhow!("--coordinator is missing; see --help")),
    };
    // A blocking download or upload in the background must not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match done {
        Ok(exit) => ExitCode::from(exit.code()),
        Err(error) => fail(&error),
    }
}

fn merge(arguments: &MergeArguments) -> Result<()> {
    let MergeArguments { base, adapter, out } = arguments;
    vicuna_model::lora::merge(base, adapter, out).with_context(|| format!("cannot merge {}", adapter.display()))
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("vicuna-trainer: {error:#}");
    ExitCode::FAILURE
}

fn start_log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if std::env::var("VICUNA_LOG_FORMAT").is_ok_and(|format| format == "json") {
        log.json().init();
    } else {
        log.init();
    }
}

async fn run(arguments: RankArguments) -> Result<Exit> {
    let device = vicuna_model::device::open_exact(arguments.device.as_deref())?;
    let network = Network::listen(&arguments.listen.to_string())
        .with_context(|| format!("cannot listen on {}", arguments.listen))?;
    let status = Status { metrics: Metrics::new()?, ready: Arc::default() };
    let served = tokio::spawn(http::serve(arguments.metrics, status.clone()));
    let threads = tch::get_num_threads();
    let numerics_class = numerics::class(device, threads);
    tracing::info!(class = numerics_class, "starting");
    let hello = Hello {
        pod_name: arguments.pod_name.clone(),
        pod_uid: arguments.pod_uid.clone(),
        node: arguments.node_name.clone(),
        peer_address: SocketAddr::new(arguments.pod_ip, network.address().port()).to_string(),
        generation: 0,
        step: 0,
        numerics_class,
        since_step_ms: 0,
    };
    let (link, inbox) = Link::start(route(&arguments), hello);
    let parts = Parts {
        link,
        inbox,
        network: Arc::new(network),
        place: Place { scratch: arguments.scratch, device, threads },
        status,
        grace: Duration::from_secs(arguments.grace_seconds),
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let terminated = async move {
        let _signal = terminate.recv().await;
    };
    tokio::select! {
        exit = rank::live(parts, terminated) => Ok(exit),
        served = served => {
            served?.with_context(|| format!("cannot serve metrics on {}", arguments.metrics))?;
            Err(anyhow::anyhow!("the metrics server ended"))
        }
    }
}

/// The CA is read at every attempt: it is rotated while the rank lives.
fn route(arguments: &RankArguments) -> Route {
    let (url, ca) = (arguments.coordinator.clone(), arguments.ca.clone());
    Route {
        channel: Arc::new(move || tls::channel(&url, &ca, SERVER_NAME)),
        token: TokenFile::new(&arguments.token_file),
    }
}
