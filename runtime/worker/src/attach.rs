//! Connections to gateways. The worker dials out: it resolves the gateways' host name every few
//! seconds and keeps one stream to each address.

use crate::completion::{Completion, Vocabulary};
use crate::embedding::Embedder;
use crate::health::{Health, explain};
use crate::models::{Absent, Models};
use crate::prompt::{prompt_ids, text_ids};
use crate::scheduler::{Command, Connection, Handle, Job, Occupancy, Refusal, Replies, Task};
use crate::transcripts::within_a_message;
use anyhow::{Context, Result, anyhow, bail};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Status, Streaming};
use vicuna_data::template::Encoder;
use vicuna_protocol::auth::{TokenFile, bearer};
use vicuna_protocol::batches::Batches;
use vicuna_protocol::inference::failure::Code;
use vicuna_protocol::inference::gateway_message::Body as FromGateway;
use vicuna_protocol::inference::worker_message::Body;
use vicuna_protocol::inference::workers_client::WorkersClient;
use vicuna_protocol::inference::{
    Cancel, CountTokens, Draining, Embed, EmbedInput, GatewayMessage, GatewayWelcome, Generate, Load, ModelOffers,
    TokenCount, TokenRenewed, Transcript, WorkerHello,
};
use vicuna_protocol::redial::Pauses;

const RESOLVE_EVERY: Duration = Duration::from_secs(5);
const LOAD_EVERY: Duration = Duration::from_secs(1);
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for the last messages to leave when the worker ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// Messages that a gateway may be behind before its connection is given up.
const OUTGOING: usize = 4096;
/// Gateways dialled at most; more addresses than this are a mistake of the name's owner.
const MAX_GATEWAYS: usize = 256;

/// Where the gateways are and how to be let in.
#[derive(Clone, Debug)]
pub struct Gateways {
    /// `https://host:port`; TLS unless it is `http`.
    pub url: String,
    pub server_name: String,
    /// None: what the token file holds besides the token, or what is mounted into pods.
    pub ca: Option<PathBuf>,
    pub token: TokenFile,
}

/// Where the operator's trust is mounted in pods.
const MOUNTED_CA: &str = "/etc/vicuna/trust/ca.crt";

impl Gateways {
    /// The file with the CA's certificate; looked for at every call, since the files may be written anew.
    fn ca(&self) -> Result<PathBuf> {
        match &self.ca {
            Some(ca) => Ok(ca.clone()),
            None if self.token.holds_certificates() => Ok(self.token.path().to_owned()),
            None if Path::new(MOUNTED_CA).exists() => Ok(MOUNTED_CA.into()),
            None => bail!(
                "there is no certificate to know the gateway by: put the CA's into {} beside the token, or name its file with \
                 --ca",
                self.token.path().display()
            ),
        }
    }
}

/// What every connection shares.
pub struct Shared {
    pub gateways: Gateways,
    /// Without what is offered, which changes.
    pub hello: WorkerHello,
    pub models: Arc<Models>,
    pub health: Arc<Health>,
    /// Tokens generated since the start.
    pub tokens: prometheus::IntCounter,
    /// Unix time in ms at which the worker leaves, once it knows.
    pub draining: watch::Receiver<Option<u64>>,
    /// Cancelled when the last messages should leave.
    pub closing: CancellationToken,
}

/// One model and what runs it.
pub struct Lane {
    /// Which of the engine's adapters computes it; `None`: the bare model.
    pub adapter: Option<usize>,
    pub encoder: Encoder,
    pub vocabulary: Vocabulary,
    pub scheduler: Handle,
    used: Mutex<Instant>,
}

impl Lane {
    pub fn new(adapter: Option<usize>, encoder: Encoder, vocabulary: Vocabulary, scheduler: Handle) -> Self {
        Self { adapter, encoder, vocabulary, scheduler, used: Mutex::new(Instant::now()) }
    }

    /// When something was last asked of it.
    pub fn used(&self) -> Instant {
        *self.used.lock()
    }
}

impl Shared {
    /// One that is not loaded is, from now on, wanted; its request goes back to its gateway.
    fn lane(&self, model: &str) -> Result<Arc<Lane>, Refusal> {
        let lane = self.models.lane(model).map_err(|absent| match absent {
            Absent::Unknown => Refusal::from(format!("this worker does not serve {model:?}")),
            Absent::OnRequest => {
                self.models.want(model);
                Refusal { code: Code::Overloaded, ..format!("{model:?} is not loaded").into() }
            }
        })?;
        *lane.used.lock() = Instant::now();
        Ok(lane)
    }

    fn hello(&self) -> WorkerHello {
        WorkerHello { models: self.models.offers(), ..self.hello.clone() }
    }

    /// To the schedulers of all models.
    async fn tell_all(&self, command: impl Fn() -> Command) {
        for scheduler in self.models.schedulers() {
            scheduler.send(command()).await;
        }
    }
}

/// Keeps a stream to every gateway until `closing`, then waits for the streams to end.
pub async fn run(shared: Arc<Shared>) {
    let tasks = TaskTracker::new();
    let mut known: HashMap<SocketAddr, CancellationToken> = HashMap::new();
    while !shared.closing.is_cancelled() {
        match resolve(&shared.gateways.url).await {
            Ok(addresses) => follow(&shared, &addresses, &mut known, &tasks),
            Err(error) => tracing::warn!(error = explain(&error), "cannot resolve the gateways"),
        }
        tokio::select! {
            () = tokio::time::sleep(RESOLVE_EVERY) => {}
            () = shared.closing.cancelled() => {}
        }
    }
    tasks.close();
    if tokio::time::timeout(FLUSH_TIMEOUT, tasks.wait()).await.is_err() {
        tracing::warn!("a gateway did not take the last messages in time");
    }
}

/// Dials new addresses; an address that is gone is not dialled again once its stream ends.
fn follow(
    shared: &Arc<Shared>,
    addresses: &[SocketAddr],
    known: &mut HashMap<SocketAddr, CancellationToken>,
    tasks: &TaskTracker,
) {
    known.retain(|address, unwanted| {
        let wanted = addresses.contains(address);
        if !wanted {
            unwanted.cancel();
        }
        wanted
    });
    for address in addresses.iter().take(MAX_GATEWAYS) {
        known.entry(*address).or_insert_with(|| {
            let unwanted = shared.closing.child_token();
            tasks.spawn(stay_attached(shared.clone(), *address, unwanted.clone()));
            unwanted
        });
    }
}

async fn resolve(url: &str) -> Result<Vec<SocketAddr>> {
    let (_, host, port) = parts(url)?;
    let found = tokio::net::lookup_host((host.as_str(), port)).await;
    let mut addresses: Vec<SocketAddr> = found.with_context(|| format!("looking up {host}"))?.collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

/// Scheme, host and port.
fn parts(url: &str) -> Result<(String, String, u16)> {
    let uri: tonic::transport::Uri = url.parse().with_context(|| format!("{url:?} is not a URL"))?;
    match (uri.scheme_str(), uri.host(), uri.port_u16()) {
        (Some(scheme), Some(host), Some(port)) => {
            Ok((scheme.to_owned(), host.trim_matches(['[', ']']).to_owned(), port))
        }
        _ => bail!("{url:?} needs a scheme, a host and a port"),
    }
}

/// Attaches again whenever the stream ends, with growing pauses while that does not succeed.
async fn stay_attached(shared: Arc<Shared>, address: SocketAddr, unwanted: CancellationToken) {
    let mut pauses = Pauses::default();
    while !unwanted.is_cancelled() {
        let started = Instant::now();
        match attach(&shared, address).await {
            Ok(()) => tracing::info!(%address, "the gateway's stream ended"),
            Err(error) if has_code(&error, tonic::Code::AlreadyExists) => {
                tracing::debug!(%address, "the gateway has this worker by another address");
            }
            Err(error) if has_code(&error, tonic::Code::Unauthenticated) => {
                let file = shared.gateways.token.path().display();
                tracing::error!(%address, %file, error = explain(&error), "no stream to the gateway for want of a good token");
            }
            Err(error) => tracing::warn!(%address, error = explain(&error), "no stream to the gateway"),
        }
        tokio::select! {
            () = tokio::time::sleep(pauses.after(started.elapsed())) => {}
            () = unwanted.cancelled() => {}
        }
    }
}

fn has_code(error: &anyhow::Error, code: tonic::Code) -> bool {
    error.downcast_ref::<Status>().is_some_and(|status| status.code() == code)
}

/// One stream, from hello to its end.
async fn attach(shared: &Shared, address: SocketAddr) -> Result<()> {
    let (scheme, _, _) = parts(&shared.gateways.url)?;
    let gateways = &shared.gateways;
    let url = format!("{scheme}://{address}");
    let channel = match scheme.as_str() {
        "http" => tonic::transport::Endpoint::from_shared(url)?.connect_lazy(),
        _ => vicuna_protocol::tls::channel(&url, &gateways.ca()?, &gateways.server_name)?,
    };
    let (outgoing, messages) = mpsc::channel(OUTGOING);
    let broken = CancellationToken::new();
    let replies = Replies::new(outgoing, broken.clone());
    // From before the hello on: what is loaded while the call is under way must be told, too.
    let offers = shared.models.changes();
    replies.send(Body::Hello(shared.hello()));
    let batched = Arc::new(AtomicBool::new(false));
    let token = gateways.token.read()?;
    let mut request = Request::new(Batches::new(messages, batched.clone()));
    request.metadata_mut().insert("authorization", bearer(&token)?);
    let call = WorkersClient::new(channel);
    let answer = tokio::time::timeout(ATTACH_TIMEOUT, { call }.attach(request)).await;
    let incoming = answer.map_err(|_| anyhow!("no answer within {ATTACH_TIMEOUT:?}"))??.into_inner();
    Stream::new(shared, replies, batched, token).serve(incoming, offers, broken).await
}

/// One attached gateway.
struct Stream<'a> {
    shared: &'a Shared,
    connection: Connection,
    replies: Replies,
    welcomed: bool,
    /// Whether the gateway takes batches.
    batched: Arc<AtomicBool>,
    /// As the gateway knows it.
    token: String,
    meter: Meter,
}

impl Drop for Stream<'_> {
    fn drop(&mut self) {
        if self.welcomed {
            self.shared.health.detached();
        }
    }
}

impl<'a> Stream<'a> {
    fn new(shared: &'a Shared, replies: Replies, batched: Arc<AtomicBool>, token: String) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let connection = NEXT.fetch_add(1, Ordering::Relaxed);
        let meter = Meter { tokens: shared.tokens.get(), since: Instant::now() };
        Self { shared, connection, replies, welcomed: false, batched, token, meter }
    }

    /// Until the gateway ends the stream, or stops reading, or the worker closes.
    async fn serve(
        mut self,
        mut incoming: Streaming<GatewayMessage>,
        offers: watch::Receiver<u64>,
        broken: CancellationToken,
    ) -> Result<()> {
        let result = self.exchange(&mut incoming, offers, broken).await;
        let connection = self.connection;
        self.shared.tell_all(|| Command::Disconnected(connection)).await;
        if self.shared.closing.is_cancelled() {
            drop(self);
            // With our half closed the gateway reads what is left and closes its own.
            while incoming.message().await?.is_some() {}
        }
        result
    }

    /// `offers`: changes when the hello is no longer what there is.
    async fn exchange(
        &mut self,
        incoming: &mut Streaming<GatewayMessage>,
        mut offers: watch::Receiver<u64>,
        broken: CancellationToken,
    ) -> Result<()> {
        let mut draining = self.shared.draining.clone();
        let mut clock = tokio::time::interval(LOAD_EVERY);
        self.tell_draining(*draining.borrow_and_update());
        loop {
            tokio::select! {
                message = incoming.message() => match message? {
                    Some(message) => self.handle(message).await,
                    None => return Ok(()),
                },
                _ = clock.tick() => {
                    self.send_load();
                    self.tell_renewed();
                }
                Ok(()) = offers.changed() => {
                    let models = self.shared.models.offers();
                    self.replies.send(Body::Offers(ModelOffers { models }));
                }
                Ok(()) = draining.changed() => self.tell_draining(*draining.borrow_and_update()),
                () = broken.cancelled() => bail!("the gateway did not read {OUTGOING} messages"),
                () = self.shared.closing.cancelled() => return Ok(()),
            }
        }
    }

    async fn handle(&mut self, message: GatewayMessage) {
        match message.body {
            Some(FromGateway::Welcome(welcome)) => self.welcome(&welcome),
            Some(FromGateway::Generate(generate)) => self.submit(generate).await,
            Some(FromGateway::Cancel(cancel)) => self.cancel(cancel).await,
            Some(FromGateway::Embed(embed)) => self.embed(embed).await,
            Some(FromGateway::TranscriptOf(of)) => self.tell_transcript(of.request).await,
            Some(FromGateway::CountTokens(count)) => self.count_tokens(&count),
            Some(FromGateway::LoadModel(load)) => self.shared.models.want(&load.model),
            None => tracing::debug!("the gateway sent a message of a newer version"),
        }
    }

    fn welcome(&mut self, welcome: &GatewayWelcome) {
        self.batched.store(welcome.takes_batches, Ordering::Relaxed);
        if !std::mem::replace(&mut self.welcomed, true) {
            tracing::info!(gateway = welcome.gateway, "attached");
            self.shared.health.attached();
        }
    }

    async fn submit(&self, generate: Generate) {
        let (request, choice) = (generate.request.clone(), generate.choice);
        match self.prepare(generate) {
            Ok((scheduler, job)) => scheduler.send(Command::Submit(Box::new(job))).await,
            Err(refusal) => self.replies.send(refusal.body(&request, choice)),
        }
    }

    fn prepare(&self, generate: Generate) -> Result<(Handle, Job), Refusal> {
        let lane = self.shared.lane(&generate.model)?;
        let prompt = prompt_ids(&lane.encoder, lane.vocabulary.dialect, &generate)?;
        let too_long = prompt.len() >= lane.vocabulary.max_length;
        let completion = Completion::new(&generate, &prompt, &lane.vocabulary)
            .map_err(|message| Refusal { too_long, ..message.into() })?;
        let priority = generate.priority;
        let task = Task::Complete { prompt, completion, generate: Box::new(generate) };
        Ok((lane.scheduler.clone(), self.job(&lane, priority, task)))
    }

    async fn embed(&self, embed: Embed) {
        let request = embed.request.clone();
        match self.prepare_embedding(embed) {
            Ok((scheduler, job)) => scheduler.send(Command::Submit(Box::new(job))).await,
            Err(refusal) => self.replies.send(refusal.body(&request, 0)),
        }
    }

    fn prepare_embedding(&self, embed: Embed) -> Result<(Handle, Job), Refusal> {
        let lane = self.shared.lane(&embed.model)?;
        let ids = |input: EmbedInput| match input.tokens.is_empty() {
            true => text_ids(&lane.encoder, &[], Some(&input.text)),
            false => Ok(input.tokens),
        };
        let inputs = embed.inputs.into_iter().map(ids).collect::<Result<Vec<_>, _>>()?;
        let (size, max_length) = (lane.vocabulary.size, lane.vocabulary.max_length);
        let embedder = Embedder::new(embed.request, inputs, size, max_length)?;
        Ok((lane.scheduler.clone(), self.job(&lane, 0, Task::Embed(embedder))))
    }

    fn job(&self, lane: &Lane, priority: i32, task: Task) -> Job {
        Job::new(self.connection, priority, lane.adapter, task, self.replies.clone())
    }

    async fn cancel(&self, cancel: Cancel) {
        let connection = self.connection;
        let Cancel { request, choice, keep } = cancel;
        self.shared.tell_all(|| Command::Cancel { connection, request: request.clone(), choice, keep }).await;
    }

    /// One answer from all models' schedulers, which may be amid a step.
    async fn tell_transcript(&self, request: String) {
        let mut answers = Vec::new();
        for scheduler in self.shared.models.schedulers() {
            let (answer, answered) = oneshot::channel();
            scheduler.send(Command::TranscriptOf { request: request.clone(), answer }).await;
            answers.push(answered);
        }
        let replies = self.replies.clone();
        tokio::spawn(async move {
            let found = futures::future::join_all(answers).await;
            let choices = within_a_message(found.into_iter().flatten().flatten().collect());
            replies.send(Body::Transcript(Transcript { request, choices }));
        });
    }

    fn count_tokens(&self, count: &CountTokens) {
        let counted = self.shared.lane(&count.model).and_then(|lane| {
            let ids = text_ids(&lane.encoder, &count.messages, count.prompt.as_deref())?;
            Ok((ids.len() as u32, lane.vocabulary.max_length as u32))
        });
        match counted {
            Ok((tokens, max_length)) => {
                let request = count.request.clone();
                self.replies.send(Body::TokenCount(TokenCount { request, tokens, max_length }));
            }
            Err(refusal) => self.replies.send(refusal.body(&count.request, 0)),
        }
    }

    fn tell_draining(&self, deadline_ms: Option<u64>) {
        if let Some(deadline_ms) = deadline_ms {
            self.replies.send(Body::Draining(Draining { deadline_ms }));
        }
    }

    /// Whoever passes this worker on to other gateways does so with its token.
    fn tell_renewed(&mut self) {
        // One that cannot be read is complained of at the next call.
        if let Ok(token) = self.shared.gateways.token.read()
            && token != self.token
        {
            self.replies.send(Body::TokenRenewed(TokenRenewed { token: token.clone() }));
            self.token = token;
        }
    }

    fn send_load(&mut self) {
        let now = occupancy(&self.shared.models.schedulers());
        self.replies.send(Body::Load(Load {
            running: now.running as u32,
            waiting: now.waiting as u32,
            slots: self.shared.hello.slots,
            tokens_per_second: self.meter.rate(self.shared.tokens.get()),
            kv_tokens_free: now.free_tokens as u64,
            kv_tokens: now.total_tokens as u64,
        }));
    }
}

/// Of several schedulers together.
pub fn occupancy(schedulers: &[Handle]) -> Occupancy {
    schedulers.iter().map(|scheduler| *scheduler.occupancy().borrow()).fold(Occupancy::default(), |sum, one| {
        Occupancy {
            running: sum.running + one.running,
            waiting: sum.waiting + one.waiting,
            free_tokens: sum.free_tokens + one.free_tokens,
            total_tokens: sum.total_tokens + one.total_tokens,
        }
    })
}

/// Tokens per second between two readings of a counter.
struct Meter {
    tokens: u64,
    since: Instant,
}

impl Meter {
    fn rate(&mut self, tokens: u64) -> f64 {
        let seconds = self.since.elapsed().as_secs_f64();
        let generated = tokens.saturating_sub(self.tokens) as f64;
        *self = Self { tokens, since: Instant::now() };
        if seconds > 0.0 { generated / seconds } else { 0.0 }
    }
}

#[cfg(test)]
mod tests;
