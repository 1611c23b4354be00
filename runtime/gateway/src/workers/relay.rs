//! A worker outside the cluster that reaches one gateway only, by way of a load balancer, is passed on: this gateway
//! attaches it to all others in its name and with its token. They see a worker like any; what they send it goes down the
//! one stream that there is, and what it answers goes to whoever asked, told by the request's id.
//!
//! A gateway that the worker reaches by itself, this one too, refuses the second connection of one process.

use super::connection::Connection;
use parking_lot::Mutex;
use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::{Request, Status};
use vicuna_protocol::batches::Batches;
use vicuna_protocol::inference::workers_client::WorkersClient;
use vicuna_protocol::inference::{
    Cancel, ModelOffer, WorkerHello, WorkerMessage, gateway_message::Body as ToWorker, worker_message::Body,
};
use vicuna_protocol::redial::Pauses;
use vicuna_protocol::tls;

/// Marks a call as passed on, so that it is not passed on again. Whoever lies about it is attached to one gateway.
const MARK: &str = "x-vicuna-relayed-by";
const GATEWAY_NAME: &str = "vicuna-gateway";
const RESOLVE_EVERY: Duration = Duration::from_secs(5);
/// Messages that another gateway may be behind.
const OUTBOUND: usize = 4096;
const MAX_PEERS: usize = 64;

/// Where the other gateways are.
#[derive(Clone, Debug)]
pub struct Peers {
    /// Host and port; every address of the host is a gateway.
    pub host: String,
    pub port: u16,
    pub ca_file: PathBuf,
    /// Of this gateway, in their logs.
    pub name: String,
}

/// Whether a call has been passed on by another gateway.
pub fn is_relayed(metadata: &MetadataMap) -> bool {
    metadata.contains_key(MARK)
}

/// One worker's connections to the other gateways, which end when this is dropped.
pub struct Relay {
    shared: Arc<Shared>,
    _follows: AbortOnDropHandle<()>,
}

struct Shared {
    peers: Peers,
    worker: Arc<Connection>,
    hello: WorkerHello,
    /// The worker's, as it was renewed last.
    token: Mutex<AsciiMetadataValue>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    peers: HashMap<u64, Peer>,
    /// By request: who asked for it.
    routes: HashMap<String, Route>,
    /// What the worker has now.
    offers: Vec<ModelOffer>,
}

struct Peer {
    messages: mpsc::Sender<WorkerMessage>,
    /// Cancelled where it does not read.
    broken: CancellationToken,
}

struct Route {
    peer: u64,
    choices: BTreeSet<u32>,
}

impl Relay {
    pub fn start(peers: Peers, worker: Arc<Connection>, hello: WorkerHello, token: AsciiMetadataValue) -> Self {
        let state = Mutex::new(State { offers: hello.models.clone(), ..State::default() });
        let shared = Arc::new(Shared { peers, worker, hello, token: Mutex::new(token), state });
        let follows = AbortOnDropHandle::new(tokio::spawn(follow(shared.clone())));
        Self { shared, _follows: follows }
    }

    /// The next calls to the others carry this token.
    pub fn renew(&self, token: AsciiMetadataValue) {
        *self.shared.token.lock() = token;
    }

    /// Hands a worker's message to the gateway that it is for; tells whether it was for another one. What is for all
    /// is for this one, too.
    pub fn passes_on(&self, body: &Body) -> bool {
        let mut state = self.shared.state.lock();
        let Some((request, choice, ends)) = about(body) else {
            if let Body::Offers(offers) = body {
                state.offers.clone_from(&offers.models);
            }
            if matches!(body, Body::Load(_) | Body::Draining(_) | Body::Offers(_)) {
                state.peers.values().for_each(|peer| peer.send(body.clone()));
            }
            return false;
        };
        let Some(peer) = state.routes.get(request).map(|route| route.peer) else {
            return false;
        };
        if ends {
            state.forget(request, choice);
        }
        if let Some(peer) = state.peers.get(&peer) {
            peer.send(body.clone());
        }
        true
    }
}

impl Peer {
    fn send(&self, body: Body) {
        if self.messages.try_send(WorkerMessage { body: Some(body) }).is_err() {
            self.broken.cancel();
        }
    }
}

/// Request, choice, and whether this is the last of it; none for what is about no request.
fn about(body: &Body) -> Option<(&str, u32, bool)> {
    match body {
        Body::Delta(delta) => Some((&delta.request, delta.choice, false)),
        Body::PromptScores(scores) => Some((&scores.request, scores.choice, false)),
        Body::Progress(progress) => Some((&progress.request, progress.choice, false)),
        Body::Done(done) => Some((&done.request, done.choice, true)),
        Body::Failure(failure) => Some((&failure.request, failure.choice, true)),
        Body::Embeddings(answer) => Some((&answer.request, 0, true)),
        Body::TokenCount(answer) => Some((&answer.request, 0, true)),
        Body::Transcript(answer) => Some((&answer.request, 0, true)),
        Body::Hello(_)
        | Body::Load(_)
        | Body::Draining(_)
        | Body::Offers(_)
        | Body::Batch(_)
        | Body::TokenRenewed(_) => None,
    }
}

/// Keeps a connection to every address of the gateways.
async fn follow(shared: Arc<Shared>) {
    let mut known: HashMap<SocketAddr, AbortOnDropHandle<()>> = HashMap::new();
    loop {
        match tokio::net::lookup_host((shared.peers.host.as_str(), shared.peers.port)).await {
            Ok(found) => {
                let found: BTreeSet<_> = found.take(MAX_PEERS).collect();
                known.retain(|address, _| found.contains(address));
                for address in found {
                    let stay = || AbortOnDropHandle::new(tokio::spawn(stay_attached(shared.clone(), address)));
                    known.entry(address).or_insert_with(stay);
                }
            }
            Err(error) => tracing::warn!(%error, host = shared.peers.host, "cannot look up the other gateways"),
        }
        sleep(RESOLVE_EVERY).await;
    }
}

async fn stay_attached(shared: Arc<Shared>, address: SocketAddr) {
    let mut pauses = Pauses::default();
    loop {
        let started = tokio::time::Instant::now();
        let worker = &*shared.worker.worker;
        match attach(&shared, address).await {
            Err(status) if status.code() == tonic::Code::AlreadyExists => {
                tracing::debug!(worker, %address, "the gateway has this worker already");
            }
            Err(status) if status.code() == tonic::Code::Unauthenticated => {
                tracing::error!(
                    worker, %address, %status,
                    "the other gateway refuses the worker's token; write a new one into the worker's --token-file"
                );
            }
            Err(status) => tracing::warn!(worker, %address, %status, "cannot pass the worker on"),
            Ok(()) => tracing::info!(worker, %address, "the other gateway's stream ended"),
        }
        sleep(pauses.after(started.elapsed())).await;
    }
}

/// Until the other gateway's stream ends.
async fn attach(shared: &Arc<Shared>, address: SocketAddr) -> Result<(), Status> {
    let unusable = |error: &dyn std::fmt::Display| Status::unavailable(error.to_string());
    let url = format!("https://{address}");
    let channel = tls::channel(&url, &shared.peers.ca_file, GATEWAY_NAME).map_err(|error| unusable(&error))?;
    let (messages, outbound) = mpsc::channel(OUTBOUND);
    let hello = WorkerHello { models: shared.state.lock().offers.clone(), ..shared.hello.clone() };
    messages.try_send(WorkerMessage { body: Some(Body::Hello(hello)) }).map_err(|error| unusable(&error))?;
    let batched = Arc::new(AtomicBool::new(false));
    let mut call = Request::new(Batches::new(outbound, batched.clone()));
    call.metadata_mut().insert("authorization", shared.token.lock().clone());
    let name = shared.peers.name.parse().map_err(|_| Status::internal("this gateway's name cannot be sent"))?;
    call.metadata_mut().insert(MARK, name);
    let mut inbound = WorkersClient::new(channel).attach(call).await?.into_inner();
    let broken = CancellationToken::new();
    let entered = Entered::new(shared.clone(), Peer { messages, broken: broken.clone() });
    loop {
        let message = tokio::select! {
            message = inbound.message() => message?,
            () = broken.cancelled() => return Err(Status::resource_exhausted("the other gateway does not read")),
        };
        match message.map(|message| message.body) {
            None => return Ok(()),
            Some(None) => {}
            Some(Some(ToWorker::Welcome(welcome))) => batched.store(welcome.takes_batches, Ordering::Relaxed),
            Some(Some(body)) => entered.forward(body)?,
        }
    }
}

/// Another gateway to which the worker is attached.
struct Entered {
    shared: Arc<Shared>,
    id: u64,
}

impl Entered {
    fn new(shared: Arc<Shared>, peer: Peer) -> Self {
        let id = {
            let mut state = shared.state.lock();
            state.next += 1;
            let id = state.next;
            state.peers.insert(id, peer);
            id
        };
        Self { shared, id }
    }

    /// To the worker, whose answer is for this gateway.
    fn forward(&self, body: ToWorker) -> Result<(), Status> {
        let mut state = self.shared.state.lock();
        match &body {
            ToWorker::Generate(generate) => state.route(&generate.request, generate.choice, self.id),
            ToWorker::Embed(embed) => state.route(&embed.request, 0, self.id),
            ToWorker::TranscriptOf(of) => state.route(&of.request, 0, self.id),
            ToWorker::CountTokens(count) => state.route(&count.request, 0, self.id),
            ToWorker::Cancel(cancel) => state.forget(&cancel.request, cancel.choice),
            ToWorker::Welcome(_) | ToWorker::LoadModel(_) => {}
        }
        drop(state);
        match self.shared.worker.send(body) {
            true => Ok(()),
            false => Err(Status::unavailable("the worker does not read")),
        }
    }
}

impl State {
    fn route(&mut self, request: &str, choice: u32, peer: u64) {
        let route = self.routes.entry(request.to_owned()).or_insert_with(|| Route { peer, choices: BTreeSet::new() });
        route.peer = peer;
        route.choices.insert(choice);
    }

    fn forget(&mut self, request: &str, choice: u32) {
        if let Some(route) = self.routes.get_mut(request) {
            route.choices.remove(&choice);
            if route.choices.is_empty() {
                self.routes.remove(request);
            }
        }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let lost: Vec<(String, Route)> = {
            let mut state = self.shared.state.lock();
            state.peers.remove(&self.id);
            state.routes.extract_if(|_, route| route.peer == self.id).collect()
        };
        // Its gateway may be gone: another one then asks what the worker remembers.
        for (request, route) in lost {
            for choice in route.choices {
                let cancel = Cancel { request: request.clone(), choice, keep: true };
                self.shared.worker.send(ToWorker::Cancel(cancel));
            }
        }
    }
}
