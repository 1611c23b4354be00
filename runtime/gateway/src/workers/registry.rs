//! Which workers are attached and which answers wait for one. Nothing is stored: workers attach
//! again after a restart.
//!
//! One lock holds the decisions (who is there, who waits); each connection has its own for the
//! answers on it, so that tokens do not contend. Order of locks: registry, connection, choice.

use crate::choice::{Choice, Loss, Server, Variant};
use crate::metrics::Metrics;
use crate::routing::{Candidate, Policy};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use vicuna_protocol::inference::{Cancel, GatewayMessage, Load, ModelOffer, WorkerHello, gateway_message::Body};

/// How long a model is remembered whose workers are all gone.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// Models remembered, at most.
const MAX_MODELS: usize = 1024;

type Outbound = mpsc::Sender<Result<GatewayMessage, Status>>;

/// One attached worker.
#[derive(Debug)]
pub struct Connection {
    pub id: u64,
    pub worker: String,
    namespace: String,
    slots: u32,
    offers: Vec<ModelOffer>,
    outbound: Outbound,
    /// Cancelled once it is out of the registry, whoever put it out.
    pub gone: CancellationToken,
    active: Mutex<Active>,
}

#[derive(Debug)]
struct Active {
    /// By request, then by choice.
    choices: HashMap<String, BTreeMap<u32, Arc<Choice>>>,
    count: u32,
    load: Load,
    heard: Instant,
    draining: bool,
}

impl Connection {
    pub fn choice(&self, request: &str, index: u32) -> Option<Arc<Choice>> {
        let active = self.active.lock();
        active.choices.get(request)?.get(&index).cloned()
    }

    fn offer(&self, model: &str) -> Option<&ModelOffer> {
        self.offers.iter().find(|offer| offer.name == model)
    }

    fn put(&self, choice: &Arc<Choice>) {
        let mut active = self.active.lock();
        let choices = active.choices.entry(choice.job.id.clone()).or_default();
        choices.insert(choice.index, choice.clone());
        active.count += 1;
    }

    fn take(&self, choice: &Choice) -> bool {
        let mut active = self.active.lock();
        let Some(choices) = active.choices.get_mut(&choice.job.id) else {
            return false;
        };
        let taken = choices.remove(&choice.index).is_some();
        if choices.is_empty() {
            active.choices.remove(&choice.job.id);
        }
        active.count -= u32::from(taken);
        taken
    }

    fn send(&self, body: Body) -> bool {
        self.outbound.try_send(Ok(GatewayMessage { body: Some(body) })).is_ok()
    }
}

/// The queue of a model has no room for this request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueFull;

/// What is known of a model.
#[derive(Clone, Debug)]
pub struct Model {
    pub name: String,
    /// When its first worker attached; Unix time in seconds.
    pub created: u64,
    /// Ready for new requests.
    pub workers: Vec<String>,
    pub max_length: u32,
}

#[derive(Debug)]
struct Memory {
    created: u64,
    seen: Instant,
    max_length: u32,
}

#[derive(Default)]
struct State {
    next_id: u64,
    connections: BTreeMap<u64, Arc<Connection>>,
    queues: HashMap<String, VecDeque<Arc<Choice>>>,
    models: BTreeMap<String, Memory>,
}

pub struct Registry {
    state: Mutex<State>,
    policy: Box<dyn Policy>,
    metrics: Metrics,
}

impl Registry {
    pub fn new(policy: Box<dyn Policy>, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), policy, metrics })
    }

    /// A worker attached. One of the same name is an older connection of it and goes.
    pub fn attach(&self, namespace: &str, hello: WorkerHello, outbound: Outbound) -> Arc<Connection> {
        let mut state = self.state.lock();
        let older = state
            .connections
            .values()
            .find(|connection| connection.worker == hello.worker && connection.namespace == namespace);
        if let Some(id) = older.map(|connection| connection.id) {
            self.remove(&mut state, id);
        }
        state.next_id += 1;
        let connection = Arc::new(Connection {
            id: state.next_id,
            worker: hello.worker,
            namespace: namespace.to_owned(),
            slots: hello.slots,
            offers: hello.models,
            outbound,
            gone: CancellationToken::new(),
            active: Mutex::new(Active {
                choices: HashMap::new(),
                count: 0,
                load: Load::default(),
                heard: Instant::now(),
                draining: false,
            }),
        });
        state.connections.insert(connection.id, connection.clone());
        self.metrics.workers.set(state.connections.len() as i64);
        for offer in &connection.offers {
            remember(&mut state.models, offer);
            self.dispatch(&mut state, &offer.name);
        }
        connection
    }

    /// The worker is gone; what it was doing is lost to it and goes elsewhere.
    pub fn detach(&self, id: u64) {
        self.remove(&mut self.state.lock(), id);
    }

    /// Detaches workers that have not reported within `timeout`.
    pub fn detach_silent(&self, timeout: Duration) {
        let mut state = self.state.lock();
        let silent: Vec<_> = state
            .connections
            .values()
            .filter(|connection| connection.active.lock().heard.elapsed() > timeout)
            .cloned()
            .collect();
        for connection in silent {
            tracing::warn!(worker = connection.worker, "worker is silent; taken as gone");
            self.remove(&mut state, connection.id);
        }
        for connection in state.connections.values().cloned().collect::<Vec<_>>() {
            for offer in &connection.offers {
                remember(&mut state.models, offer);
            }
        }
        state.models.retain(|_, memory| memory.seen.elapsed() < REMEMBERED);
    }

    pub fn report(&self, connection: &Connection, load: Load) {
        let mut active = connection.active.lock();
        active.load = load;
        active.heard = Instant::now();
    }

    /// No new requests for this worker.
    pub fn drain(&self, connection: &Connection) {
        connection.active.lock().draining = true;
    }

    /// Queues the choices of a new request, all or none.
    pub fn admit(self: &Arc<Self>, choices: &[Arc<Choice>], max_queue: usize) -> Result<Vec<Seat>, QueueFull> {
        let mut state = self.state.lock();
        let Some(first) = choices.first() else {
            return Ok(Vec::new());
        };
        let model = &first.job.model;
        let queue = state.queues.entry(model.clone()).or_default();
        if queue.len() + choices.len() > max_queue {
            return Err(QueueFull);
        }
        queue.extend(choices.iter().cloned());
        self.dispatch(&mut state, model);
        let seat = |choice: &Arc<Choice>| Seat { registry: self.clone(), choice: choice.clone() };
        Ok(choices.iter().map(seat).collect())
    }

    /// Queues a choice that has lost its worker, before all others.
    fn readmit(&self, choice: &Arc<Choice>) {
        let mut state = self.state.lock();
        self.vacate(&mut state, choice);
        choice.requeue();
        let model = &choice.job.model;
        let queue = state.queues.entry(model.clone()).or_default();
        queue.push_front(choice.clone());
        self.dispatch(&mut state, model);
    }

    pub fn model(&self, name: &str) -> Option<Model> {
        let state = self.state.lock();
        let memory = state.models.get(name)?;
        Some(describe(&state, name, memory))
    }

    pub fn models(&self) -> Vec<Model> {
        let state = self.state.lock();
        let models = state.models.iter();
        models.map(|(name, memory)| describe(&state, name, memory)).collect()
    }

    fn remove(&self, state: &mut State, id: u64) {
        // The choices that it loses come back by their drivers.
        let Some(connection) = state.connections.remove(&id) else {
            return;
        };
        self.metrics.workers.set(state.connections.len() as i64);
        connection.gone.cancel();
        let choices = std::mem::take(&mut connection.active.lock().choices);
        for choice in choices.values().flat_map(BTreeMap::values) {
            choice.lose(id, Loss::Gone);
        }
    }

    /// Gives waiting choices to workers, in order, as far as there is room.
    fn dispatch(&self, state: &mut State, model: &str) {
        let Some(mut queue) = state.queues.remove(model) else {
            return;
        };
        let mut waiting = VecDeque::new();
        while let Some(choice) = queue.pop_front() {
            if let Some(connection) = self.place(state, &choice) {
                self.begin(state, &connection, &choice);
                continue;
            }
            // One that any worker may take is ahead of all behind it; one that only some may take is not.
            let any_worker = choice.variant().is_none() && choice.avoid().is_none();
            waiting.push_back(choice);
            if any_worker {
                waiting.append(&mut queue);
            }
        }
        if !waiting.is_empty() {
            state.queues.insert(model.to_owned(), waiting);
        }
    }

    fn place(&self, state: &State, choice: &Choice) -> Option<Arc<Connection>> {
        let (variant, avoid) = (choice.variant(), choice.avoid());
        let mut candidates: Vec<_> = state
            .connections
            .values()
            .filter_map(|connection| candidate(connection, &choice.job.model, variant.as_ref()))
            .collect();
        if candidates.len() > 1 {
            candidates.retain(|candidate| Some(candidate.worker) != avoid);
        }
        let picked = self.policy.pick(&candidates)?;
        state.connections.get(&picked).cloned()
    }

    fn begin(&self, state: &mut State, connection: &Arc<Connection>, choice: &Arc<Choice>) {
        let model = &choice.job.model;
        let Some(offer) = connection.offer(model) else {
            return;
        };
        connection.put(choice);
        let generate = choice.begin(Server {
            id: connection.id,
            name: connection.worker.clone(),
            variant: Variant::from(offer),
            max_length: offer.max_length,
        });
        if !generate.generated.is_empty() {
            self.metrics.resumes.with_label_values(&[model]).inc();
        }
        if !connection.send(Body::Generate(generate)) {
            tracing::warn!(worker = connection.worker, "worker does not read; taken as gone");
            self.remove(state, connection.id);
        }
    }

    fn leave(&self, choice: &Arc<Choice>) {
        let mut state = self.state.lock();
        let model = &choice.job.model;
        if let Some(queue) = state.queues.get_mut(model) {
            queue.retain(|other| !Arc::ptr_eq(other, choice));
        }
        self.vacate(&mut state, choice);
        self.dispatch(&mut state, model);
    }

    /// Takes the choice off the worker that it is on, which is told unless it knows.
    fn vacate(&self, state: &mut State, choice: &Choice) {
        let worker = choice.last_worker();
        let Some(connection) = worker.and_then(|id| state.connections.get(&id)).cloned() else {
            return;
        };
        let cancel = Cancel { request: choice.job.id.clone(), choice: choice.index };
        let unfinished = connection.take(choice) && !choice.is_done();
        if unfinished && !connection.send(Body::Cancel(cancel)) {
            self.remove(state, connection.id);
        }
    }
}

/// Whether, and with what load, a worker could take a choice of `model`.
fn candidate(connection: &Connection, model: &str, variant: Option<&Variant>) -> Option<Candidate> {
    let offer = connection.offer(model)?;
    if variant.is_some_and(|variant| *variant != Variant::from(offer)) {
        return None;
    }
    let active = connection.active.lock();
    (!active.draining).then_some(Candidate {
        worker: connection.id,
        assigned: active.count,
        reported: active.load.running + active.load.waiting,
        slots: connection.slots,
    })
}

fn remember(models: &mut BTreeMap<String, Memory>, offer: &ModelOffer) {
    if models.len() >= MAX_MODELS && !models.contains_key(&offer.name) {
        return;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let memory = models.entry(offer.name.clone()).or_insert(Memory {
        created: now.as_secs(),
        seen: Instant::now(),
        max_length: 0,
    });
    memory.seen = Instant::now();
    memory.max_length = offer.max_length;
}

fn describe(state: &State, name: &str, memory: &Memory) -> Model {
    let offering =
        |connection: &&Arc<Connection>| connection.offer(name).is_some() && !connection.active.lock().draining;
    let workers = state.connections.values().filter(offering);
    Model {
        name: name.to_owned(),
        created: memory.created,
        workers: workers.map(|connection| connection.worker.clone()).collect(),
        max_length: memory.max_length,
    }
}

/// A choice's place in the queue or on a worker, for as long as somebody wants the answer.
pub struct Seat {
    registry: Arc<Registry>,
    pub choice: Arc<Choice>,
}

impl Seat {
    /// Back into the queue after a loss, before all others.
    pub fn readmit(&self) {
        self.registry.readmit(&self.choice);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.registry.leave(&self.choice);
    }
}
