//! A worker without a model: it answers every request with a number of words, one each step. For
//! measuring what the gateway costs.
//!
//!     cargo run --release -p vicuna-gateway --example mock-worker -- --token-file token --ca ca.crt

use anyhow::Result;
use clap::Parser;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tonic::{Request, Streaming};
use vicuna_protocol::auth::TokenFile;
use vicuna_protocol::batches::{Batches, Gathered};
use vicuna_protocol::inference::gateway_message::Body as FromGateway;
use vicuna_protocol::inference::worker_message::Body;
use vicuna_protocol::inference::workers_client::WorkersClient;
use vicuna_protocol::inference::{
    Cancel, Delta, Done, GatewayMessage, Generate, Load, ModelOffer, WorkerHello, WorkerMessage,
};
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
    /// Between two steps; 0: as fast as it goes.
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
    let batched = Arc::new(AtomicBool::new(false));
    let messages = Batches::new(messages, batched.clone());
    let request = TokenFile::new(&options.token_file).sign(Request::new(messages))?;
    let inbound = WorkersClient::new(channel).attach(request).await?.into_inner();
    tokio::spawn(report(outbound.clone(), options.slots));
    // Not by this thread, which each message would wake.
    tokio::spawn(async move { serve(inbound, outbound, &batched, &options).await }).await?
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

/// Steps as an engine does: each is a token of every answer, and what has come since joins the next one.
async fn serve(
    mut inbound: Streaming<GatewayMessage>,
    outbound: mpsc::Sender<WorkerMessage>,
    batched: &AtomicBool,
    options: &Options,
) -> Result<()> {
    let interval = Duration::from_millis(options.interval_ms);
    let (mut answers, mut next_step): (Vec<Answer>, _) = (Vec::new(), Instant::now());
    loop {
        tokio::select! {
            biased;
            message = inbound.message() => match message?.map(|message| message.body) {
                None => return Ok(()),
                Some(Some(FromGateway::Welcome(welcome))) => batched.store(welcome.takes_batches, Ordering::Relaxed),
                Some(Some(FromGateway::Generate(generate))) => {
                    let mut answer = Answer::new(generate, options.tokens);
                    // Its prompt is read at once.
                    answer.step(&outbound).await?;
                    answers.extend(Some(answer).filter(|answer| !answer.done));
                }
                Some(Some(FromGateway::Cancel(cancel))) => answers.retain(|answer| !answer.is(&cancel)),
                Some(_) => {}
            },
            () = due(next_step), if !answers.is_empty() => {
                for answer in &mut answers {
                    answer.step(&outbound).await?;
                }
                answers.retain(|answer| !answer.done);
                next_step = Instant::now() + interval;
            }
        }
    }
}

/// The timer knows whole milliseconds only.
async fn due(step: Instant) {
    if step > Instant::now() {
        sleep_until(step).await;
    }
}

struct Answer {
    generate: Generate,
    position: u32,
    count: u32,
    gathered: Gathered,
    done: bool,
}

impl Answer {
    fn new(generate: Generate, longest: u32) -> Self {
        let wanted = generate.sampling.as_ref().map_or(0, |sampling| sampling.max_tokens);
        let count = if wanted == 0 { longest } else { wanted.min(longest) };
        let position = generate.generated.len() as u32;
        Self { generate, position, count, gathered: Gathered::default(), done: false }
    }

    fn is(&self, cancelled: &Cancel) -> bool {
        (&self.generate.request, self.generate.choice) == (&cancelled.request, cancelled.choice)
    }

    /// The next token, and the end after the last one.
    async fn step(&mut self, outbound: &mpsc::Sender<WorkerMessage>) -> Result<()> {
        let (request, choice) = (&self.generate.request, self.generate.choice);
        if self.position < self.count {
            let first = self.position == self.generate.generated.len() as u32;
            let delta = Delta {
                request: request.clone(),
                choice,
                position: self.position,
                tokens: vec![self.position],
                text: "word ".into(),
                prompt_tokens: u32::from(first),
                ..Delta::default()
            };
            let told = if self.generate.whole { self.gathered.add(delta, Instant::now().into()) } else { Some(delta) };
            if let Some(delta) = told {
                send(outbound, Body::Delta(delta)).await?;
            }
            self.position += 1;
        }
        self.done = self.position >= self.count;
        if !self.done {
            return Ok(());
        }
        if let Some(delta) = self.gathered.take() {
            send(outbound, Body::Delta(delta)).await?;
        }
        let done = Done {
            request: request.clone(),
            choice,
            finish_reason: "length".into(),
            prompt_tokens: 1,
            completion_tokens: self.count,
            ..Done::default()
        };
        send(outbound, Body::Done(done)).await
    }
}
