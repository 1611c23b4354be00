//! `cluster`: brings a real Kubernetes cluster up on this machine, and does to its nodes what a spot market does.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use vicuna_tests::cluster::{Cluster, ClusterOptions, NodeOptions};

#[derive(Parser)]
#[command(about = "A real Kubernetes cluster on this machine, with nodes that can be reclaimed")]
struct Cli {
    /// Several clusters may be up at the same time under different names.
    #[arg(long, global = true, default_value = "vicuna", env = "VICUNA_CLUSTER")]
    name: String,
    /// Where the cluster keeps its files [default: target/cluster/NAME in the repository]
    #[arg(long, global = true)]
    state: Option<PathBuf>,
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Make the cluster: spot-1, spot-2 and onprem-1 unless --node says otherwise
    Up(Up),
    /// Remove the cluster without a trace
    Down,
    /// Add and list nodes
    #[command(subcommand)]
    Node(NodeAction),
    /// Announce that a node is taken back, wait, and take it
    Reclaim {
        node: String,
        #[arg(long, default_value = "30s", value_parser = duration)]
        notice: Duration,
        /// Only announce: the node stays until `kill`
        #[arg(long)]
        announce_only: bool,
    },
    /// Take an announcement back
    Withdraw { node: String },
    /// End a node without notice, as a power cut does
    Kill {
        node: String,
        /// Delete the Node object too, as a cloud's controller would
        #[arg(long)]
        delete: bool,
    },
    /// Cut a node off the network
    Cut { node: String },
    /// Connect a node again
    Heal { node: String },
    /// Load an image archive (docker-archive) on all nodes and on every node to come
    Load { archives: Vec<PathBuf> },
    /// Print the path of the kubeconfig
    Kubeconfig,
    /// Print how to reach cluster, S3 and Prometheus, as shell exports
    Env,
    /// Make an address inside the cluster reachable from the host
    Forward {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long, default_value = "127.0.0.1:0")]
        listen: SocketAddr,
        /// Forward in this process instead of a detached one
        #[arg(long)]
        foreground: bool,
    },
    /// Follow the pods and tell Prometheus
    #[command(hide = true)]
    Discover,
    /// Run a command inside the control plane's network namespace
    Exec {
        #[arg(trailing_var_arg = true, required = true)]
        command: Vec<String>,
    },
}

#[derive(Args)]
struct Up {
    /// A node to make, instead of the three; repeatable
    #[arg(long = "node")]
    nodes: Vec<String>,
    #[arg(long)]
    no_s3: bool,
    #[arg(long)]
    no_prometheus: bool,
    /// A Prometheus rule file; repeatable
    #[arg(long = "rules")]
    rules: Vec<PathBuf>,
    /// A further flag for the API server; repeatable
    #[arg(long = "api-server-flag", allow_hyphen_values = true)]
    api_server_flags: Vec<String>,
}

#[derive(Subcommand)]
enum NodeAction {
    /// Add a node, or bring a lost one back with an empty disk
    Add {
        node: String,
        #[arg(long = "label", value_name = "KEY=VALUE")]
        labels: Vec<String>,
        #[arg(long = "taint", value_name = "KEY=VALUE:EFFECT")]
        taints: Vec<String>,
    },
    /// List the nodes that run
    List,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let open = || Cluster::open(&cli.name, cli.state.as_deref());
    match cli.command {
        Action::Up(ref up) => bring_up(&cli, up),
        Action::Down => Cluster::down(&cli.name, cli.state.as_deref()),
        Action::Node(action) => node(&open()?, action),
        Action::Reclaim { node, notice, announce_only: true } => open()?.notice(&node, notice).map(drop),
        Action::Reclaim { node, notice, .. } => open()?.reclaim(&node, notice),
        Action::Withdraw { node } => open()?.withdraw_notice(&node),
        Action::Kill { node, delete } => open()?.kill(&node, delete),
        Action::Cut { node } => open()?.cut(&node),
        Action::Heal { node } => open()?.heal(&node),
        Action::Load { archives } => archives.iter().try_for_each(|archive| open()?.load_image(archive, None)),
        Action::Kubeconfig => print(open()?.kubeconfig_path().display()),
        Action::Env => environment(&open()?),
        Action::Forward { to, listen, foreground: true } => open()?.forward_here(to, listen),
        Action::Forward { to, listen, .. } => print(open()?.forward_at(to, listen)?),
        Action::Discover => open()?.discover_here(),
        Action::Exec { command } => exec(&open()?, &command),
    }
}

fn bring_up(cli: &Cli, up: &Up) -> Result<()> {
    let started = Instant::now();
    let mut options = ClusterOptions::named(&cli.name);
    options.state = cli.state.clone();
    options.s3 = !up.no_s3;
    options.prometheus = !up.no_prometheus;
    options.rules = up.rules.iter().map(std::path::absolute).collect::<Result<_, _>>()?;
    options.api_server_flags = up.api_server_flags.clone();
    if !up.nodes.is_empty() {
        options.nodes = up.nodes.iter().map(|name| NodeOptions::named(name)).collect();
    }
    let cluster = Cluster::up(&options)?;
    eprintln!("cluster: {} is up after {:.0} s", cluster.name(), started.elapsed().as_secs_f64());
    environment(&cluster)
}

fn node(cluster: &Cluster, action: NodeAction) -> Result<()> {
    match action {
        NodeAction::Add { node, labels, taints } => {
            let mut options = cluster.known_node(&node);
            for label in &labels {
                let (key, value) =
                    label.split_once('=').with_context(|| format!("--label {label}: write KEY=VALUE"))?;
                options = options.label(key, value);
            }
            options.taints.extend(taints);
            cluster.node_add(&options)
        }
        NodeAction::List => cluster.nodes().iter().try_for_each(|record| print(&record.options.name)),
    }
}

fn environment(cluster: &Cluster) -> Result<()> {
    print(format!("export KUBECONFIG={}", cluster.kubeconfig_path().display()))?;
    if let Ok(s3) = cluster.s3() {
        for (name, value) in s3.environment() {
            print(format!("export {name}={value}"))?;
        }
        print(format!("# S3 from pods: {}, bucket {}", s3.pod_endpoint, s3.bucket))?;
    }
    if let Ok(prometheus) = cluster.prometheus() {
        print(format!("export PROMETHEUS_URL={prometheus}"))?;
    }
    Ok(())
}

fn exec(cluster: &Cluster, command: &[String]) -> Result<()> {
    let status = cluster.command_inside(&command[0]).args(&command[1..]).status()?;
    std::process::exit(status.code().unwrap_or(1))
}

fn print(line: impl std::fmt::Display) -> Result<()> {
    println!("{line}");
    Ok(())
}

/// Durations as Kubernetes writes them: 90s, 2m, 1h or 500ms.
fn duration(text: &str) -> Result<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().with_context(|| format!("duration {text:?}: write for example 30s"))?;
    match &text[digits..] {
        "ms" => Ok(Duration::from_millis(number)),
        "s" | "" => Ok(Duration::from_secs(number)),
        "m" => Ok(Duration::from_secs(number * 60)),
        "h" => Ok(Duration::from_secs(number * 3600)),
        unit => bail!("duration {text:?}: unknown unit {unit:?}, write for example 30s"),
    }
}
