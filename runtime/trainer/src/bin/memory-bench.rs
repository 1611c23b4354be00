//! Peak memory of each rank of a real training beside its estimate: ranks are processes that talk over loopback TCP, by
//! the same code as in pods. Memory is what belongs to the process alone, mapped files not counted, sampled every few
//! milliseconds; on a GPU all that is in use there.

use anyhow::{Context, Result, anyhow, ensure};
use clap::{Parser, ValueEnum};
use serde_json::json;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use vicuna_checkpoint::StoreError;
use vicuna_protocol::coordinator::form::Purpose;
use vicuna_protocol::gigabytes;
use vicuna_protocol::job::{
    Base, Checkpointing, DatasetSource, Lora, Method, ModelSource, Parameters, Precision, Prepare, Recipe, Recompute,
    Reproducibility, RunLength, Schedule, TrainingJob,
};
use vicuna_trainer::adapters;
use vicuna_trainer::blocks::BlockTable;
use vicuna_trainer::checkpoint::Published;
use vicuna_trainer::collective::Network;
use vicuna_trainer::collective::tcp::{Membership, Peer};
use vicuna_trainer::evaluation::{Evaluation, Stage};
use vicuna_trainer::generation::{self, Assignment, Control, Next, Observer, Start};
use vicuna_trainer::heap;
use vicuna_trainer::memory::Workload;
use vicuna_trainer::prepare::{Place, prepare};
use vicuna_trainer::step::StepReport;

const STEPS: u64 = 2;
/// There is one at the end. During a step a checkpoint takes its very bytes besides, which needs no measuring.
const BETWEEN_CHECKPOINTS: u64 = 3600;

#[derive(Clone, Debug, Parser)]
struct Options {
    /// A Hugging Face directory or a GGUF file.
    #[arg(long)]
    model: PathBuf,
    #[arg(long, value_delimiter = ',', default_value = "1,2,4")]
    ranks: Vec<usize>,
    #[arg(long, value_enum, value_delimiter = ',', default_value = "full,lora")]
    method: Vec<Trained>,
    /// Both ways if none is given.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "recompute,keep")]
    memory: Vec<Spent>,
    #[arg(long, value_enum, value_delimiter = ',', default_value = "replicated,sharded")]
    parameters: Vec<Whose>,
    /// Layers' inputs wait in host memory, on a GPU.
    #[arg(long)]
    offload: bool,
    /// A chat template's name, if the model has none of its own.
    #[arg(long)]
    template: Option<String>,
    #[arg(long)]
    bf16: bool,
    #[arg(long, default_value_t = 8)]
    global_batch: u32,
    #[arg(long, default_value_t = 2)]
    micro_batch: u32,
    #[arg(long, default_value_t = 128)]
    max_length: u32,
    /// Of this process: its rank and everyone's ports.
    #[arg(long, hide = true)]
    rank: Option<usize>,
    #[arg(long, hide = true, value_delimiter = ',')]
    ports: Vec<u16>,
    #[arg(long, hide = true)]
    folder: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Trained {
    Full,
    Lora,
    Qlora,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Spent {
    Recompute,
    Keep,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Whose {
    Replicated,
    Sharded,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if let (Some(rank), Some(folder)) = (options.rank, options.folder.clone()) {
        heap::keep_freed_memory();
        return run_rank(&options, rank, &folder);
    }
    println!("| method | ranks | weights | layers | host peak | estimate | | device peak | estimate | |");
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for (method, ranks) in pairs(&options.method, &options.ranks) {
        for (parameters, memory) in pairs(&options.parameters, &options.memory) {
            let (method, parameters, memory) = (vec![method], vec![parameters], vec![memory]);
            row(&Options { method, parameters, memory, ..options.clone() }, ranks)?;
        }
    }
    Ok(())
}

fn pairs<A: Copy, B: Copy>(first: &[A], second: &[B]) -> Vec<(A, B)> {
    first.iter().flat_map(|one| second.iter().map(|other| (*one, *other))).collect()
}

/// Runs a training of so many processes; prints the largest peaks.
fn row(options: &Options, ranks: usize) -> Result<()> {
    let folder = tempfile::tempdir()?;
    write_data(folder.path(), options)?;
    let listeners = (0..ranks).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<std::io::Result<Vec<_>>>()?;
    let ports = listeners.iter().map(|listener| Ok(listener.local_addr()?.port())).collect::<Result<Vec<_>>>()?;
    drop(listeners);
    let children =
        (0..ranks).map(|rank| start(options, rank, &ports, folder.path())).collect::<Result<Vec<Child>>>()?;
    let mut peaks = Vec::new();
    for child in children {
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "a rank failed");
        let line: [u64; 4] = serde_json::from_slice(&output.stdout)?;
        peaks.push(line);
    }
    let largest = |place: usize| peaks.iter().map(|peak| peak[place]).max().unwrap_or(0);
    let compare = |peak: u64, estimate: u64| match peak {
        0 => "| | | ".to_owned(),
        _ => {
            let ratio = estimate as f64 / peak as f64;
            format!("| {} | {} | {ratio:.2} ", gigabytes(peak), gigabytes(estimate))
        }
    };
    let layers = if options.memory[0] == Spent::Keep { "kept" } else { "run again" };
    let (host, device) = (compare(largest(0), largest(1)), compare(largest(2), largest(3)));
    let name = |value: &dyn ValueName| value.name();
    let (method, weights) = (name(&options.method[0]), name(&options.parameters[0]));
    println!("| {method} | {ranks} | {weights} | {layers} {host}{device}|");
    Ok(())
}

fn start(options: &Options, rank: usize, ports: &[u16], folder: &Path) -> Result<Child> {
    let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
    let name = |value: &dyn ValueName| value.name();
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["--rank", &rank.to_string(), "--ports", &ports.join(",")])
        .arg("--folder")
        .arg(folder)
        .arg("--model")
        .arg(&options.model)
        .args(["--method", &name(&options.method[0]), "--memory", &name(&options.memory[0])])
        .args(["--parameters", &name(&options.parameters[0])])
        .args(["--global-batch", &options.global_batch.to_string()])
        .args(["--micro-batch", &options.micro_batch.to_string()])
        .args(["--max-length", &options.max_length.to_string()])
        .stdout(Stdio::piped());
    if options.offload {
        command.arg("--offload");
    }
    if options.bf16 {
        command.arg("--bf16");
    }
    if let Some(template) = &options.template {
        command.args(["--template", template]);
    }
    command.spawn().context("cannot start a rank")
}

/// A value's name on the command line.
trait ValueName {
    fn name(&self) -> String;
}

impl<T: ValueEnum> ValueName for T {
    fn name(&self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

/// Conversations longer than any sequence.
fn write_data(folder: &Path, options: &Options) -> Result<()> {
    let reply = |number: u32| format!("{number} and on ").repeat(options.max_length as usize);
    let record = |number: u32| {
        json!({ "id": number.to_string(), "conversations": [
            { "from": "human", "value": "Count." }, { "from": "gpt", "value": reply(number) } ] })
    };
    let records: Vec<_> = (0..options.global_batch).map(record).collect();
    std::fs::write(folder.join("data.json"), serde_json::to_vec(&records)?)?;
    Ok(())
}

fn job(options: &Options, folder: &Path) -> Result<TrainingJob> {
    let url = |path: &Path| Ok::<_, anyhow::Error>(format!("file://{}", std::path::absolute(path)?.display()));
    let lora = || Lora { rank: 8, alpha: 16.0, dropout: 0.0, targets: vec!["all-linear".to_owned()] };
    Ok(TrainingJob {
        namespace: "bench".to_owned(),
        name: "memory".to_owned(),
        uid: "memory".to_owned(),
        model: ModelSource { from: url(&options.model)?, template: options.template.clone() },
        dataset: vec![DatasetSource { from: url(&folder.join("data.json"))?, weight: 1.0 }],
        prepare: Prepare::default(),
        recipe: Recipe {
            method: match options.method[0] {
                Trained::Full => Method::Full,
                Trained::Lora => Method::LoRA(lora()),
                Trained::Qlora => Method::QLoRA(lora(), Base::Nf4),
            },
            global_batch: options.global_batch,
            micro_batch: options.micro_batch,
            length: RunLength::Steps(STEPS),
            learning_rate: 1e-5,
            schedule: Schedule::Constant,
            warmup_ratio: 0.0,
            weight_decay: 0.0,
            gradient_clip: 1.0,
            max_length: options.max_length,
            seed: 1,
            evaluate_every: None,
            precision: if options.bf16 { Precision::Bf16 } else { Precision::Fp32 },
            recompute: if options.memory[0] == Spent::Keep { Recompute::Never } else { Recompute::Always },
            parameters: match options.parameters[0] {
                Whose::Replicated => Parameters::Replicated,
                Whose::Sharded => Parameters::Sharded,
            },
            offload: options.offload,
            packing: false,
            rope_scaling: None,
            reproducibility: Reproducibility::default(),
        },
        checkpoint: Checkpointing {
            to: url(&folder.join("bucket"))?,
            interval_seconds: Some(BETWEEN_CHECKPOINTS),
            keep: 1,
        },
    })
}

/// One rank: prints its peak and its estimate, of the host and of the device, in bytes.
fn run_rank(options: &Options, rank: usize, folder: &Path) -> Result<()> {
    let device = vicuna_model::device::open_exact(None)?;
    let network = Network::listen(&format!("127.0.0.1:{}", options.ports[rank]))?;
    let peaks = Peaks::watch(device.is_cuda());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let scratch = folder.join(format!("scratch-{rank}"));
    let place = Place { scratch, device, threads: tch::get_num_threads() };
    let session = Arc::new(runtime.block_on(prepare(job(options, folder)?, place))?);
    let peer =
        |(rank, port): (usize, &u16)| Peer { name: format!("rank-{rank}"), address: format!("127.0.0.1:{port}") };
    let members: Vec<Peer> = options.ports.iter().enumerate().map(peer).collect();
    let nodes: Vec<String> = members.iter().map(|member| member.name.clone()).collect();
    // The processes are each other's only company, on this machine and for a moment.
    let membership = Membership { generation: 1, rank, members, key: [7; 32] };
    let between_interruptions = Duration::from_secs(3600);
    let (purpose, leaves) = (Purpose::Train, vec![false; nodes.len()]);
    let start = Start::Model;
    let assignment = Assignment { membership, nodes, start, purpose, leaves, canary: false, between_interruptions };
    let control = Control::default();
    control.go.cancel();
    generation::run(&session, &network, &assignment, &control, &(Arc::new(Silent) as Arc<dyn Observer>), &mut None)
        .map_err(|error| anyhow!("{error}"))?;
    let (host, on_device) = peaks.end();
    let lora = adapters::lora(&session.job.recipe.method)?;
    let table = BlockTable::of(&session.config, lora.as_ref());
    let workload = Workload {
        config: &session.config,
        table: &table,
        recipe: &session.job.recipe,
        gpu: device.is_cuda(),
        data: session.data_bytes(),
        slow_store: false,
    };
    let ranks = options.ports.len() as u32;
    let need = workload.need(ranks, options.parameters[0] == Whose::Sharded);
    println!("{}", json!([host, need.host, on_device, need.device]));
    Ok(())
}

struct Silent;

impl Observer for Silent {
    fn ready(&self, _: &str) {}

    fn stepped(&self, _: &StepReport, _: Next) {}

    fn evaluating(&self, _: Stage) {}

    fn evaluated(&self, _: &Evaluation) {}

    fn checkpointed(&self, _: &Published) {}

    fn blocked(&self, error: &StoreError) {
        eprintln!("waiting: {error}");
    }
}

/// The largest numbers seen since it began.
struct Peaks {
    host: Arc<AtomicU64>,
    device: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
}

impl Peaks {
    fn watch(gpu: bool) -> Self {
        let peaks = Self { host: Arc::default(), device: Arc::default(), over: Arc::default() };
        let (host, device, over) = (peaks.host.clone(), peaks.device.clone(), peaks.over.clone());
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                host.fetch_max(anonymous_bytes().unwrap_or(0), Ordering::Relaxed);
                if gpu && let Ok((free, total)) = vicuna_model::device::memory_bytes() {
                    device.fetch_max(total - free, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        peaks
    }

    fn end(&self) -> (u64, u64) {
        self.over.store(true, Ordering::Relaxed);
        (self.host.load(Ordering::Relaxed), self.device.load(Ordering::Relaxed))
    }
}

/// Of this process, now.
fn anonymous_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}
