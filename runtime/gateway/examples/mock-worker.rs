//! A worker without a model: it answers every request with a number of words, one each interval. For
//! measuring what the gateway costs.
//!
//!     cargo run --release -p vicuna-gateway --example mock-worker -- --token-file token --ca ca.crt

use anyhow::Result;
use clap::Parser;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Streaming};
use vicuna_protocol::auth::TokenFile;
use vicuna_protocol::inference::gateway_message::Body as FromGateway;
use vicuna_protocol::inference::worker_message::Body;
use vicuna_protocol::inference::workers_client::WorkersClient;
use vicuna_protocol::inference::{Delta, Done, GatewayMessage, Generate, Load, ModelOffer, WorkerHello, WorkerMessage};
use vicuna_protocol::tls;

const LOAD_INTERVAL: Duration = Duration::from_secs(1);
const OUTBOUND: usize = 4096;

#[derive(Clone, Debug, Parser)]
struct Options {
    #[arg(long, default_value = "https://127.0.0.1:9443")]
    gateway: String,
    #[arg(long, default_value = "vicuna-gateway")]
    server_name: String,
    #[arg(long)]
    ca: PathBuf,
    /// Token of the model's namespace, audience vicuna-gateway.
    #[arg(long)]
    token_file: PathBuf,
    #[arg(long, default_value = "bench/mock")]
    model: String,
    #[arg(long, default_value = "mock-0")]
    name: String,
    /// Tokens of an answer, unless the request wants fewer.
    #[arg(long, default_value_t = 16)]
    tokens: u32,
    /// Between two tokens; 0: as fast as it goes.
    #[arg(long, default_value_t = 0)]
    interval_ms: u64,
    #[arg(long, default_value_t = 4096)]
    slots: u32,
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    let (outbound, messages) = mpsc::channel(OUTBOUND);
    send(&outbound, Body::Hello(hello(&options))).await?;
    let channel = tls::channel(&options.gateway, &options.ca, &options.server_name)?;
    let request = TokenFile::new(&options.token_file).sign(Request::new(ReceiverStream::new(messages)))?;
    let inbound = WorkersClient::new(channel).attach(request).await?.into_inner();
    tokio::spawn(report(outbound.clone(), options.slots));
    serve(inbound, outbound, &options).await
}

fn hello(options: &Options) -> WorkerHello {
    let offer = ModelOffer {
        name: options.model.clone(),
        weights_digest: "none".into(),
        max_length: 1 << 16,
        ..ModelOffer::default()
    };
    WorkerHello {
        worker: options.name.clone(),
        capacity: "External".into(),
        models: vec![offer],
        slots: options.slots,
        ..WorkerHello::default()
    }
}

async fn send(outbound: &mpsc::Sender<WorkerMessage>, body: Body) -> Result<()> {
    Ok(outbound.send(WorkerMessage { body: Some(body) }).await?)
}

async fn report(outbound: mpsc::Sender<WorkerMessage>, slots: u32) {
    let mut ticks = tokio::time::interval(LOAD_INTERVAL);
    loop {
        ticks.tick().await;
        if send(&outbound, Body::Load(Load { slots, ..Load::default() })).await.is_err() {
            return;
        }
    }
}

async fn serve(
    mut inbound: Streaming<GatewayMessage>,
    outbound: mpsc::Sender<WorkerMessage>,
    options: &Options,
) -> Result<()> {
    while let Some(message) = inbound.message().await? {
        if let Some(FromGateway::Generate(generate)) = message.body {
            let (outbound, options) = (outbound.clone(), options.clone());
            tokio::spawn(async move { answer(generate, &outbound, &options).await });
        }
    }
    Ok(())
}

async fn answer(generate: Generate, outbound: &mpsc::Sender<WorkerMessage>, options: &Options) -> Result<()> {
    let wanted = generate.sampling.as_ref().map_or(0, |sampling| sampling.max_tokens);
    let count = if wanted == 0 { options.tokens } else { wanted.min(options.tokens) };
    let (request, choice) = (generate.request, generate.choice);
    for position in generate.generated.len() as u32..count {
        if options.interval_ms > 0 && position > 0 {
            tokio::time::sleep(Duration::from_millis(options.interval_ms)).await;
        }
        let delta = Delta {
            request: request.clone(),
            choice,
            position,
            tokens: vec![position],
            text: "word ".into(),
            ..Delta::default()
        };
        send(outbound, Body::Delta(delta)).await?;
    }
    let done = Done {
        request,
        choice,
        finish_reason: "length".into(),
        prompt_tokens: 1,
        completion_tokens: count,
        ..Done::default()
    };
    send(outbound, Body::Done(done)).await
}
