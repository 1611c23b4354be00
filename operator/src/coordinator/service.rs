//! The gRPC side: who calls is decided by the token and the pod cache, never by the message.

use super::feed::belongs_to;
use super::session::{RANK_MAILBOX, RankSender, SessionHandle};
use crate::config::TRAINING_LABEL;
use crate::context::Context;
use crate::pki::Connection;
use kube::ResourceExt;
use kube::runtime::reflector::ObjectRef;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};
use vicuna_protocol::auth::Caller;
use vicuna_protocol::coordinator::coordinator_server::{Coordinator, CoordinatorServer};
use vicuna_protocol::coordinator::load_reports_server::{LoadReports, LoadReportsServer};
use vicuna_protocol::coordinator::rank_message::Body;
use vicuna_protocol::coordinator::{CoordinatorMessage, Hello, LoadAck, LoadReport, RankMessage};

const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// A rank that is cut off is known to be away about when its peers say that they have lost it.
const KEEP_ALIVE: Duration = Duration::from_secs(3);
const ALIVE_WITHIN: Duration = Duration::from_secs(2);
const MAX_MESSAGE_BYTES: usize = 1 << 20;
const MAX_STREAMS_OF_A_CONNECTION: u32 = 16;

/// Serves ranks and gateways on connections that have shaken hands, until stopped. Only the leader does so.
pub async fn serve(
    context: Arc<Context>,
    connections: impl Stream<Item = io::Result<Connection>>,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let service = Service::new(context);
    Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(ALIVE_WITHIN))
        .max_concurrent_streams(MAX_STREAMS_OF_A_CONNECTION)
        .add_service(CoordinatorServer::new(service.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(LoadReportsServer::new(service).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .serve_with_incoming_shutdown(connections, stop.cancelled_owned())
        .await
}

#[derive(Clone)]
pub(crate) struct Service {
    context: Arc<Context>,
    streams: Arc<AtomicU64>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Coordinator for Service {
    type JoinStream = Answers<CoordinatorMessage>;

    async fn join(&self, request: Request<Streaming<RankMessage>>) -> Result<Response<Self::JoinStream>, Status> {
        let caller = self.authenticate(&request)?;
        let mut messages = request.into_inner();
        let hello = first_hello(&mut messages).await?;
        let answers = self.take(&caller, hello, messages)?;
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

impl Service {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self { context, streams: Arc::default() }
    }

    /// Takes the stream of a rank that has said hello: what it is told comes out.
    pub(crate) fn take(
        &self,
        caller: &Caller,
        hello: Hello,
        messages: impl Stream<Item = Result<RankMessage, Status>> + Send + Unpin + 'static,
    ) -> Result<mpsc::Receiver<Result<CoordinatorMessage, Status>>, Status> {
        self.check_leads()?;
        let session = self.session_of(caller, &hello)?;
        let (sender, answers) = mpsc::channel(RANK_MAILBOX);
        let rank = RankStream { id: self.streams.fetch_add(1, Ordering::Relaxed), pod: hello.pod_uid.clone(), session };
        tokio::spawn(rank.run(hello, messages, sender));
        Ok(answers)
    }

    fn check_leads(&self) -> Result<(), Status> {
        match self.context.leadership.check() {
            Ok(()) => Ok(()),
            Err(_) => Err(Status::unavailable("this operator is not the leader: call again")),
        }
    }

    fn authenticate<T>(&self, request: &Request<T>) -> Result<Caller, Status> {
        let keys = self.context.trust.keys();
        let caller = keys.verifier.verify_call(request.metadata())?;
        self.check_leads()?;
        Ok(caller)
    }

    /// The session of the training whose pod calls.
    fn session_of(&self, caller: &Caller, hello: &Hello) -> Result<SessionHandle, Status> {
        let (Some(pod_uid), Some(pod_name)) = (&caller.pod_uid, &caller.pod_name) else {
            return Err(Status::permission_denied("the token is not bound to a pod: use a projected one"));
        };
        if *pod_uid != hello.pod_uid {
            return Err(Status::permission_denied("the hello names another pod than the token"));
        }
        let unknown =
            || Status::unavailable(format!("pod {pod_name} is not one of a training that is coordinated here (yet)"));
        let reference = ObjectRef::new(pod_name).within(&caller.namespace);
        let pod = self.context.watches.pods.get(&reference).ok_or_else(unknown)?;
        if pod.metadata.uid.as_ref() != Some(pod_uid) {
            return Err(unknown());
        }
        let training = pod.labels().get(TRAINING_LABEL).ok_or_else(unknown)?;
        let session = self.context.coordinator.get(&caller.namespace, training).ok_or_else(unknown)?;
        if !belongs_to(&pod, session.uid()) {
            return Err(Status::permission_denied("the pod belongs to a former training of this name"));
        }
        Ok(session)
    }
}

async fn first_hello(messages: &mut Streaming<RankMessage>) -> Result<Hello, Status> {
    let first = tokio::time::timeout(HELLO_WITHIN, messages.message())
        .await
        .map_err(|_| Status::deadline_exceeded("no hello came in time"))??;
    match first.and_then(|message| message.body) {
        Some(Body::Hello(hello)) => Ok(hello),
        _ => Err(Status::invalid_argument("the first message must be Hello")),
    }
}

/// One rank's stream. The session alone holds the sender of the answers: by dropping it, it ends the call.
struct RankStream {
    id: u64,
    pod: String,
    session: SessionHandle,
}

impl RankStream {
    async fn run<M>(self, hello: Hello, messages: M, sender: RankSender)
    where
        M: Stream<Item = Result<RankMessage, Status>> + Send + Unpin,
    {
        tracing::info!(pod = hello.pod_name, node = hello.node, generation = hello.generation, "a rank says hello");
        if self.session.joined(self.id, hello, sender).await.is_err() {
            return;
        }
        self.pass_on(messages).await;
        // The session ended: nobody needs to know.
        let _ = self.session.closed(self.id, &self.pod).await;
    }

    async fn pass_on(&self, mut messages: impl Stream<Item = Result<RankMessage, Status>> + Unpin) {
        while let Some(message) = messages.next().await {
            match message {
                Ok(RankMessage { body: Some(body) }) => {
                    if self.session.said(self.id, &self.pod, body).await.is_err() {
                        return;
                    }
                }
                Ok(RankMessage { body: None }) => {}
                Err(status) => {
                    tracing::debug!(pod = self.pod, %status, "a rank's stream broke");
                    return;
                }
            }
        }
    }
}

#[tonic::async_trait]
impl LoadReports for Service {
    type ReportStream = Answers<LoadAck>;

    async fn report(&self, request: Request<Streaming<LoadReport>>) -> Result<Response<Self::ReportStream>, Status> {
        let caller = self.authenticate(&request)?;
        let config = &self.context.config;
        if caller.namespace != config.namespace || caller.service_account != config.gateway_service_account {
            return Err(Status::permission_denied(format!(
                "only {}/{} may report load",
                config.namespace, config.gateway_service_account
            )));
        }
        let gateway = caller.pod_name.ok_or_else(|| Status::permission_denied("the token is not bound to a pod"))?;
        let (sender, answers) = mpsc::channel(1);
        tokio::spawn(take_reports(self.context.clone(), gateway, request.into_inner(), sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

async fn take_reports(
    context: Arc<Context>,
    gateway: String,
    mut reports: Streaming<LoadReport>,
    answers: mpsc::Sender<Result<LoadAck, Status>>,
) {
    loop {
        match reports.message().await {
            Ok(Some(report)) => {
                // The token's pod, so that no gateway speaks for another.
                let report = LoadReport { gateway: gateway.clone(), ..report };
                context.loads.record(report, Instant::now());
                let ack = LoadAck { models: context.loads.served(Instant::now()) };
                if answers.send(Ok(ack)).await.is_err() {
                    return;
                }
            }
            // It says goodbye. One that breaks off is stale for a while, and not forgotten.
            Ok(None) => return context.loads.forget(&gateway),
            Err(status) => {
                tracing::warn!(gateway, %status, "a gateway's load reports broke off");
                return;
            }
        }
    }
}
