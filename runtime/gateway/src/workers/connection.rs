//! One attached worker and what it has to do.

use super::happenings::now_ms;
use super::inquiry::Answer;
use super::view::Place;
use crate::choice::{Choice, Loss, Server, Variant};
use crate::routing::ejection::Health;
use crate::routing::{self, Candidate};
use parking_lot::{Mutex, RwLock};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use vicuna_protocol::inference::{GatewayMessage, Load, ModelOffer, WorkerHello, gateway_message::Body};

/// Questions that a worker has not answered, at most.
const MAX_INQUIRIES: usize = 256;
/// Weight of the newest measurement of a worker's speed.
const NEWEST: f64 = 0.2;

pub type Outbound = mpsc::Sender<Result<GatewayMessage, Status>>;

/// How near a worker is to having a model that it loads when it is asked. The nearest is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Nearness {
    Loading,
    Able,
    /// It could not, the last time.
    Unable,
}

#[derive(Debug)]
pub struct Connection {
    pub id: u64,
    pub worker: Arc<str>,
    /// The process behind it; empty if it does not say.
    pub instance: String,
    pub namespace: String,
    pub place: Place,
    /// Unix time in milliseconds.
    pub attached_ms: u64,
    /// Models come and go, their names stay.
    offers: RwLock<Vec<(Arc<ModelOffer>, Variant)>>,
    /// Cancelled once it is out of the registry, whoever put it out.
    pub gone: CancellationToken,
    name_hash: u64,
    pub slots: u32,
    outbound: Outbound,
    active: Mutex<Active>,
}

#[derive(Debug)]
struct Active {
    /// By request, then by choice.
    choices: HashMap<String, BTreeMap<u32, Arc<Choice>>>,
    count: u32,
    /// By request.
    inquiries: HashMap<String, oneshot::Sender<Answer>>,
    load: Load,
    /// What it had from here when it reported its load.
    assigned_then: u32,
    heard: Instant,
    draining: bool,
    health: Health,
    /// Tokens per second of one sequence.
    speed: Option<f64>,
}

impl Active {
    fn assigned(&self) -> u32 {
        self.count + self.inquiries.len() as u32
    }

    /// Reports are up to a second old, so what was sent from here since then counts too.
    fn used(&self) -> u32 {
        let reported = self.load.running + self.load.waiting;
        let assigned = self.assigned();
        assigned.max(reported.saturating_add(assigned.saturating_sub(self.assigned_then)))
    }

    fn kv_used(&self) -> f64 {
        match self.load.kv_tokens {
            0 => 0.0,
            all => 1.0 - self.load.kv_tokens_free.min(all) as f64 / all as f64,
        }
    }
}

impl Connection {
    pub fn new(id: u64, namespace: &str, hello: WorkerHello, outbound: Outbound) -> Self {
        let active = Active {
            choices: HashMap::new(),
            count: 0,
            inquiries: HashMap::new(),
            load: Load::default(),
            assigned_then: 0,
            heard: Instant::now(),
            draining: false,
            health: Health::default(),
            speed: None,
        };
        Self {
            id,
            name_hash: routing::hash(&[namespace.as_bytes(), hello.worker.as_bytes()]),
            worker: hello.worker.into(),
            instance: hello.instance,
            namespace: namespace.to_owned(),
            offers: RwLock::new(with_variants(hello.models)),
            place: Place { node: hello.node, pool: hello.pool, capacity: hello.capacity },
            attached_ms: now_ms(),
            gone: CancellationToken::new(),
            slots: hello.slots,
            outbound,
            active: Mutex::new(active),
        }
    }

    pub fn choice(&self, request: &str, index: u32) -> Option<Arc<Choice>> {
        let active = self.active.lock();
        active.choices.get(request)?.get(&index).cloned()
    }

    /// What it has loaded under this name.
    pub fn offer(&self, model: &str) -> Option<Arc<ModelOffer>> {
        loaded(&self.offers.read(), model).map(|(offer, _)| offer.clone())
    }

    /// Whether it has this model, and heeds where a request says that an answer may end.
    pub fn heeds_ends(&self, model: &str) -> bool {
        loaded(&self.offers.read(), model).is_some_and(|(offer, _)| offer.min_tokens)
    }

    /// Whether any of its models is loaded.
    pub fn has_loaded(&self) -> bool {
        self.offers.read().iter().any(|(offer, _)| !offer.on_request)
    }

    /// As whom an answer knows it that is given to it.
    pub fn server(&self, model: &str) -> Option<Server> {
        let offers = self.offers.read();
        let (offer, variant) = loaded(&offers, model)?;
        let (variant, max_length) = (variant.clone(), offer.max_length);
        Some(Server { id: self.id, name: self.worker.clone(), variant, max_length })
    }

    /// What is being done to load a model that it can have; none if it has it, or cannot.
    pub fn progress(&self, model: &str) -> Option<String> {
        let offers = self.offers.read();
        let found = offers.iter().find(|(offer, _)| offer.name == model && offer.on_request);
        found.map(|(offer, _)| offer.progress.clone())
    }

    /// How near it is to having a model that it loads when it is asked; none if it has it, cannot, or loads it unasked
    /// at its start.
    pub fn nearness(&self, model: &str) -> Option<Nearness> {
        let offers = self.offers.read();
        let (offer, _) = offers.iter().find(|(offer, _)| offer.name == model && offer.on_request && !offer.at_start)?;
        Some(match offer.progress.as_str() {
            "" => Nearness::Able,
            progress if progress.starts_with("loading") => Nearness::Loading,
            _ => Nearness::Unable,
        })
    }

    /// Names, and what is known of each: nothing as long as it is not loaded.
    pub fn offers(&self) -> Vec<(String, Option<Arc<ModelOffer>>)> {
        let offers = self.offers.read();
        let known = |offer: &Arc<ModelOffer>| (offer.name.clone(), (!offer.on_request).then(|| offer.clone()));
        offers.iter().map(|(offer, _)| known(offer)).collect()
    }

    /// `false` if the names are not those of its hello.
    pub fn offers_now(&self, offers: Vec<ModelOffer>) -> bool {
        let mut before = self.offers.write();
        let names_before: BTreeSet<_> = before.iter().map(|(offer, _)| &offer.name).collect();
        let same = names_before == offers.iter().map(|offer| &offer.name).collect();
        if same {
            *before = with_variants(offers);
        }
        same
    }

    pub fn assigned(&self) -> u32 {
        self.active.lock().assigned()
    }

    pub fn put(&self, choice: &Arc<Choice>) {
        let mut active = self.active.lock();
        let choices = active.choices.entry(choice.job.id().to_owned()).or_default();
        if choices.insert(choice.index, choice.clone()).is_none() {
            active.count += 1;
        }
    }

    /// Takes this very choice off the worker; one that goes on from it may have taken its place.
    pub fn take(&self, choice: &Choice) -> bool {
        let mut active = self.active.lock();
        let Some(choices) = active.choices.get_mut(choice.job.id()) else {
            return false;
        };
        let same = choices.get(&choice.index).is_some_and(|other| std::ptr::eq(&**other, choice));
        if same {
            choices.remove(&choice.index);
        }
        if choices.is_empty() {
            active.choices.remove(choice.job.id());
        }
        active.count -= u32::from(same);
        same
    }

    /// Takes everything off a worker that is gone; tells how many unfinished answers were on it.
    pub fn abandon(&self) -> u32 {
        self.gone.cancel();
        let (choices, inquiries) = {
            let mut active = self.active.lock();
            active.count = 0;
            (std::mem::take(&mut active.choices), std::mem::take(&mut active.inquiries))
        };
        // Those who asked see that nobody will answer.
        drop(inquiries);
        let mut lost = 0;
        for choice in choices.values().flat_map(BTreeMap::values) {
            lost += u32::from(!choice.is_done());
            choice.lose(self.id, Loss::Gone);
        }
        lost
    }

    /// What is offered, by name.
    pub fn models(&self) -> Vec<String> {
        self.offers.read().iter().map(|(offer, _)| offer.name.clone()).collect()
    }

    pub fn send(&self, body: Body) -> bool {
        self.outbound.try_send(Ok(GatewayMessage { body: Some(body) })).is_ok()
    }

    /// Where the answer to a question about `request` will arrive; none if there are too many, or
    /// one about the same request.
    pub fn expect(&self, request: &str) -> Option<oneshot::Receiver<Answer>> {
        let mut active = self.active.lock();
        if active.inquiries.len() >= MAX_INQUIRIES || active.inquiries.contains_key(request) {
            return None;
        }
        let (sender, receiver) = oneshot::channel();
        active.inquiries.insert(request.to_owned(), sender);
        Some(receiver)
    }

    /// Hands an answer to whoever asked.
    pub fn answer(&self, request: &str, answer: Answer) {
        if let Some(asker) = self.active.lock().inquiries.remove(request) {
            // One that does not wait any more does not need it.
            let _ = asker.send(answer);
        }
    }

    pub fn is_asked(&self, request: &str) -> bool {
        self.active.lock().inquiries.contains_key(request)
    }

    /// Nobody waits for the answer any more; tells whether it was still to come.
    pub fn forget(&self, request: &str) -> bool {
        self.active.lock().inquiries.remove(request).is_some()
    }

    pub fn report(&self, load: Load) {
        let mut active = self.active.lock();
        active.load = load;
        active.assigned_then = active.assigned();
        active.heard = Instant::now();
    }

    /// Its last report, and whether it drains.
    pub fn reported(&self) -> (Load, bool) {
        let active = self.active.lock();
        (active.load, active.draining)
    }

    pub fn is_silent(&self, timeout: Duration) -> bool {
        self.active.lock().heard.elapsed() > timeout
    }

    /// Nothing new for it; tells whether that is new, and how many answers are on it.
    pub fn drain(&self) -> Option<u32> {
        let mut active = self.active.lock();
        (!std::mem::replace(&mut active.draining, true)).then_some(active.count)
    }

    pub fn is_draining(&self) -> bool {
        self.active.lock().draining
    }

    /// It has ended an answer, at this speed if that could be measured.
    pub fn succeeded(&self, speed: Option<f64>) {
        let mut active = self.active.lock();
        active.health.succeeded();
        if let Some(measured) = speed {
            let before = active.speed.unwrap_or(measured);
            active.speed = Some(before + NEWEST * (measured - before));
        }
    }

    /// It has failed at an answer; tells whether it is left out for a while from now on.
    pub fn failed(&self) -> bool {
        self.active.lock().health.failed(Instant::now())
    }

    pub fn is_ejected(&self) -> bool {
        self.active.lock().health.is_ejected(Instant::now())
    }

    /// Whether, and with what load, it could take a choice of `model`. Its speed is still in tokens
    /// per second, zero if it is not known.
    pub fn candidate(&self, model: &str, variant: Option<&Variant>) -> Option<Candidate> {
        let offers = self.offers.read();
        let (_, offered) = loaded(&offers, model)?;
        if variant.is_some_and(|variant| variant != offered) {
            return None;
        }
        let active = self.active.lock();
        (!active.draining).then(|| Candidate {
            worker: self.id,
            name_hash: self.name_hash,
            assigned: active.assigned(),
            used: active.used(),
            slots: self.slots,
            kv_used: active.kv_used(),
            speed: active.speed.unwrap_or_default(),
        })
    }
}

fn with_variants(offers: Vec<ModelOffer>) -> Vec<(Arc<ModelOffer>, Variant)> {
    offers
        .into_iter()
        .map(|offer| (Variant::from(&offer), offer))
        .map(|(variant, offer)| (offer.into(), variant))
        .collect()
}

fn loaded<'a>(offers: &'a [(Arc<ModelOffer>, Variant)], model: &str) -> Option<&'a (Arc<ModelOffer>, Variant)> {
    offers.iter().find(|(offer, _)| offer.name == model && !offer.on_request)
}

/// Turns speeds in tokens per second into shares of the fastest; one that is not known is the fastest,
/// so that it is tried.
pub fn compare_speeds(candidates: &mut [Candidate]) {
    /// A measurement may be wrong; even the slowest gets something.
    const SLOWEST: f64 = 0.05;
    let fastest = candidates.iter().map(|candidate| candidate.speed).fold(0.0, f64::max);
    for candidate in candidates {
        let known = candidate.speed > 0.0;
        candidate.speed = if known { (candidate.speed / fastest).clamp(SLOWEST, 1.0) } else { 1.0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choice::tests::job;

    fn connection() -> Connection {
        let offer = ModelOffer { name: "ns/m".into(), ..ModelOffer::default() };
        let hello = WorkerHello { worker: "w".into(), models: vec![offer], slots: 4, ..WorkerHello::default() };
        Connection::new(1, "ns", hello, mpsc::channel(1).0)
    }

    #[test]
    fn what_was_sent_since_the_last_report_counts_on_top_of_it() {
        let connection = connection();
        let used = || connection.candidate("ns/m", None).unwrap().used;
        connection.put(&Arc::new(Choice::new(job(), 0, Arc::default())));
        assert_eq!(used(), 1);
        // One of ours and two of other gateways.
        connection.report(Load { running: 3, kv_tokens: 100, kv_tokens_free: 25, ..Load::default() });
        assert_eq!(used(), 3);
        connection.put(&Arc::new(Choice::new(job(), 1, Arc::default())));
        assert_eq!(used(), 4);
        assert_eq!(connection.candidate("ns/m", None).unwrap().kv_used, 0.75);
    }

    #[test]
    fn a_choice_that_goes_on_from_another_is_not_taken_in_its_stead() {
        let connection = connection();
        let old = Arc::new(Choice::new(job(), 0, Arc::default()));
        connection.put(&old);
        let new = Arc::new(Choice::restored(job(), 0, Arc::default(), old.transcript()));
        connection.put(&new);
        assert!(!connection.take(&old));
        assert!(connection.take(&new));
        assert_eq!(connection.candidate("ns/m", None).unwrap().assigned, 0);
    }

    #[test]
    fn speeds_are_compared_with_the_fastest() {
        let one = |speed| Candidate { speed, ..connection().candidate("ns/m", None).unwrap() };
        let mut candidates = [one(50.0), one(0.0), one(100.0), one(1.0)];
        compare_speeds(&mut candidates);
        assert_eq!(candidates.map(|candidate| candidate.speed), [0.5, 1.0, 1.0, 0.05]);
    }
}
