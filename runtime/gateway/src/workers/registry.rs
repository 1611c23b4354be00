//! Which workers are attached and which answers wait for one. Nothing is stored: workers attach
//! again after a restart.
//!
//! One lock holds the decisions (who is there, who waits); each connection has its own for the
//! answers on it, so that tokens do not contend. Order of locks: registry, connection, choice.

use super::connection::{Connection, Outbound, compare_speeds};
use super::happenings::{Happenings, What};
use super::inquiry::Question;
use super::queue::{FairQueue, Taken};
use super::view::{Snapshot, WorkerView};
use crate::api::error::ApiError;
use crate::choice::{Choice, Job, Variant};
use crate::metrics::Metrics;
use crate::routing::ejection::without_ejected;
use crate::routing::{Policy, Route, least_loaded::LeastLoaded};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;
use tokio::time::Instant;
use vicuna_protocol::auth::Caller;
use vicuna_protocol::inference::{Cancel, Load, LoadModel, ModelOffer, WorkerHello, gateway_message::Body};

/// How long a model is remembered whose workers are all gone.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// Models remembered, at most, of all namespaces and of one: a tenant's workers may offer what they like, but not so
/// much that there is no room for others'.
const MAX_MODELS: usize = 4096;
const MAX_MODELS_OF_A_NAMESPACE: usize = 256;
/// A connection over which nothing came for so long, where there is a report each second, may be dead: a
/// new one of the same process takes its place.
const ALIVE: Duration = Duration::from_millis(2500);

/// The queue of a model has no room for this request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueFull;

/// What is known of a model.
#[derive(Clone, Debug)]
pub struct Model {
    pub name: String,
    /// When it was first heard of; Unix time in seconds.
    pub created: u64,
    /// Ready for new requests.
    pub workers: Vec<String>,
    /// What its newest worker offers; none as long as it has had none.
    pub offer: Option<Arc<ModelOffer>>,
}

#[derive(Debug)]
struct Memory {
    created: u64,
    seen: Instant,
    offer: Option<Arc<ModelOffer>>,
}

/// What waits for a worker.
enum Waiting {
    Answer(Arc<Choice>),
    Question(Arc<Question>),
}

type Queue = FairQueue<Waiting>;

#[derive(Default)]
struct State {
    next_id: u64,
    /// Whose queue is looked at first, where a worker has several models.
    turn: usize,
    connections: BTreeMap<u64, Arc<Connection>>,
    queues: HashMap<String, Queue>,
    models: BTreeMap<String, Memory>,
}

pub struct Registry {
    state: Mutex<State>,
    policy: Box<dyn Policy>,
    metrics: Metrics,
    /// Notified when a worker attaches.
    arrivals: Notify,
    pub happenings: Happenings,
    /// Taken before the state's lock.
    snapshot: Mutex<Option<Arc<Snapshot>>>,
}

impl Registry {
    pub fn new(policy: Box<dyn Policy>, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            policy,
            metrics,
            arrivals: Notify::new(),
            happenings: Happenings::default(),
            snapshot: Mutex::default(),
        })
    }

    /// Whether the process that says hello is here already, by a connection that lives: the gateway has
    /// two addresses then, and one connection is enough.
    pub fn has_instance(&self, namespace: &str, hello: &WorkerHello) -> bool {
        let state = self.state.lock();
        !hello.instance.is_empty()
            && state.connections.values().any(|connection| {
                connection.namespace == namespace
                    && connection.instance == hello.instance
                    && !connection.is_silent(ALIVE)
            })
    }

    /// Whether there is room for what a worker offers beside the other models of its namespace.
    pub fn has_room_for(&self, namespace: &str, hello: &WorkerHello) -> bool {
        let state = self.state.lock();
        let new = hello.models.iter().filter(|offer| !state.models.contains_key(&offer.name)).count();
        let known = count_of(&state.models, namespace);
        new == 0 || known + new <= MAX_MODELS_OF_A_NAMESPACE && state.models.len() + new <= MAX_MODELS
    }

    /// A worker attached. What is left of the same worker goes: an older connection of its process, or
    /// of its pod before that was started anew. External workers may have equal names by mistake, and
    /// then do not put each other out.
    pub fn attach(&self, caller: &Caller, hello: WorkerHello, outbound: Outbound) -> Arc<Connection> {
        let mut state = self.state.lock();
        let namespace = caller.namespace.as_str();
        let by_name = caller.pod_name.is_some() || hello.instance.is_empty();
        let is_older = |connection: &&Arc<Connection>| {
            let same_process = !hello.instance.is_empty() && connection.instance == hello.instance;
            let same_name = *connection.worker == *hello.worker;
            connection.namespace == namespace && (same_process || by_name && same_name)
        };
        let older: Vec<_> = state.connections.values().filter(is_older).map(|connection| connection.id).collect();
        for id in older {
            self.remove(&mut state, id);
        }
        state.next_id += 1;
        let connection = Arc::new(Connection::new(state.next_id, namespace, hello, outbound));
        state.connections.insert(connection.id, connection.clone());
        self.count(&state);
        self.happenings.tell(What::Attached, &connection.worker, connection.models(), 0);
        self.look_at(&mut state, &connection);
        connection
    }

    /// A worker has loaded a model, or given one up, or tells how far it is.
    pub fn offers_now(&self, connection: &Connection, offers: Vec<ModelOffer>) -> bool {
        let mut state = self.state.lock();
        let sound = connection.offers_now(offers);
        if sound {
            self.count(&state);
            self.look_at(&mut state, connection);
        }
        sound
    }

    /// One that has nothing loaded serves nobody, and is not counted.
    fn count(&self, state: &State) {
        let loaded = state.connections.values().filter(|connection| connection.has_loaded()).count();
        self.metrics.workers.set(loaded as i64);
    }

    /// What it has is known from now on, and what waits for that is given to it.
    fn look_at(&self, state: &mut State, connection: &Connection) {
        for (name, offer) in connection.offers() {
            remember(&mut state.models, &name, offer.as_ref());
            self.dispatch(state, &name);
        }
        self.arrivals.notify_waiters();
    }

    /// What is being done to load a model that no worker has.
    pub fn loading(&self, model: &str) -> Option<String> {
        let state = self.state.lock();
        let mut told = state.connections.values().filter_map(|connection| connection.progress(model));
        told.find(|progress| !progress.is_empty())
    }

    /// Has a worker load the model if none has it and one can.
    pub fn ask_for(&self, model: &str) {
        ask_to_load(&self.state.lock(), model);
    }

    /// The worker is gone; what it was doing is lost to it and goes elsewhere.
    pub fn detach(&self, id: u64) {
        self.remove(&mut self.state.lock(), id);
    }

    /// Detaches workers that have not reported within `timeout`.
    pub fn detach_silent(&self, timeout: Duration) {
        let mut state = self.state.lock();
        let (silent, heard): (Vec<_>, Vec<_>) =
            state.connections.values().cloned().partition(|connection| connection.is_silent(timeout));
        for connection in silent {
            tracing::warn!(worker = &*connection.worker, "worker is silent; taken as gone");
            self.remove(&mut state, connection.id);
        }
        for (name, offer) in heard.iter().flat_map(|connection| connection.offers()) {
            remember(&mut state.models, &name, offer.as_ref());
        }
        state.models.retain(|_, memory| memory.seen.elapsed() < REMEMBERED);
    }

    /// What a worker says each second of its load. What waits is looked at again: room also comes by time
    /// alone, when a worker is not left out any longer.
    pub fn report(&self, connection: &Connection, load: Load) {
        connection.report(load);
        self.dispatch_all(&mut self.state.lock(), connection);
    }

    /// A question to this worker has its answer, or nobody asks any more; its slot is free.
    pub fn answered(&self, connection: &Connection) {
        self.dispatch_all(&mut self.state.lock(), connection);
    }

    /// A worker is about to leave and takes nothing new.
    pub fn drain(&self, connection: &Connection) {
        if let Some(streams) = connection.drain() {
            self.happenings.tell(What::Draining, &connection.worker, connection.models(), streams);
        }
    }

    /// How all stand, not longer ago than `age`.
    pub fn snapshot(&self, age: Duration) -> Arc<Snapshot> {
        let mut last = self.snapshot.lock();
        if let Some(snapshot) = last.as_ref().filter(|snapshot| snapshot.taken.elapsed() < age) {
            return snapshot.clone();
        }
        let models = self.models().into_iter().map(|model| (model.name, model.workers.len())).collect();
        let connections: Vec<_> = self.state.lock().connections.values().cloned().collect();
        let workers = connections.iter().map(|connection| WorkerView::of(connection)).collect();
        let snapshot = Arc::new(Snapshot { taken: Instant::now(), models, workers });
        *last = Some(snapshot.clone());
        snapshot
    }

    /// A worker has failed at something; after a few in a row it is left out for a while.
    pub fn failed(&self, id: u64) {
        let connection = self.state.lock().connections.get(&id).cloned();
        if let Some(connection) = connection.filter(|connection| connection.failed()) {
            self.metrics.ejections.inc();
            self.happenings.tell(What::LeftOut, &connection.worker, connection.models(), 0);
            tracing::warn!(worker = &*connection.worker, "worker fails again and again; left out for a while");
        }
    }

    /// Queues the choices of a new request, all or none. Less urgent ones make room where there is none.
    pub fn admit(self: &Arc<Self>, choices: Vec<Arc<Choice>>, max_queue: usize) -> Result<Vec<Seat>, QueueFull> {
        let mut state = self.state.lock();
        let Some(job) = choices.first().map(|first| first.job.clone()) else {
            return Ok(Vec::new());
        };
        // Where nobody waits, what there is room for need not queue.
        let alone = !state.queues.contains_key(job.model()) && choices.len() <= max_queue;
        let placed = |choice: &&Arc<Choice>| alone && self.serve_choice(&mut state, choice) == Taken::Yes;
        let placed = choices.iter().take_while(placed).count();
        if placed < choices.len() {
            self.queue(&mut state, &job, &choices[placed..], max_queue)?;
        }
        Ok(choices.into_iter().map(|choice| Seat { registry: self.clone(), choice }).collect())
    }

    fn queue(&self, state: &mut State, job: &Job, choices: &[Arc<Choice>], max_queue: usize) -> Result<(), QueueFull> {
        let priority = job.generate.priority;
        let queue = state.queues.entry(job.model().to_owned()).or_default();
        make_room(queue, choices.len(), priority, max_queue, job.model())?;
        for choice in choices {
            queue.push(priority, &job.key, Waiting::Answer(choice.clone()));
        }
        self.dispatch(state, job.model());
        Ok(())
    }

    /// Queues a question that takes a worker's time, like a choice.
    pub fn admit_question(&self, question: &Arc<Question>, max_queue: usize) -> Result<(), QueueFull> {
        let mut state = self.state.lock();
        let queue = state.queues.entry(question.model.clone()).or_default();
        make_room(queue, 1, question.priority, max_queue, &question.model)?;
        queue.push(question.priority, &question.key, Waiting::Question(question.clone()));
        self.dispatch(&mut state, &question.model);
        Ok(())
    }

    /// Queues a question whose worker did not answer it, before all others.
    pub fn readmit_question(&self, question: &Arc<Question>) {
        let mut state = self.state.lock();
        let queue = state.queues.entry(question.model.clone()).or_default();
        queue.push_first(Waiting::Question(question.clone()));
        self.dispatch(&mut state, &question.model);
    }

    /// Nobody asks any more.
    pub fn withdraw(&self, question: &Arc<Question>) {
        let mut state = self.state.lock();
        if let Some(queue) = state.queues.get_mut(&question.model) {
            queue.retain(|waiting| !matches!(waiting, Waiting::Question(other) if Arc::ptr_eq(other, question)));
        }
        self.dispatch(&mut state, &question.model);
    }

    /// Queues choices that go on from what there is already, before all others.
    pub fn restore(self: &Arc<Self>, choices: Vec<Arc<Choice>>) -> Vec<Seat> {
        for choice in choices.iter().filter(|choice| choice.is_queued()) {
            self.push_first(&mut self.state.lock(), choice);
        }
        choices.into_iter().map(|choice| Seat { registry: self.clone(), choice }).collect()
    }

    /// Queues a choice that has lost its worker, before all others.
    pub fn readmit(&self, choice: &Arc<Choice>) {
        let mut state = self.state.lock();
        self.vacate(&mut state, choice, false);
        // Its client may have gone meanwhile.
        if choice.requeue() {
            self.push_first(&mut state, choice);
        }
    }

    fn push_first(&self, state: &mut State, choice: &Arc<Choice>) {
        let model = choice.job.model();
        state.queues.entry(model.to_owned()).or_default().push_first(Waiting::Answer(choice.clone()));
        self.dispatch(state, model);
    }

    /// These models are served, says the operator, also if no worker has come yet.
    pub fn expect(&self, names: &[String]) {
        let mut state = self.state.lock();
        for name in names {
            remember(&mut state.models, name, None);
        }
    }

    /// Whether some worker has the model and takes more, busy or not.
    pub fn has_worker(&self, name: &str) -> bool {
        let state = self.state.lock();
        state.connections.values().any(|connection| connection.offer(name).is_some() && !connection.is_draining())
    }

    /// Whether some worker has the model, and heeds where a request says that an answer may end.
    pub fn heeds_ends(&self, name: &str) -> bool {
        self.state.lock().connections.values().any(|connection| connection.heeds_ends(name))
    }

    /// What a model's newest worker offers, if it has had one; none of a model that is not known.
    pub fn offer(&self, name: &str) -> Option<Option<Arc<ModelOffer>>> {
        self.state.lock().models.get(name).map(|memory| memory.offer.clone())
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

    /// Resolves when the next worker attaches.
    pub fn arrival(&self) -> tokio::sync::futures::Notified<'_> {
        self.arrivals.notified()
    }

    /// A worker for a question, whether it has a slot or not.
    pub fn least_loaded(&self, model: &str) -> Option<Arc<Connection>> {
        let state = self.state.lock();
        let mut candidates = candidates(&state, model, None, false);
        candidates.iter_mut().for_each(|candidate| candidate.assigned = 0);
        let picked = LeastLoaded.pick(&Route::default(), &candidates)?;
        state.connections.get(&picked).cloned()
    }

    /// All workers of a model, draining ones too, and what weights they have.
    pub fn offering(&self, model: &str) -> Vec<(Arc<Connection>, Variant)> {
        let state = self.state.lock();
        let offering = state
            .connections
            .values()
            .filter_map(|connection| Some((connection.clone(), connection.server(model)?.variant)));
        offering.collect()
    }

    fn remove(&self, state: &mut State, id: u64) {
        // The choices that it loses come back by their drivers.
        if let Some(connection) = state.connections.remove(&id) {
            self.count(state);
            let streams = connection.abandon();
            self.happenings.tell(What::Gone, &connection.worker, connection.models(), streams);
        }
    }

    /// Gives waiting choices to workers, in order, as far as there is room.
    fn dispatch(&self, state: &mut State, model: &str) {
        let Some(mut queue) = state.queues.remove(model) else {
            return;
        };
        queue.drain(|waiting| match waiting {
            Waiting::Answer(choice) => self.serve_choice(state, choice),
            Waiting::Question(question) => serve_question(state, question),
        });
        for gauge in [&self.metrics.queued, &self.metrics.waiting] {
            gauge.with_label_values(&[model]).set(queue.len() as i64);
        }
        if !queue.is_empty() {
            state.queues.insert(model.to_owned(), queue);
            ask_to_load(state, model);
        }
    }

    fn serve_choice(&self, state: &mut State, choice: &Arc<Choice>) -> Taken {
        if let Some((connection, worker)) = self.place(state, choice) {
            // Only what a worker is given has been routed.
            if self.begin(state, &connection, choice) {
                self.metrics.routed.with_label_values(&[self.policy.name(), worker]).inc();
            }
            return Taken::Yes;
        }
        // One that any worker may take is ahead of all behind it; one that only some may take is not.
        match choice.variant().is_none() && choice.avoid().is_none() && !choice.job.says_ends() {
            true => Taken::Stop,
            false => Taken::Not,
        }
    }

    /// The worker that it should go to, and whether that is the policy's favourite.
    fn place(&self, state: &State, choice: &Choice) -> Option<(Arc<Connection>, &'static str)> {
        let (variant, avoid) = (choice.variant(), choice.avoid());
        let mut candidates = candidates(state, choice.job.model(), variant.as_ref(), choice.job.says_ends());
        if candidates.len() > 1 {
            candidates.retain(|candidate| Some(candidate.worker) != avoid);
        }
        let route = &choice.job.route;
        let picked = self.policy.pick(route, &candidates)?;
        let worker = match self.policy.favourite(route, &candidates) {
            Some(favourite) if favourite == picked => "favourite",
            Some(_) => "other",
            None => "any",
        };
        Some((state.connections.get(&picked).cloned()?, worker))
    }

    /// Whether it went to the worker.
    fn begin(&self, state: &mut State, connection: &Arc<Connection>, choice: &Arc<Choice>) -> bool {
        let model = choice.job.model();
        let Some(server) = connection.server(model) else {
            return false;
        };
        // One whose time is over is on its way out of the queue.
        let Some(generate) = choice.begin(server) else {
            return false;
        };
        connection.put(choice);
        if !generate.generated.is_empty() {
            self.metrics.resumes.with_label_values(&[model]).inc();
            self.happenings.tell(What::Resumed, &connection.worker, vec![model.to_owned()], 1);
        }
        if !connection.send(Body::Generate(generate)) {
            tracing::warn!(worker = &*connection.worker, "worker does not read; taken as gone");
            self.remove(state, connection.id);
        }
        true
    }

    /// The answer has ended, or nobody wants it any more, or not for now.
    pub fn leave(&self, choice: &Arc<Choice>, keep: bool) {
        if !choice.leave() {
            return;
        }
        let mut state = self.state.lock();
        let model = choice.job.model();
        if let Some(queue) = state.queues.get_mut(model) {
            queue.retain(|waiting| !matches!(waiting, Waiting::Answer(other) if Arc::ptr_eq(other, choice)));
        }
        let freed = self.vacate(&mut state, choice, keep);
        choice.fail(ApiError::client_gone());
        match freed {
            Some(connection) => self.dispatch_all(&mut state, &connection),
            None => self.dispatch(&mut state, model),
        }
    }

    /// The worker's room is for all its models: each has its turn to go first.
    fn dispatch_all(&self, state: &mut State, connection: &Connection) {
        if state.queues.is_empty() {
            return;
        }
        let models = connection.models();
        state.turn = state.turn.wrapping_add(1);
        for index in 0..models.len() {
            let model = &models[(state.turn + index) % models.len()];
            if state.queues.contains_key(model) {
                self.dispatch(state, model);
            }
        }
    }

    /// Takes the choice off the worker that it is on, which is told unless it knows. Returns the worker.
    fn vacate(&self, state: &mut State, choice: &Choice, keep: bool) -> Option<Arc<Connection>> {
        let worker = choice.last_worker();
        let connection = worker.and_then(|id| state.connections.get(&id)).cloned()?;
        let cancel = Cancel { request: choice.job.id().to_owned(), choice: choice.index, keep };
        let unfinished = connection.take(choice) && !choice.is_done();
        if unfinished && !connection.send(Body::Cancel(cancel)) {
            self.remove(state, connection.id);
        }
        Some(connection)
    }
}

/// A model that nobody has is loaded where least is to do, unless a worker is at it. Those that load it at their start
/// do not count: they may never be able to.
fn ask_to_load(state: &State, model: &str) {
    let there = || state.connections.values().filter(|connection| !connection.is_draining());
    if there().any(|connection| connection.offer(model).is_some()) {
        return;
    }
    let able = there().filter_map(|connection| Some((connection, connection.nearness(model)?)));
    let picked = able.min_by_key(|(connection, nearness)| (*nearness, connection.assigned()));
    if let Some((connection, _)) = picked {
        // One that does not read any more is found out by what else is sent to it.
        connection.send(Body::LoadModel(LoadModel { model: model.to_owned() }));
    }
}

fn serve_question(state: &State, question: &Question) -> Taken {
    let mut candidates = candidates(state, &question.model, None, false);
    if candidates.len() > 1 {
        candidates.retain(|candidate| Some(candidate.worker) != question.avoid);
    }
    let picked = LeastLoaded.pick(&Route::default(), &candidates).and_then(|id| state.connections.get(&id));
    match picked {
        Some(connection) => {
            question.put_to(connection);
            Taken::Yes
        }
        None if question.avoid.is_none() => Taken::Stop,
        None => Taken::Not,
    }
}

/// Less urgent ones make room where there is none.
fn make_room(queue: &mut Queue, wanted: usize, priority: i32, max_queue: usize, model: &str) -> Result<(), QueueFull> {
    let missing = (queue.len() + wanted).saturating_sub(max_queue);
    if queue.count_below(priority) < missing || wanted > max_queue {
        return Err(QueueFull);
    }
    for _ in 0..missing {
        match queue.evict_below(priority) {
            Some(Waiting::Answer(choice)) => choice.expire(ApiError::queue_full(model)),
            Some(Waiting::Question(question)) => question.refuse(ApiError::queue_full(model)),
            None => {}
        }
    }
    Ok(())
}

/// The workers that could take a choice of `model` with, if there is one, this variant; `says_ends`: only those that
/// heed where it may end.
fn candidates(
    state: &State,
    model: &str,
    variant: Option<&Variant>,
    says_ends: bool,
) -> Vec<crate::routing::Candidate> {
    let candidate =
        |connection: &Arc<Connection>| Some((connection.candidate(model, variant)?, connection.is_ejected()));
    let able = state.connections.values().filter(|connection| !says_ends || connection.heeds_ends(model));
    let mut candidates: Vec<_> = able.filter_map(candidate).collect();
    without_ejected(&mut candidates, |(_, ejected)| *ejected);
    let mut candidates: Vec<_> = candidates.into_iter().map(|(candidate, _)| candidate).collect();
    compare_speeds(&mut candidates);
    candidates
}

fn count_of(models: &BTreeMap<String, Memory>, namespace: &str) -> usize {
    let beginning = format!("{namespace}/");
    models.range(beginning.clone()..).take_while(|(name, _)| name.starts_with(&beginning)).count()
}

fn remember(models: &mut BTreeMap<String, Memory>, name: &str, offer: Option<&Arc<ModelOffer>>) {
    if models.len() >= MAX_MODELS && !models.contains_key(name) {
        return;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let new = || Memory { created: now.as_secs(), seen: Instant::now(), offer: None };
    let memory = models.entry(name.to_owned()).or_insert_with(new);
    memory.seen = Instant::now();
    if offer.is_some() && memory.offer.as_ref() != offer {
        memory.offer = offer.cloned();
    }
}

fn describe(state: &State, name: &str, memory: &Memory) -> Model {
    let offering = |connection: &&Arc<Connection>| connection.offer(name).is_some() && !connection.is_draining();
    let workers = state.connections.values().filter(offering);
    Model {
        name: name.to_owned(),
        created: memory.created,
        workers: workers.map(|connection| connection.worker.to_string()).collect(),
        offer: memory.offer.clone(),
    }
}

/// A choice's place in the queue or on a worker, for as long as somebody wants the answer.
pub struct Seat {
    registry: Arc<Registry>,
    pub choice: Arc<Choice>,
}

impl Seat {
    /// Given up; with `keep` the client may come back for the rest, and the worker is asked to remember it.
    pub fn leave(&self, keep: bool) {
        self.registry.leave(&self.choice, keep);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.registry.leave(&self.choice, false);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::choice::Phase;
    use crate::choice::tests::job;
    use crate::routing::PolicyName;
    use crate::workers::inquiry::{Answer, Patience, Task};
    use tokio::sync::mpsc;
    use tonic::Status;
    use vicuna_protocol::inference::{GatewayMessage, Generate, Sampling};

    pub type Sent = mpsc::Receiver<Result<GatewayMessage, Status>>;

    pub fn registry() -> Arc<Registry> {
        Registry::new(PolicyName::LeastLoaded.policy(), Metrics::new().unwrap())
    }

    pub fn hello(worker: &str, instance: &str) -> WorkerHello {
        let offer = ModelOffer { name: "ns/m".into(), max_length: 64, ..ModelOffer::default() };
        let (worker, instance) = (worker.into(), instance.into());
        WorkerHello { worker, instance, models: vec![offer], slots: 1, ..WorkerHello::default() }
    }

    /// A worker with one slot, and what it is sent.
    pub fn attach(registry: &Registry, hello: WorkerHello) -> (Arc<Connection>, Sent) {
        let (outbound, sent) = mpsc::channel(64);
        let pod_name = Some(hello.worker.clone());
        let caller = Caller { namespace: "ns".into(), service_account: "s".into(), pod_name, pod_uid: None };
        (registry.attach(&caller, hello, outbound), sent)
    }

    pub fn ask(registry: &Arc<Registry>) -> (Arc<Choice>, Vec<Seat>) {
        let choice = Arc::new(Choice::new(job(), 0, Arc::default()));
        let seats = registry.admit(vec![choice.clone()], 8).unwrap();
        (choice, seats)
    }

    #[tokio::test]
    async fn a_slot_that_a_question_had_is_the_next_request_s() {
        let registry = registry();
        let (connection, _sent) = attach(&registry, hello("w", "1"));
        let deadline = Instant::now() + Duration::from_secs(60);
        let question = Body::CountTokens(Default::default());
        let inquiry = registry.inquire("ns/m", "count-1", &question, deadline);
        let mut inquiry = std::pin::pin!(inquiry);
        assert!(futures::poll!(&mut inquiry).is_pending());
        let (choice, _seats) = ask(&registry);
        assert!(choice.is_queued());
        connection.answer("count-1", crate::workers::inquiry::Answer::TokenCount(Default::default()));
        inquiry.await.unwrap();
        assert_eq!(choice.progress().phase, Phase::Running);
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_waits_until_a_worker_has_it_and_not_while_that_computes() {
        let registry = registry();
        let (connection, _sent) = attach(&registry, hello("w", "1"));
        let task = Task {
            model: "ns/m".into(),
            key: "k".into(),
            priority: 0,
            request: "embd-1".into(),
            body: Body::Embed(Default::default()),
            check: Arc::new(|_: &ModelOffer| Ok::<(), ApiError>(())),
        };
        let patience = Patience { until: None, queue: Duration::from_secs(1), stall: Duration::from_secs(10) };
        let mut computed = std::pin::pin!(registry.compute(&task, 8, patience));
        assert!(futures::poll!(&mut computed).is_pending());
        tokio::time::advance(Duration::from_secs(5)).await;
        assert!(futures::poll!(&mut computed).is_pending());
        connection.answer("embd-1", Answer::Embeddings(Default::default()));
        computed.await.unwrap();
        let (_choice, _seats) = ask(&registry);
        let started = Instant::now();
        assert_eq!(registry.compute(&task, 8, patience).await.unwrap_err().code, "no_capacity");
        assert_eq!(started.elapsed().as_secs(), 1);
    }

    #[tokio::test]
    async fn what_says_where_it_ends_goes_to_workers_that_heed_it() {
        let registry = registry();
        let (_older, _sent) = attach(&registry, hello("w-1", "1"));
        let sampling = Sampling { min_tokens: 2, ..Sampling::default() };
        let generate = Generate { sampling: Some(sampling), ..job().generate.clone() };
        let job = Arc::new(Job { generate, ..Job::default() });
        let choice = Arc::new(Choice::new(job, 0, Arc::default()));
        let _seats = registry.admit(vec![choice.clone()], 8).unwrap();
        assert!(choice.is_queued() && !registry.heeds_ends("ns/m"));
        let mut newer = hello("w-2", "2");
        newer.models[0].min_tokens = true;
        let (newer, _also_sent) = attach(&registry, newer);
        assert_eq!(choice.last_worker(), Some(newer.id));
        assert!(registry.heeds_ends("ns/m"));
    }

    #[tokio::test]
    async fn a_worker_that_drains_has_no_model_for_new_requests() {
        let registry = registry();
        let (worker, _sent) = attach(&registry, hello("w-1", "1"));
        assert!(registry.has_worker("ns/m"));
        registry.drain(&worker);
        assert!(!registry.has_worker("ns/m"));
    }

    #[tokio::test]
    async fn one_namespace_s_workers_leave_room_for_the_models_of_others() {
        let registry = registry();
        let offering = |count: usize| {
            let offer = |number: usize| ModelOffer { name: format!("ns/{number}"), ..ModelOffer::default() };
            WorkerHello { models: (0..count).map(offer).collect(), ..hello("w", "1") }
        };
        assert!(registry.has_room_for("ns", &offering(MAX_MODELS_OF_A_NAMESPACE)));
        assert!(!registry.has_room_for("ns", &offering(MAX_MODELS_OF_A_NAMESPACE + 1)));
        let (_connection, _sent) = attach(&registry, offering(MAX_MODELS_OF_A_NAMESPACE));
        assert!(registry.has_room_for("ns", &offering(MAX_MODELS_OF_A_NAMESPACE)), "those are here already");
        assert!(!registry.has_room_for("ns", &hello("w", "2")));
        let other = WorkerHello {
            models: vec![ModelOffer { name: "ns2/m".into(), ..ModelOffer::default() }],
            ..hello("w", "3")
        };
        assert!(registry.has_room_for("ns2", &other));
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_goes_to_a_worker_that_is_not_left_out_any_more() {
        let registry = registry();
        let (failing, _sent) = attach(&registry, hello("w-1", "1"));
        (0..3).for_each(|_| registry.failed(failing.id));
        let (busy, _also_sent) = attach(&registry, hello("w-2", "2"));
        let (first, _seat) = ask(&registry);
        assert_eq!(first.last_worker(), Some(busy.id));
        let (second, _other_seat) = ask(&registry);
        registry.report(&failing, Load::default());
        assert!(second.is_queued());
        tokio::time::advance(Duration::from_secs(11)).await;
        registry.report(&failing, Load::default());
        assert_eq!(second.last_worker(), Some(failing.id));
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_has_one_connection_and_its_pod_s_next_one_takes_its_place() {
        let registry = registry();
        let (first, _sent) = attach(&registry, hello("pod", "1"));
        assert!(registry.has_instance("ns", &hello("pod", "1")));
        assert!(!registry.has_instance("other", &hello("pod", "1")));
        assert!(!registry.has_instance("ns", &hello("pod", "2")));
        tokio::time::advance(Duration::from_secs(3)).await;
        assert!(!registry.has_instance("ns", &hello("pod", "1")), "the first may be dead");
        let (second, _sent) = attach(&registry, hello("pod", "1"));
        assert!(first.gone.is_cancelled());
        let (_third, _sent) = attach(&registry, hello("pod", "2"));
        assert!(second.gone.is_cancelled());
        assert_eq!(registry.model("ns/m").unwrap().workers, ["pod"]);
    }

    #[tokio::test]
    async fn external_workers_of_one_name_do_not_put_each_other_out() {
        let registry = registry();
        let caller = Caller { namespace: "ns".into(), service_account: "s".into(), pod_name: None, pod_uid: None };
        let first = registry.attach(&caller, hello("external", "1"), mpsc::channel(1).0);
        let second = registry.attach(&caller, hello("external", "2"), mpsc::channel(1).0);
        assert!(!first.gone.is_cancelled() && !second.gone.is_cancelled());
        let _older_version = registry.attach(&caller, hello("external", ""), mpsc::channel(1).0);
        assert!(first.gone.is_cancelled() && second.gone.is_cancelled(), "nothing tells it from them");
    }
}
