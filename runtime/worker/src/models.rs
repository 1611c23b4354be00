//! What this process serves: models that are loaded, and models that it loads when a gateway asks for them.

use crate::attach::Lane;
use crate::model::Offered;
use crate::scheduler::Handle;
use parking_lot::RwLock;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use vicuna_protocol::inference::ModelOffer;

/// Requests for models that wait for the loader; the gateways say them again each second.
const WANTED: usize = 64;

pub struct Models {
    state: RwLock<State>,
    /// Counts changes of what is offered.
    changes: watch::Sender<u64>,
    wanted: mpsc::Sender<String>,
}

#[derive(Default)]
struct State {
    lanes: HashMap<String, Arc<Lane>>,
    /// In the order in which they were entered.
    offers: Vec<ModelOffer>,
    /// Each once, however many names it has.
    schedulers: Vec<Handle>,
}

/// Why there is no lane of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absent {
    /// It is not loaded, but will be.
    OnRequest,
    Unknown,
}

impl Models {
    /// With what gateways want.
    pub fn new() -> (Self, mpsc::Receiver<String>) {
        let (wanted, wishes) = mpsc::channel(WANTED);
        (Self { state: RwLock::default(), changes: watch::channel(0).0, wanted }, wishes)
    }

    pub fn lane(&self, model: &str) -> Result<Arc<Lane>, Absent> {
        let state = self.state.read();
        match state.lanes.get(model) {
            Some(lane) => Ok(lane.clone()),
            None if state.offers.iter().any(|offer| offer.name == model) => Err(Absent::OnRequest),
            None => Err(Absent::Unknown),
        }
    }

    pub fn offers(&self) -> Vec<ModelOffer> {
        self.state.read().offers.clone()
    }

    pub fn schedulers(&self) -> Vec<Handle> {
        self.state.read().schedulers.clone()
    }

    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// A gateway holds requests for it.
    pub fn want(&self, model: &str) {
        if matches!(self.lane(model), Err(Absent::OnRequest)) && self.wanted.try_send(model.to_owned()).is_err() {
            tracing::debug!(model, "the loader has enough to do");
        }
    }

    /// A name that can be loaded, or, `at_start`, is going to be; `false` if it is there already.
    pub fn announce(&self, name: &str, at_start: bool) -> bool {
        let mut state = self.state.write();
        let new = state.offers.iter().all(|offer| offer.name != name);
        if new {
            state.offers.push(ModelOffer { at_start, ..on_request(name) });
        }
        new
    }

    /// What is being done to load it.
    pub fn tell(&self, name: &str, progress: String) {
        let mut state = self.state.write();
        let offer = state.offers.iter_mut().find(|offer| offer.name == name && offer.on_request);
        let told = offer.is_some_and(|offer| std::mem::replace(&mut offer.progress, progress.clone()) != progress);
        drop(state);
        if told {
            self.changed();
        }
    }

    /// Loaded. The error is a name that is there already.
    pub fn enter(&self, offered: Vec<Offered>, scheduler: Handle) -> Result<(), String> {
        let mut state = self.state.write();
        for Offered { adapter, encoder, vocabulary, offer } in offered {
            tracing::info!(
                model = offer.name,
                digest = offer.weights_digest,
                quantization = offer.quantization,
                "the model is loaded"
            );
            let lane = Lane::new(adapter, encoder, vocabulary, scheduler.clone());
            if state.lanes.insert(offer.name.clone(), Arc::new(lane)).is_some() {
                return Err(offer.name);
            }
            match state.offers.iter_mut().find(|other| other.name == offer.name) {
                Some(other) => *other = offer,
                None => state.offers.push(offer),
            }
        }
        state.schedulers.push(scheduler);
        drop(state);
        self.changed();
        Ok(())
    }

    /// On request again: gateways send no more. What runs goes on as long as somebody holds its lane.
    pub fn withdraw(&self, name: &str) -> Option<Arc<Lane>> {
        let mut state = self.state.write();
        let lane = state.lanes.remove(name);
        if let Some(offer) = state.offers.iter_mut().find(|offer| offer.name == name) {
            *offer = on_request(name);
        }
        drop(state);
        self.changed();
        lane
    }

    /// Its last request has ended.
    pub fn forget(&self, scheduler: &Handle) {
        self.state.write().schedulers.retain(|other| !other.is(scheduler));
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}

fn on_request(name: &str) -> ModelOffer {
    ModelOffer { name: name.to_owned(), on_request: true, ..ModelOffer::default() }
}
