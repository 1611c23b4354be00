//! One training's membership at work: a task with a bounded mailbox that owns the state machine.

use super::membership::{Effect, Event, Formation, Limits, Membership, PodFact, Target};
use super::record::Record;
use super::registry::{Clock, Key, Opening, Told};
use super::report::{Happening, Phase, PodUid, RankView, RecoveryPhases, Report};
use super::store::{RecordStore, StoreError, Swap};
use crate::metrics::Metrics;
use rand::Rng;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use vicuna_protocol::coordinator::coordinator_message::Body;
use vicuna_protocol::coordinator::{self as wire, CoordinatorMessage};

/// Messages that wait for the session, at most; senders wait then.
const MAILBOX: usize = 1024;
/// Messages that wait for one rank, at most; a rank that is that slow loses its stream.
pub const RANK_MAILBOX: usize = 64;
const TICK: Duration = Duration::from_millis(500);
/// Of mere steps the controller hears this often.
const TELL_EVERY: Duration = Duration::from_secs(1);
const RETRY_STORE: Duration = Duration::from_secs(1);

/// To one rank. An error ends its stream.
pub type RankSender = mpsc::Sender<Result<CoordinatorMessage, tonic::Status>>;

enum Mail {
    Joined { stream: u64, hello: wire::Hello, sender: RankSender },
    Said { stream: u64, pod: PodUid, body: wire::rank_message::Body },
    Closed { stream: u64, pod: PodUid },
}

/// The way to a session. The session ends when the last handle is dropped.
#[derive(Clone)]
pub struct SessionHandle {
    uid: Arc<str>,
    mail: mpsc::Sender<Mail>,
    target: Arc<watch::Sender<Target>>,
    pods: Arc<watch::Sender<Option<BTreeMap<PodUid, PodFact>>>>,
    report: watch::Receiver<Option<Report>>,
}

impl SessionHandle {
    /// UID of the training.
    pub fn uid(&self) -> &str {
        &self.uid
    }

    pub fn retarget(&self, target: Target) {
        self.target.send_if_modified(|current| {
            let changed = *current != target;
            *current = target;
            changed
        });
    }

    /// What caches show of all pods of the training.
    pub fn set_pods(&self, pods: BTreeMap<PodUid, PodFact>) {
        self.pods.send_if_modified(|current| {
            let changed = current.as_ref() != Some(&pods);
            *current = Some(pods);
            changed
        });
    }

    /// `None` until the record has been read.
    pub fn report(&self) -> Option<Report> {
        self.report.borrow().clone()
    }

    /// `Err`: the session has ended.
    pub async fn joined(&self, stream: u64, hello: wire::Hello, sender: RankSender) -> Result<(), Ended> {
        self.mail.send(Mail::Joined { stream, hello, sender }).await.map_err(|_| Ended)
    }

    pub async fn said(&self, stream: u64, pod: &str, body: wire::rank_message::Body) -> Result<(), Ended> {
        let pod = pod.to_owned();
        self.mail.send(Mail::Said { stream, pod, body }).await.map_err(|_| Ended)
    }

    pub async fn closed(&self, stream: u64, pod: &str) -> Result<(), Ended> {
        let pod = pod.to_owned();
        self.mail.send(Mail::Closed { stream, pod }).await.map_err(|_| Ended)
    }
}

#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the training is over or deleted")]
pub struct Ended;

pub struct Session {
    key: Key,
    job: String,
    store: Box<dyn RecordStore>,
    clock: Clock,
    metrics: Arc<Metrics>,
    told: mpsc::Sender<Told>,
    membership: Membership,
    /// Streams, and senders until one is full.
    ranks: HashMap<PodUid, (u64, Option<RankSender>)>,
    report: watch::Sender<Option<Report>>,
    told_at: Option<Instant>,
    /// What the controller was told last, of what it acts on.
    shown: (Phase, BTreeMap<PodUid, RankView>),
}

impl Session {
    /// Runs it until its last handle is dropped.
    pub fn start(
        key: Key,
        opening: Opening,
        store: Box<dyn RecordStore>,
        clock: Clock,
        metrics: Arc<Metrics>,
        told: mpsc::Sender<Told>,
    ) -> SessionHandle {
        let (mail, mailbox) = mpsc::channel(MAILBOX);
        let (target, targets) = watch::channel(opening.target);
        let (pods, pods_seen) = watch::channel(None);
        let (report, reports) = watch::channel(None);
        let handle = SessionHandle {
            uid: opening.owner.uid.as_str().into(),
            mail,
            target: Arc::new(target),
            pods: Arc::new(pods),
            report: reports,
        };
        let Opening { counters, began_at, checkpoint, reproducibility, .. } = opening;
        tokio::spawn(async move {
            let mut store = store;
            let Some(record) = read_until_known(&mut *store, &key).await else { return };
            let now = clock.now_ms();
            let membership =
                Membership::new(now, Limits::default(), record, counters).after(began_at.unwrap_or(now), checkpoint);
            let membership = membership.reproducing(reproducibility);
            let session = Self {
                key,
                job: opening.job,
                store,
                clock,
                metrics,
                told,
                membership,
                ranks: HashMap::new(),
                report,
                told_at: None,
                shown: Default::default(),
            };
            session.run(mailbox, targets, pods_seen).await;
        });
        handle
    }

    /// Pods come first: without them every rank would look gone.
    async fn run(
        mut self,
        mut mailbox: mpsc::Receiver<Mail>,
        mut targets: watch::Receiver<Target>,
        mut pods: watch::Receiver<Option<BTreeMap<PodUid, PodFact>>>,
    ) {
        if pods.wait_for(Option::is_some).await.is_err() {
            return;
        }
        targets.mark_changed();
        pods.mark_changed();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let event = tokio::select! {
                biased;
                changed = pods.changed() => match changed {
                    Ok(()) => pods.borrow_and_update().clone().map(Event::Pods),
                    Err(_) => return,
                },
                changed = targets.changed() => match changed {
                    Ok(()) => Some(Event::Target(*targets.borrow_and_update())),
                    Err(_) => return,
                },
                mail = mailbox.recv() => match mail {
                    Some(mail) => self.open(mail),
                    None => return,
                },
                _ = tick.tick() => Some(Event::Tick),
            };
            if let Some(event) = event
                && self.handle(event).await.is_err()
            {
                return;
            }
        }
    }

    /// Drops what an older stream of a rank still had under way.
    fn open(&mut self, mail: Mail) -> Option<Event> {
        match mail {
            Mail::Joined { stream, hello, sender } => {
                self.ranks.insert(hello.pod_uid.clone(), (stream, Some(sender)));
                Some(Event::Joined(hello))
            }
            Mail::Said { stream, pod, body } => {
                let current = self.ranks.get(&pod).is_some_and(|(current, _)| *current == stream);
                match body {
                    _ if !current => None,
                    // After Stale a rank says hello again, on the same stream.
                    wire::rank_message::Body::Hello(hello) => (hello.pod_uid == pod).then_some(Event::Joined(hello)),
                    body => Some(Event::Said(pod, body)),
                }
            }
            Mail::Closed { stream, pod } => {
                let current = self.ranks.get(&pod).is_some_and(|(current, _)| *current == stream);
                if current {
                    self.ranks.remove(&pod);
                }
                current.then_some(Event::Disconnected(pod))
            }
        }
    }

    async fn handle(&mut self, event: Event) -> Result<(), StoreError> {
        let mut happenings = Vec::new();
        let mut next = Some(event);
        while let Some(event) = next.take() {
            for effect in self.membership.step(self.clock.now_ms(), event) {
                if let Effect::WriteRecord(record) = effect {
                    next = Some(self.swap(&record).await?);
                } else {
                    self.carry_out(effect, &mut happenings);
                }
            }
        }
        self.publish(happenings).await;
        Ok(())
    }

    fn carry_out(&mut self, effect: Effect, happenings: &mut Vec<Happening>) {
        match effect {
            Effect::Welcome(pod) => {
                let job = self.job.clone();
                self.send(&pod, Body::Welcome(wire::Welcome { job }));
            }
            Effect::Send(pod, body) => self.send(&pod, body),
            Effect::Form(formation) => self.form(&formation),
            Effect::Happened(happening) => {
                self.measure(&happening);
                happenings.push(happening);
            }
            // Taken out by the caller, which has to wait for it.
            Effect::WriteRecord(_) => {}
        }
    }

    fn send(&mut self, pod: &str, body: Body) {
        let Some((_, slot)) = self.ranks.get_mut(pod) else { return };
        let Some(sender) = slot else { return };
        if may_be_left_out(&body, sender) {
            return;
        }
        let message = CoordinatorMessage { body: Some(body) };
        if sender.try_send(Ok(message)).is_err() {
            // Without this message its view is wrong: it has to say hello again.
            tracing::warn!(pod, "a rank does not take its messages: its stream is closed");
            *slot = None;
        }
    }

    /// Every generation has its own key, which only its members learn.
    fn form(&mut self, formation: &Formation) {
        let Formation { record, memory, canary, leavers, between_interruptions_ms } = formation;
        let mut key = vec![0u8; 32];
        rand::rng().fill(&mut key[..]);
        let members: Vec<wire::Member> = record
            .members
            .iter()
            .map(|member| wire::Member {
                pod_uid: member.pod_uid.clone(),
                pod_name: member.pod_name.clone(),
                node: member.node.clone(),
                address: member.address.clone(),
                leaves: leavers.contains(&member.pod_uid),
            })
            .collect();
        for (rank, member) in record.members.iter().enumerate() {
            let form = wire::Form {
                generation: record.generation,
                rank: u32::try_from(rank).unwrap_or(u32::MAX),
                members: members.clone(),
                key: key.clone(),
                base_step: record.base_step,
                base: record.base.clone().map(Into::into),
                memory: memory.clone(),
                canary: *canary,
                between_interruptions_ms: *between_interruptions_ms,
                purpose: record.purpose.into(),
            };
            self.send(&member.pod_uid, Body::Form(form));
        }
    }

    /// Tries until it is known who won, or until we are not the leader any more.
    async fn swap(&mut self, record: &Record) -> Result<Event, StoreError> {
        loop {
            match self.store.swap(record).await {
                Ok(Swap::Written) => return Ok(Event::RecordWritten),
                Ok(Swap::Conflict(current)) => return Ok(Event::RecordConflict(current.map(|record| *record))),
                Err(error @ StoreError::NotLeader(_)) => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, training = ?self.key, "the record is written again");
                    tokio::time::sleep(RETRY_STORE).await;
                }
            }
        }
    }

    async fn publish(&mut self, happenings: Vec<Happening>) {
        let report = self.membership.report(self.clock.now_ms());
        self.gauge(&report);
        let shown = (report.phase, report.ranks.clone());
        let changed = self.report.send_if_modified(|current| {
            let changed = current.as_ref() != Some(&report);
            *current = Some(report);
            changed
        });
        let is_step = |happening: &Happening| matches!(happening, Happening::Stepped(_));
        let steps_only = !happenings.is_empty() && happenings.iter().all(is_step);
        let due = self.told_at.is_none_or(|at| at.elapsed() >= TELL_EVERY);
        if (changed || !happenings.is_empty()) && (due || !steps_only || self.shown != shown) {
            self.told_at = Some(Instant::now());
            self.shown = shown;
            // The controller gone means that the process ends.
            let _ = self.told.send((self.key.clone(), happenings)).await;
        }
    }

    fn gauge(&self, report: &Report) {
        let object = [self.key.0.as_str(), self.key.1.as_str()];
        let ranks = i64::try_from(report.members.len()).unwrap_or(i64::MAX);
        let generation = i64::try_from(report.generation).unwrap_or(i64::MAX);
        self.metrics.training_ranks.with_label_values(&object).set(ranks);
        self.metrics.training_generation.with_label_values(&object).set(generation);
        for counter in [&self.metrics.notices, &self.metrics.reclaims, &self.metrics.lost_steps] {
            // Series exist from the start, so that the first reclaim is a rise from 0.
            counter.with_label_values(&object);
        }
    }

    fn measure(&self, happening: &Happening) {
        let object = [self.key.0.as_str(), self.key.1.as_str()];
        let metrics = &self.metrics;
        match happening {
            Happening::Stepped(step) => {
                let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
                metrics.training_step.with_label_values(&object).set(signed(step.step));
                metrics.training_steps.with_label_values(&object).set(signed(step.steps));
                if let Some(loss) = step.loss {
                    metrics.training_loss.with_label_values(&object).set(loss);
                }
                if step.step_seconds > 0.0 {
                    let rate = step.tokens as f64 / step.step_seconds;
                    metrics.training_tokens_per_second.with_label_values(&object).set(rate);
                }
            }
            Happening::Evaluated(evaluation) => {
                metrics.training_evaluation_loss.with_label_values(&object).set(evaluation.loss);
            }
            Happening::Checkpointed(checkpoint) => {
                let seconds = checkpoint.stall_ms as f64 / 1000.0;
                metrics.training_checkpoint_stall_seconds.with_label_values(&object).set(seconds);
            }
            Happening::Noticed { .. } => metrics.notices.with_label_values(&object).inc(),
            Happening::Reclaimed { .. } => metrics.reclaims.with_label_values(&object).inc(),
            Happening::StepsLost { steps, .. } => {
                metrics.lost_steps.with_label_values(&object).inc_by(*steps);
            }
            Happening::Recovered { after_ms, phases, .. } => {
                metrics.recovery_seconds.with_label_values(&object).observe(*after_ms as f64 / 1000.0);
                let RecoveryPhases { detect, agree, restore, step } = *phases;
                for (phase, ms) in [("detect", detect), ("agree", agree), ("restore", restore), ("step", step)] {
                    let labels = [object[0], object[1], phase];
                    metrics.recovery_phase_seconds.with_label_values(&labels).set(ms as f64 / 1000.0);
                }
            }
            _ => {}
        }
    }
}

/// Nothing depends on hearing of others' notices. When many nodes go at once the half of a mailbox is left to what a rank
/// has to hear.
fn may_be_left_out(body: &Body, sender: &RankSender) -> bool {
    matches!(body, Body::Noticed(_)) && sender.capacity() <= sender.max_capacity() / 2
}

/// `None`: we are not the leader any more.
async fn read_until_known(store: &mut dyn RecordStore, key: &Key) -> Option<Option<Record>> {
    loop {
        match store.read().await {
            Ok(record) => return Some(record),
            Err(StoreError::NotLeader(_)) => return None,
            Err(error) => {
                tracing::warn!(%error, training = ?key, "the record is read again");
                tokio::time::sleep(RETRY_STORE * 2).await;
            }
        }
    }
}

#[cfg(test)]
mod tests;
