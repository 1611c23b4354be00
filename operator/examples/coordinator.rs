//! The coordinator of one training without Kubernetes, for benches: the operator's own membership and session over real
//! gRPC, with a record in memory and a certificate of its own. Nobody tells it that a process is gone: streams and peers do.
//!
//! Prints the port, and from then on a JSON line for all that happens.

use anyhow::{Context, Result, anyhow};
use async_trait::async_trait;
use clap::Parser;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};
use vicuna_operator::coordinator::membership::Target;
use vicuna_operator::coordinator::record::Record;
use vicuna_operator::coordinator::registry::{Clock, Opening};
use vicuna_operator::coordinator::report::Happening;
use vicuna_operator::coordinator::session::{RANK_MAILBOX, Session, SessionHandle};
use vicuna_operator::coordinator::store::{Owner, RecordStore, StoreError, Swap};
use vicuna_operator::metrics::Metrics;
use vicuna_protocol::coordinator::coordinator_server::{Coordinator, CoordinatorServer};
use vicuna_protocol::coordinator::rank_message::Body;
use vicuna_protocol::coordinator::{CoordinatorMessage, RankMessage};

#[derive(Parser)]
struct Options {
    /// The training job as JSON, as ranks get it.
    #[arg(long)]
    job: PathBuf,
    /// The certificate that ranks have to trust is written there.
    #[arg(long)]
    ca: PathBuf,
    #[arg(long, default_value_t = 1)]
    min: usize,
    #[arg(long, default_value_t = 2)]
    max: usize,
}

#[derive(Default)]
struct InMemory(Option<Record>);

#[async_trait]
impl RecordStore for InMemory {
    async fn read(&mut self) -> Result<Option<Record>, StoreError> {
        Ok(self.0.clone())
    }

    async fn swap(&mut self, record: &Record) -> Result<Swap, StoreError> {
        self.0 = Some(record.clone());
        Ok(Swap::Written)
    }
}

struct Service {
    session: SessionHandle,
    streams: AtomicU64,
}

#[async_trait]
impl Coordinator for Service {
    type JoinStream = Pin<Box<dyn Stream<Item = Result<CoordinatorMessage, Status>> + Send>>;

    async fn join(&self, request: Request<Streaming<RankMessage>>) -> Result<Response<Self::JoinStream>, Status> {
        let mut said = request.into_inner();
        let Some(RankMessage { body: Some(Body::Hello(hello)) }) = said.message().await? else {
            return Err(Status::invalid_argument("the first message must be Hello"));
        };
        let (sender, answers) = mpsc::channel(RANK_MAILBOX);
        let (session, pod) = (self.session.clone(), hello.pod_uid.clone());
        let stream = self.streams.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            session.joined(stream, hello, sender).await?;
            while let Ok(Some(message)) = said.message().await {
                if let Some(body) = message.body {
                    session.said(stream, &pod, body).await?;
                }
            }
            session.closed(stream, &pod).await
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    rustls::crypto::aws_lc_rs::default_provider().install_default().map_err(|_| anyhow!("two TLS providers"))?;
    let job = std::fs::read_to_string(&options.job).with_context(|| format!("no job {}", options.job.display()))?;
    let certificate = rcgen::generate_simple_self_signed(["vicuna-operator".to_owned()])?;
    std::fs::write(&options.ca, certificate.cert.pem())?;
    let identity = Identity::from_pem(certificate.cert.pem(), certificate.signing_key.serialize_pem());
    let (told, mut happenings) = mpsc::channel(1024);
    let session = open(job, Target { min: options.min, max: options.max, suspend: false, any_class: false }, told)?;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", json!({ "port": listener.local_addr()?.port() }));
    tokio::spawn(async move {
        while let Some((_, happened)) = happenings.recv().await {
            happened.iter().for_each(|happening| println!("{}", line(happening)));
        }
    });
    Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(3)))
        .http2_keepalive_timeout(Some(Duration::from_secs(2)))
        .tls_config(ServerTlsConfig::new().identity(identity))?
        .add_service(CoordinatorServer::new(Service { session, streams: AtomicU64::default() }))
        .serve_with_incoming(TcpListenerStream::new(listener))
        .await?;
    Ok(())
}

type Told = mpsc::Sender<vicuna_operator::coordinator::registry::Told>;

fn open(job: String, target: Target, told: Told) -> Result<SessionHandle> {
    let (namespace, name) = ("bench".to_owned(), "bench".to_owned());
    let owner = Owner {
        namespace: namespace.clone(),
        name: name.clone(),
        uid: "bench".to_owned(),
        reference: Default::default(),
    };
    let opening = Opening {
        owner,
        job,
        target,
        reproducibility: Default::default(),
        counters: Default::default(),
        began_at: None,
        checkpoint: None,
    };
    let metrics = Arc::new(Metrics::new()?);
    let session = Session::start((namespace, name), opening, Box::<InMemory>::default(), Clock::start(), metrics, told);
    // Who says hello is there; who is gone is not said.
    session.set_pods(Default::default());
    Ok(session)
}

fn line(happening: &Happening) -> Value {
    let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    match happening {
        Happening::Stepped(step) => json!({ "at": at, "step": step.step, "generation": step.generation }),
        Happening::Formed { generation, members, base_step, .. } => {
            json!({ "at": at, "formed": members, "generation": generation, "baseStep": base_step })
        }
        Happening::StepsLost { steps, .. } => json!({ "at": at, "lost": steps }),
        Happening::Recovered { after_ms, phases, .. } => json!({
            "at": at, "recoveredAfterMs": after_ms,
            "phasesMs": [phases.detect, phases.agree, phases.restore, phases.step]
        }),
        other => json!({ "at": at, "other": format!("{other:?}") }),
    }
}
