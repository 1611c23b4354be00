//! A whole training in one process, without a coordinator: the undisturbed reference of tests and
//! benches, and the smoke run on a GPU. The ranks are threads that talk over loopback TCP, by the
//! same code as in pods.

use crate::checkpoint::Published;
use crate::collective::Network;
use crate::collective::tcp::{Membership, Peer};
use crate::evaluation::{Evaluation, Stage};
use crate::generation::{self, Assignment, Control, Finished, GenerationError, Next, Observer, Outcome, Start};
use crate::numerics;
use crate::prepare::{Place, Session, prepare};
use crate::step::{Engine, StepReport};
use anyhow::{Context, Result, anyhow};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use vicuna_checkpoint::{ManifestRef, StoreError};
use vicuna_protocol::coordinator::form::Purpose;
use vicuna_protocol::job::TrainingJob;

/// Nothing interrupts a training in one process.
const DAY: Duration = Duration::from_secs(86_400);

/// `vicuna-trainer local`: prints a JSON line per step and one for the result.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// A training job as JSON (vicuna_protocol::job::TrainingJob).
    #[arg(long)]
    job: PathBuf,
    /// Ranks, as threads of this process.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    ranks: u32,
    /// Where checkpoints and result go, instead of the job's checkpoint.to.
    #[arg(long)]
    out: PathBuf,
    /// Go on from the newest checkpoint there.
    #[arg(long)]
    resume: bool,
    /// cpu or cuda; VICUNA_DEVICE if it is not given, and then cpu.
    #[arg(long)]
    device: Option<String>,
}

pub async fn run(arguments: Arguments) -> Result<()> {
    let device = vicuna_model::device::open_exact(arguments.device.as_deref())?;
    let text =
        std::fs::read(&arguments.job).with_context(|| format!("cannot read the job {}", arguments.job.display()))?;
    let mut job: TrainingJob =
        serde_json::from_slice(&text).with_context(|| format!("{} is not a training job", arguments.job.display()))?;
    std::fs::create_dir_all(&arguments.out)?;
    let out = std::path::absolute(&arguments.out)?;
    job.checkpoint.to = url(&out)?;
    let scratch = out.join("scratch");
    let place = Place { scratch, device, threads: tch::get_num_threads() };
    let session = Arc::new(prepare(job, place).await?);
    let base = if arguments.resume { session.manifests().await?.into_iter().next() } else { None };
    if let Some(base) = base.as_ref().filter(|_| session.job.recipe.reproducibility.is_exact()) {
        numerics::check(&session.numerics_class, base).map_err(anyhow::Error::msg)?;
    }
    println!("{}", json!({ "numerics": session.numerics_class, "base": base }));
    let ranks = arguments.ranks as usize;
    let finished = tokio::task::spawn_blocking(move || train(&session, ranks, base)).await??;
    println!("{}", json!({ "uri": finished.uri, "digest": finished.digest, "loss": finished.loss }));
    Ok(())
}

fn url(path: &std::path::Path) -> Result<String> {
    let path = path.to_str().ok_or_else(|| anyhow!("{} is not UTF-8", path.display()))?;
    Ok(format!("file://{path}"))
}

/// Runs all steps on `world` threads. A resumed run's generation is the one after its base's.
pub fn train(session: &Arc<Session>, world: usize, base: Option<ManifestRef>) -> Result<Finished> {
    let go = Control::default();
    go.go.cancel();
    let controls = vec![go; world];
    let observers: Vec<Arc<dyn Observer>> = (0..world).map(|rank| Arc::new(Printer { rank }) as _).collect();
    let start = base.map_or(Start::Model, Start::Manifest);
    let mut memories: Vec<Option<Engine>> = (0..world).map(|_| None).collect();
    let generation = 1 + generation_of(&start);
    let outcomes = generation_on_threads(session, generation, &start, &controls, &observers, &mut memories)?;
    for outcome in outcomes {
        if let Outcome::Complete { result: Some(result), .. } = outcome? {
            return Ok(result);
        }
    }
    Err(anyhow!("the run ended without a result"))
}

fn generation_of(start: &Start) -> u64 {
    match start {
        Start::Manifest(base) => base.generation,
        Start::Model | Start::Memory { .. } => 0,
    }
}

/// What all ranks of a generation on threads are told.
#[derive(Clone, Debug)]
pub struct CallUp {
    pub generation: u64,
    pub start: Start,
    pub purpose: Purpose,
    /// Who will not be in the next generation, by rank.
    pub leaves: Vec<bool>,
}

/// One generation that trains, each rank in a thread, with its own control, observer and memory.
pub fn generation_on_threads(
    session: &Arc<Session>,
    generation: u64,
    start: &Start,
    controls: &[Control],
    observers: &[Arc<dyn Observer>],
    memories: &mut [Option<Engine>],
) -> Result<Vec<Result<Outcome, GenerationError>>> {
    let leaves = vec![false; controls.len()];
    let call_up = CallUp { generation, start: start.clone(), purpose: Purpose::Train, leaves };
    called_up_on_threads(session, &call_up, controls, observers, memories)
}

/// The same for whatever purpose.
pub fn called_up_on_threads(
    session: &Arc<Session>,
    call_up: &CallUp,
    controls: &[Control],
    observers: &[Arc<dyn Observer>],
    memories: &mut [Option<Engine>],
) -> Result<Vec<Result<Outcome, GenerationError>>> {
    let CallUp { generation, start, purpose, leaves } = call_up;
    let world = controls.len();
    let networks = (0..world).map(|_| Network::listen("127.0.0.1:0")).collect::<std::io::Result<Vec<_>>>()?;
    let member = |(rank, network): (usize, &Network)| Peer {
        name: format!("rank-{rank}"),
        address: network.address().to_string(),
    };
    let members: Vec<Peer> = networks.iter().enumerate().map(member).collect();
    let nodes: Vec<String> = members.iter().map(|member| member.name.clone()).collect();
    let key = rand::random();
    std::thread::scope(|scope| {
        let mut threads = Vec::with_capacity(world);
        for (rank, memory) in memories.iter_mut().enumerate() {
            let membership = Membership { generation: *generation, rank, members: members.clone(), key };
            let assignment = Assignment {
                membership,
                nodes: nodes.clone(),
                start: start.clone(),
                purpose: *purpose,
                leaves: leaves.clone(),
                canary: world > 1 && *purpose == Purpose::Train,
                between_interruptions: DAY,
            };
            let (network, control, observer) = (&networks[rank], &controls[rank], &observers[rank]);
            let run = move || generation::run(session, network, &assignment, control, observer, memory);
            threads.push(scope.spawn(run));
        }
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a rank's thread failed"))).collect()
    })
}

/// Prints rank 0's view.
struct Printer {
    rank: usize,
}

impl Observer for Printer {
    fn ready(&self, _state_digest: &str) {}

    fn stepped(&self, report: &StepReport, _next: Next) {
        if self.rank != 0 {
            return;
        }
        let tokens_per_second = report.tokens as f64 / report.duration.as_secs_f64();
        println!(
            "{}",
            json!({
                "step": report.step,
                "loss": report.loss,
                "gradientNorm": report.norm,
                "learningRate": report.learning_rate,
                "tokens": report.tokens,
                "tokensPerSecond": tokens_per_second,
                "seconds": report.duration.as_secs_f64(),
                "communicationSeconds": report.communication.as_secs_f64(),
            })
        );
    }

    fn evaluating(&self, _stage: Stage) {}

    fn evaluated(&self, evaluation: &Evaluation) {
        if self.rank == 0 {
            let Evaluation { step, loss, duration } = evaluation;
            println!("{}", json!({ "step": step, "evaluationLoss": loss, "seconds": duration.as_secs_f64() }));
        }
    }

    fn checkpointed(&self, published: &Published) {
        let (stall, upload) = (published.stall.as_secs_f64(), published.upload.as_secs_f64());
        tracing::info!(uri = published.uri, stall, upload, "checkpoint written");
    }

    fn blocked(&self, error: &StoreError) {
        eprintln!("waiting: {error}");
    }
}
