//! The memberships of all trainings.

use super::membership::{Millis, Target};
use super::report::{CheckpointReport, Counters, Report};
use super::session::{Session, SessionHandle};
use super::store::{ConfigMapStore, Owner};
use crate::leader::Leadership;
use crate::metrics::Metrics;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::mpsc;
use tokio::time::Instant;
use vicuna_crds::VicunaTraining;
use vicuna_protocol::job::Reproducibility;

/// Trainings coordinated at a time, at most.
const MAX_SESSIONS: usize = 4096;

pub type Key = (String, String);

/// Unix time in ms that never goes back.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    started: Instant,
    started_ms: Millis,
}

impl Clock {
    pub fn start() -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self::starting_at(u64::try_from(since.as_millis()).unwrap_or(0))
    }

    /// A clock that shows this now.
    pub fn starting_at(started_ms: Millis) -> Self {
        Self { started: Instant::now(), started_ms }
    }

    pub fn now_ms(&self) -> Millis {
        let elapsed = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.started_ms.saturating_add(elapsed)
    }
}

/// Tells the controller which training's report has changed, and tells what happened.
pub type Told = (Key, Vec<super::report::Happening>);

/// What a session needs for its whole life.
pub struct Opening {
    pub owner: Owner,
    /// The job as JSON.
    pub job: String,
    pub target: Target,
    pub reproducibility: Reproducibility,
    pub counters: Counters,
    /// Absent: just now.
    pub began_at: Option<Millis>,
    /// The last one that is known of.
    pub checkpoint: Option<CheckpointReport>,
}

pub struct Coordinator {
    client: kube::Client,
    leadership: Leadership,
    metrics: Arc<Metrics>,
    clock: Clock,
    sessions: Mutex<HashMap<Key, SessionHandle>>,
    told: mpsc::Sender<Told>,
}

impl Coordinator {
    /// What sessions tell comes out of the receiver.
    pub fn new(
        client: kube::Client,
        leadership: Leadership,
        metrics: Arc<Metrics>,
        clock: Clock,
    ) -> (Self, mpsc::Receiver<Told>) {
        let (told, receiver) = mpsc::channel(1024);
        let coordinator = Self { client, leadership, metrics, clock, sessions: Mutex::default(), told };
        (coordinator, receiver)
    }

    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// The session of a training, started if there is none. A namesake's is replaced. `None`: too many.
    pub fn ensure(&self, opening: Opening) -> Option<SessionHandle> {
        let key = (opening.owner.namespace.clone(), opening.owner.name.clone());
        let mut sessions = self.sessions.lock();
        if let Some(session) = sessions.get(&key).filter(|session| session.uid() == opening.owner.uid) {
            session.retarget(opening.target);
            return Some(session.clone());
        }
        if sessions.len() >= MAX_SESSIONS && !sessions.contains_key(&key) {
            return None;
        }
        let store = ConfigMapStore::new(self.client.clone(), opening.owner.clone(), self.leadership.clone());
        let session =
            Session::start(key.clone(), opening, Box::new(store), self.clock, self.metrics.clone(), self.told.clone());
        sessions.insert(key, session.clone());
        Some(session)
    }

    pub fn get(&self, namespace: &str, name: &str) -> Option<SessionHandle> {
        let key = (namespace.to_owned(), name.to_owned());
        self.sessions.lock().get(&key).cloned()
    }

    pub fn report(&self, training: &VicunaTraining) -> Option<Report> {
        let namespace = training.metadata.namespace.as_deref()?;
        let session = self.get(namespace, training.metadata.name.as_deref()?)?;
        (Some(session.uid()) == training.metadata.uid.as_deref()).then(|| session.report()).flatten()
    }

    pub fn all(&self) -> Vec<(Key, SessionHandle)> {
        let sessions = self.sessions.lock();
        sessions.iter().map(|(key, session)| (key.clone(), session.clone())).collect()
    }

    /// The training is over, or gone: its ranks hear no more of us.
    pub fn close(&self, namespace: &str, name: &str) {
        let key = (namespace.to_owned(), name.to_owned());
        self.sessions.lock().remove(&key);
    }
}
