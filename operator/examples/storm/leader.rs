//! One operator: waits for the lease, and then does what its leader does for ranks. Says each quarter of a second where
//! the trainings stand.

use super::{ADDRESSES, NAMESPACE, Size, training};
use anyhow::{Context as _, Result};
use clap::Parser;
use parking_lot::Mutex;
use serde_json::json;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use vicuna_operator::cli::Cli;
use vicuna_operator::config::Config;
use vicuna_operator::context::Context;
use vicuna_operator::coordinator::membership::Target;
use vicuna_operator::coordinator::registry::{Clock, Opening, Told};
use vicuna_operator::coordinator::report::{Happening, Phase};
use vicuna_operator::coordinator::store::Owner;
use vicuna_operator::coordinator::{feed, service};
use vicuna_operator::leader::Elector;
use vicuna_operator::metrics::Metrics;
use vicuna_operator::pki;

const SAY_EVERY: Duration = Duration::from_millis(250);

#[derive(clap::Args)]
pub struct Options {
    /// URL of the API server.
    #[arg(long)]
    api: http::Uri,
    /// The how manyth leader it will be.
    #[arg(long)]
    number: u16,
}

pub fn run(options: &Options, size: &Size) -> Result<()> {
    let main = Builder::new_multi_thread().enable_all().build()?;
    // With the files of every runtime, so that they can wake each other.
    let listening: Vec<Runtime> =
        ADDRESSES.iter().map(|_| Builder::new_current_thread().enable_all().build()).collect::<Result<_, _>>()?;
    let (context, told) = main.block_on(lead(options, size))?;
    for (address, runtime) in ADDRESSES.iter().zip(listening) {
        let (context, address) = (context.clone(), format!("{address}:{}", size.port + options.number).parse()?);
        std::thread::spawn(move || match listen(&runtime, context, address) {
            Ok(()) => {}
            Err(error) => eprintln!("{address}: {error:#}"),
        });
    }
    main.block_on(watch(&context, told));
    Ok(())
}

/// As `run::lead` does, but for the controllers.
async fn lead(options: &Options, size: &Size) -> Result<(Arc<Context>, mpsc::Receiver<Told>)> {
    let client = kube::Client::try_from(kube::Config::new(options.api.clone()))?;
    let name = format!("operator-{}", options.number);
    let config: Config = Cli::parse_from(["vicuna-operator", "--pod-name", &name, "--runtime-image", "none"]).into();
    let config = Arc::new(config);
    let (elector, leadership) = Elector::new(client.clone(), &config, "1");
    tokio::spawn(elector.run(CancellationToken::new()));
    leadership.acquired().await;
    println!("{}", json!({ "leads": true }));
    let (metrics, wall_clock) = (Arc::new(Metrics::new()?), Arc::new(time::OffsetDateTime::now_utc));
    let (context, told) = Context::start(client, config, metrics, leadership, Clock::start(), wall_clock).await?;
    let context = Arc::new(context);
    context.watches.ready().await.context("the caches cannot be filled")?;
    context.trust.ensure(NAMESPACE).await?;
    for number in 0..size.trainings {
        context.coordinator.ensure(opening(&training(number), size.ranks)).context("too many trainings")?;
    }
    tokio::spawn(feed::run(context.clone()));
    Ok((context, told))
}

fn opening(name: &str, ranks: usize) -> Opening {
    Opening {
        owner: Owner {
            namespace: NAMESPACE.to_owned(),
            name: name.to_owned(),
            uid: name.to_owned(),
            reference: Default::default(),
        },
        job: "{}".to_owned(),
        target: Target { min: ranks / 2, max: ranks, suspend: false, any_class: false },
        reproducibility: Default::default(),
        counters: Default::default(),
        began_at: None,
        checkpoint: None,
    }
}

/// On a thread with a table of files of its own: a limit on them is one on each table, and may not be ours to raise.
fn listen(runtime: &Runtime, context: Arc<Context>, address: SocketAddr) -> Result<()> {
    // SAFETY: it changes nothing but which table this thread's files are in.
    if unsafe { libc::unshare(libc::CLONE_FILES) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    runtime.block_on(async {
        let connections = context.trust.listen(pki::bind(address)?)?;
        Ok(service::serve(context, connections, CancellationToken::new()).await?)
    })
}

/// Until the process is killed.
async fn watch(context: &Context, mut told: mpsc::Receiver<Told>) {
    let happened: Arc<Mutex<BTreeMap<String, u64>>> = Arc::default();
    let counts = happened.clone();
    tokio::spawn(async move {
        while let Some((_, happenings)) = told.recv().await {
            let mut counts = counts.lock();
            for happening in happenings {
                *counts.entry(kind(&happening)).or_default() += 1;
            }
        }
    });
    let mut said = tokio::time::interval(SAY_EVERY);
    loop {
        said.tick().await;
        let sessions = context.coordinator.all();
        let reports: Vec<_> = sessions.iter().filter_map(|(_, session)| session.report()).collect();
        let of = |phase: Phase| reports.iter().filter(|report| report.phase == phase).count();
        println!(
            "{}",
            json!({
                "listens": true,
                "steady": of(Phase::Steady),
                "adopting": of(Phase::Adopting),
                "stepping": reports.iter().filter(|report| report.progress.is_some()).count(),
                "connected":
                    reports.iter().flat_map(|report| report.ranks.values()).filter(|rank| rank.connected).count(),
                "happened": *happened.lock(),
            })
        );
    }
}

/// The reason tells stops apart.
fn kind(happening: &Happening) -> String {
    match happening {
        Happening::Stopping { reason, .. } => format!("Stopping: {reason}"),
        other => format!("{other:?}").split([' ', '(', '{']).next().unwrap_or_default().to_owned(),
    }
}
