//! `make demo`: the main job on real parts. Trains, loses a spot node, goes on, serves, survives a killed worker, scales.

mod report;
mod serve;
mod stage;
mod train;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use vicuna_tests::cluster::Cluster;

use report::Report;
use stage::Stage;

#[derive(Parser)]
#[command(about = "The main job on a local cluster: train, reclaim, resume, serve, chat")]
struct Cli {
    /// Name of the cluster, under target/cluster
    #[arg(long, global = true, default_value = "vicuna")]
    name: String,
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Run the whole of it and leave the cluster up
    Up {
        /// Train the same job once more without a reclaim and compare the digests (doubles the training time)
        #[arg(long, env = "DEMO_UNDISTURBED", value_parser = clap::builder::FalseyValueParser::new())]
        undisturbed: bool,
    },
    /// Remove every trace of it
    Down,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    match cli.command {
        Action::Up { undisturbed } => up(&cli.name, undisturbed),
        Action::Down => Cluster::down(&cli.name, None),
    }
}

fn up(name: &str, undisturbed: bool) -> Result<()> {
    if Cluster::open(name, None).is_ok() {
        bail!("the demo's cluster {name:?} is already up: `make demo-down` first, or look around in it with kubectl");
    }
    let mut report = Report::start();
    let stage = Stage::build(name, &mut report)?;
    serve::base_model(&stage, &mut report)?;
    train::with_a_reclaim(&stage, &mut report)?;
    if undisturbed {
        train::undisturbed(&stage, &mut report)?;
    }
    serve::tuned_model(&stage, &mut report)?;
    serve::kill_a_worker(&stage, &mut report)?;
    serve::burst(&stage, &mut report)?;
    stage::ask_prometheus(&stage, &mut report)?;
    report.finish()?;
    stage.say_how_to_look_around();
    Ok(())
}
