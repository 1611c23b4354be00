//! A leader change under many trainings: every rank's stream breaks at once, and the new leader, which has nothing but the
//! records, has to hear from all of them again. How long that takes, what it costs the operator, and whether any training
//! notices.
//!
//! Real: lease, CA, TLS, tokens, caches, the service and its memberships, each leader in a process of its own, and the
//! ranks' end of the stream, one connection a rank over loopback. Simulated: the API server (`api.rs`) and what ranks do
//! besides (`ranks.rs`). Controllers do not run. All of it shares the machine, which in a cluster has the ranks' part on
//! the ranks' nodes.
//!
//! `cargo run --release --locked --example storm` prints JSON lines, and last what was measured.

mod api;
mod leader;
#[path = "../../../runtime/trainer/src/coordinator.rs"]
#[allow(dead_code, reason = "the trainer's own; it also waits for what it said")]
mod link;
mod process;
mod ranks;
#[path = "../../../runtime/gateway/tests/support/trust.rs"]
mod trust;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use process::Process;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio::time::sleep;
use trust::Trust;
use vicuna_protocol::COORDINATOR_AUDIENCE;

/// Where the leaders listen, each address on a thread of its own; ranks are spread over them, so that loopback has ports
/// enough.
const ADDRESSES: [&str; 4] = ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"];
/// Of ranks, since a process may have no more than some thousand files open.
const PROCESSES: usize = 4;
const NAMESPACE: &str = "storm";
const LOOK_EVERY: Duration = Duration::from_millis(100);

#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    part: Option<Part>,
    #[command(flatten)]
    size: Size,
    /// The storm has passed after so long, or never will.
    #[arg(long, default_value_t = 600)]
    patience_seconds: u64,
}

#[derive(clap::Args, Clone, Debug)]
struct Size {
    #[arg(long, default_value_t = 500)]
    trainings: usize,
    /// Of each training.
    #[arg(long, default_value_t = 64)]
    ranks: usize,
    #[arg(long, default_value_t = 20.0)]
    step_seconds: f64,
    /// Trainings start one after another within this: it is not their start that is looked at.
    #[arg(long, default_value_t = 120.0)]
    start_seconds: f64,
    /// Of the first leader; the next one has the next.
    #[arg(long, default_value_t = 19443)]
    port: u16,
}

/// What this program starts itself for.
#[derive(Subcommand)]
enum Part {
    Leader(leader::Options),
    Ranks(ranks::Options),
}

/// Of a training by number.
fn training(number: usize) -> String {
    format!("t{number}")
}

/// Of a rank by its training and place; the pod's UID too.
fn pod(training: usize, place: usize) -> String {
    format!("t{training}-{place}")
}

fn main() -> Result<()> {
    let Options { part, size, patience_seconds } = Options::parse();
    rustls::crypto::aws_lc_rs::default_provider().install_default().ok().context("two TLS providers")?;
    match part {
        Some(Part::Leader(options)) => leader::run(&options, &size),
        Some(Part::Ranks(options)) => ranks::run(&options, &size),
        None => {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            runtime.block_on(storm(&size, Duration::from_secs(patience_seconds)))
        }
    }
}

async fn storm(size: &Size, patience: Duration) -> Result<()> {
    let trust = Trust::new();
    for number in 0..size.trainings {
        (0..size.ranks).for_each(|place| drop(trust.token(COORDINATOR_AUDIENCE, NAMESPACE, &pod(number, place))));
    }
    let jwks = std::fs::read_to_string(trust.path("jwks.json"))?;
    let (address, api) = api::serve(jwks, size).await?;
    let mut first = Process::start(size, &["leader", "--api", &address, "--number", "0"])?;
    first.until("listens", patience, |said| said["listens"] == true).await?;
    let mut second = Process::start(size, &["leader", "--api", &address, "--number", "1"])?;
    let bundle = api.trust_bundle().context("the leader published no CA")?;
    std::fs::write(trust.path("ca.crt"), bundle)?;

    let began = Instant::now();
    let mut ranks = Vec::new();
    for number in 0..PROCESSES {
        let share = |number: usize| (number * size.trainings / PROCESSES).to_string();
        let folder = trust.path("");
        let folder = folder.to_str().context("a temporary folder with a strange name")?;
        let arguments = ["ranks", "--folder", folder, "--from", &share(number), "--until", &share(number + 1)];
        ranks.push(Process::start(size, &arguments)?);
    }
    let all = size.trainings;
    first.until("every training steps", patience, |said| said["stepping"] == all).await?;
    say(json!({ "formed": all, "afterSeconds": began.elapsed().as_secs_f64(), "leader": first.cost()? }));
    let (before, since) = (first.cost()?.cpu_seconds, Instant::now());
    sleep(Duration::from_secs_f64(2.0 * size.step_seconds)).await;
    let calm_cores = (first.cost()?.cpu_seconds - before) / since.elapsed().as_secs_f64();
    say(json!({ "calm": { "cores": calm_cores, "leader": first.cost()? } }));

    for process in &mut ranks {
        process.order("mark").await?;
    }
    first.kill().await?;
    let killed = Instant::now();
    second.until("leads", patience, |said| said["leads"] == true).await?;
    let leads = killed.elapsed();
    second.until("listens", patience, |said| said["listens"] == true).await?;
    let listens = Instant::now();
    for process in &mut ranks {
        process.order("listens").await?;
    }
    let steady = pass(size, &mut second, &mut ranks, listens + patience).await?;
    say(json!({ "steadyAfterSeconds": steady.as_secs_f64() }));
    // Whoever still has a reason to be stopped is, by now.
    sleep(Duration::from_secs_f64(2.0 * size.step_seconds)).await;
    let mut reports = Vec::new();
    for process in &mut ranks {
        process.order("report").await?;
        reports.push(process.until("report", patience, |said| said["report"].is_object()).await?["report"].clone());
    }
    let happened = second.said()["happened"].clone();
    say(json!({
        "leadsSecondsAfterTheKill": leads.as_secs_f64(),
        "listensSecondsAfterTheKill": (listens - killed).as_secs_f64(),
        "everyGenerationConfirmedSecondsAfterThat": steady.as_secs_f64(),
        "ranks": summed(&reports),
        "happened": happened,
        "leader": second.cost()?,
    }));
    Ok(())
}

/// Until every training goes on under the new leader. When half of the ranks are back, one is lost of a training that is
/// whole, and one of a training that is not.
async fn pass(size: &Size, leader: &mut Process, ranks: &mut [Process], until: Instant) -> Result<Duration> {
    let began = Instant::now();
    let mut lost = false;
    loop {
        let returned: u64 = ranks.iter().map(|process| process.said()["returned"].as_u64().unwrap_or(0)).sum();
        if !lost && returned as usize >= size.trainings * size.ranks / 2 {
            lost = true;
            ranks[0].order("lose").await?;
        }
        let said = leader.said();
        let steady = said["steady"].as_u64().unwrap_or(0) as usize;
        if lost && steady == size.trainings && returned as usize + 2 >= size.trainings * size.ranks {
            return Ok(began.elapsed());
        }
        if Instant::now() >= until {
            bail!("{returned} ranks are back and {steady} trainings go on; the leader said last: {said}");
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Quantiles over all processes of ranks; what is no list is added up.
fn summed(reports: &[Value]) -> Value {
    let keys = reports.first().and_then(Value::as_object).map(|report| report.keys().cloned()).into_iter().flatten();
    let sum = |key: &String| match &reports[0][key] {
        Value::Array(_) => {
            let mut all: Vec<u64> = reports
                .iter()
                .filter_map(|report| report[key].as_array())
                .flatten()
                .filter_map(Value::as_u64)
                .collect();
            all.sort_unstable();
            let at = |share: f64| all.get(((all.len().max(1) - 1) as f64 * share) as usize);
            json!({ "count": all.len(), "p50": at(0.5), "p99": at(0.99), "most": at(1.0) })
        }
        _ => json!(reports.iter().filter_map(|report| report[key].as_u64()).sum::<u64>()),
    };
    Value::Object(keys.map(|key| (key.clone(), sum(&key))).collect())
}

fn say(line: Value) {
    println!("{line}");
}
