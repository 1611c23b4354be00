//! Who trains together: design.md's membership as a pure state machine. It has no client, clock or
//! randomness: [`Membership::step`] takes the time and an event and returns what to do.
//!
//! An event first changes what is known (`learn.rs`), then the state follows from what is known
//! (`advance.rs`). So no transition depends on which of two events came first, and a lost or repeated
//! event does no harm: the next tick decides the same.
//!
//! A generation starts from what ranks hold in memory wherever every block has a holder (`base.rs`);
//! else from the newest manifest in the bucket, or the base model. Where only ranks that leave hold something, they and
//! those who stay form a generation that trains no step and hands it over. How long all that may take before a notice is
//! over is in `notice.rs`.

mod advance;
mod base;
#[cfg(test)]
mod exhaustive;
mod learn;
mod notice;
mod pace;
mod rank;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use super::manifest::Manifests;
use super::record::{Finish, Member, Record};
use super::report::{
    CheckpointReport, Counters, EvaluationReport, Happening, MemoryNeed, Phase, PodUid, RankFailure, Remedy, Report,
    StepReport,
};
use pace::Pace;
use rank::Rank;
use std::collections::{BTreeMap, BTreeSet};
use vicuna_protocol::coordinator as wire;
use vicuna_protocol::coordinator::coordinator_message::Body;
use vicuna_protocol::coordinator::form::Purpose;
use vicuna_protocol::job::Reproducibility;

/// Unix time in ms, from a clock that never goes back.
pub type Millis = u64;

/// Ranks known of one training, at most.
const MAX_RANKS: usize = 1024;
/// Changes of a recipe that a rank advises, at most.
const MAX_REMEDIES: usize = 16;
/// Failures remembered, at most.
const MAX_FAILURES: usize = 64;

/// How long things may take.
#[derive(Clone, Debug)]
pub struct Limits {
    /// A new leader waits so long for hellos after the newest one came.
    pub adopt_ms: Millis,
    /// … and so long for the first one.
    pub first_hello_ms: Millis,
    /// Answers to an unplanned stop.
    pub collect_ms: Millis,
    /// … of which those whom a peer has lost get this much.
    pub lost_ms: Millis,
    /// Answers to a planned stop once its last step is made, beside five steps.
    pub planned_ms: Millis,
    /// Handing over what only leavers hold, at least: what it took last is reckoned with.
    pub hand_over_ms: Millis,
    /// No step for so long, and for five steps, means that a rank hangs.
    pub stall_ms: Millis,
    /// … and where ranks have said that nothing but a step comes next, at least so long.
    pub missed_ms: Millis,
    /// … by which a step may take longer than it usually does.
    pub slack_ms: Millis,
    /// No event for so long, though ticks come more often, means that it was we who stood still.
    pub attention_ms: Millis,
    /// Answers to a stop because of a rank that hangs, where those who have answered can go on without the others.
    pub hung_ms: Millis,
    /// The first step of a run may take so long.
    pub first_step_ms: Millis,
    /// Connecting to peers, and handing over what they hold.
    pub move_ms: Millis,
    /// Reading a base from the store; writing a checkpoint or the result while nothing else goes on.
    pub store_ms: Millis,
    /// No step for so long, and for three steps, means that a rank whose stream is broken too hangs or is cut off.
    pub silent_ms: Millis,
    /// Joiners are taken in together when they come within this.
    pub settle_ms: Millis,
    /// A rank that is connected and still fetching is waited for so long.
    pub joining_ms: Millis,
    /// A rank that missed a stop may come back within this; then its pod is replaced.
    pub suspect_ms: Millis,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            adopt_ms: 10_000,
            first_hello_ms: 30_000,
            collect_ms: 5_000,
            lost_ms: 2_500,
            planned_ms: 120_000,
            hand_over_ms: 2_000,
            stall_ms: 30_000,
            missed_ms: 3_000,
            slack_ms: 1_500,
            attention_ms: 1_000,
            hung_ms: 1_500,
            first_step_ms: 300_000,
            move_ms: 600_000,
            store_ms: 1_800_000,
            silent_ms: 4_000,
            settle_ms: 2_000,
            joining_ms: 20_000,
            suspect_ms: 15_000,
        }
    }
}

/// What the spec asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub min: usize,
    pub max: usize,
    pub suspend: bool,
    /// Ranks of any numerics class may join, if they show that they compute the same bits.
    pub any_class: bool,
}

/// Why and by when a pod goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Departure {
    pub source: String,
    /// 0: unknown.
    pub deadline_ms: Millis,
    /// Without hurry a replacement is awaited first.
    pub hurry: bool,
    /// The node is taken, rather than the pod removed by somebody.
    pub reclaim: bool,
}

impl Departure {
    /// Where both say when.
    fn is_over_before(&self, other: &Self) -> bool {
        self.deadline_ms > 0 && (other.deadline_ms == 0 || self.deadline_ms < other.deadline_ms)
    }
}

/// What the caches know of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFact {
    pub departure: Option<Departure>,
    /// It runs no more.
    pub ended: bool,
}

#[derive(Clone, Debug)]
pub enum Event {
    Joined(wire::Hello),
    Disconnected(PodUid),
    /// What a rank says after its hello.
    Said(PodUid, wire::rank_message::Body),
    /// All pods of the training that exist: a pod that is not there is gone.
    Pods(BTreeMap<PodUid, PodFact>),
    Target(Target),
    Tick,
    RecordWritten,
    /// Somebody else changed the record: this is what it says.
    RecordConflict(Option<Record>),
}

#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// The rank is one of ours: hand it the job.
    Welcome(PodUid),
    Send(PodUid, Body),
    /// Make a fresh key, and send each member its place.
    Form(Formation),
    /// Swap the record; answer with `RecordWritten` or `RecordConflict`.
    WriteRecord(Record),
    Happened(Happening),
}

/// A generation about to be.
#[derive(Clone, Debug, PartialEq)]
pub struct Formation {
    pub record: Record,
    /// What the members hold, where they go on from memory.
    pub memory: Option<wire::MemoryBase>,
    /// Members prove that they compute alike.
    pub canary: bool,
    /// Members that will not be in the next generation.
    pub leavers: BTreeSet<PodUid>,
    pub between_interruptions_ms: Millis,
}

/// A generation whose members get ready.
#[derive(Clone, Debug, PartialEq)]
struct Move {
    /// Digests of what members came to.
    ready: BTreeMap<PodUid, String>,
    /// Members that were known to leave when it was formed.
    leavers: BTreeSet<PodUid>,
    /// Members that had state before: what they come to is right.
    holders: BTreeSet<PodUid>,
    purpose: Purpose,
    since: Millis,
    limit: Millis,
}

#[derive(Clone, Debug, PartialEq)]
enum State {
    Adopting {
        since: Millis,
        answered: BTreeSet<PodUid>,
    },
    Held {
        /// Earliest time for the next generation.
        not_before: Millis,
        /// Since when there have been enough ranks, or what too few of them hold is to be written down.
        enough_since: Option<Millis>,
        /// Survivors of a generation do not wait for others.
        eager: bool,
    },
    Planning(Formation),
    Moving(Move),
    Steady {
        since: Millis,
        /// A step was made.
        progressed: bool,
    },
    Collecting {
        planned: bool,
        /// What ranks hold is written down before they answer.
        saves: bool,
        limit: Millis,
        deadline: Millis,
        reason: String,
        answered: BTreeSet<PodUid>,
    },
    Stopped,
    /// The record with the result is being written.
    Finishing(Record),
    Finished(Finish),
}

/// When a recovery came to where it is.
#[derive(Clone, Copy, Debug, Default)]
struct Stages {
    detected: Option<Millis>,
    agreed: Option<Millis>,
    restored: Option<Millis>,
}

/// The membership of one training.
#[derive(Clone, Debug)]
pub struct Membership {
    limits: Limits,
    /// When the event came that is being taken.
    now: Millis,
    /// Since when events have been taken as they came. Before it steps may have been made whose reports still wait.
    attentive_since: Millis,
    target: Option<Target>,
    reproducibility: Reproducibility,
    record: Option<Record>,
    state: State,
    ranks: BTreeMap<PodUid, Rank>,
    /// `None` until the caches were heard: until then nobody is known to be gone.
    pods: Option<BTreeMap<PodUid, PodFact>>,
    manifests: Manifests,
    /// The last step that anybody applied, in the branch that counts.
    step: u64,
    /// By our own clock; 0 until we hear of a step, be it one that was made before we led.
    last_step_at: Millis,
    /// The base of the last generation, without blocks: should those go who have applied it, those who have its
    /// gradients can follow.
    committed: Option<wire::Holding>,
    step_ms: Option<u64>,
    /// What steps have taken lately.
    pace: Pace,
    /// Ranks said with the last step that the next one follows at once.
    step_is_next: bool,
    /// How long it took last until all members stood at a base that was in memory.
    moved_ms: Millis,
    /// The membership was broken up since the last step, by what counts as a disruption.
    interrupted: bool,
    /// When each stage of the recovery under way was reached.
    recovery: Stages,
    micro_batches: Option<usize>,
    /// Blocks that the state is cut into.
    blocks: Option<usize>,
    /// Bytes of a checkpoint; 0 until a rank says so.
    state_bytes: u64,
    steps: u64,
    /// Generations in a row that ended before their first step.
    fruitless: u32,
    /// How often no step came in time since the last one: each time more patience is had.
    stalls: u32,
    /// How often nobody was found to hang although no step came in time: so often patience is doubled for good.
    false_alarms: u32,
    /// The last generation in which one was counted: each has one at most, however many answer late.
    false_alarm_in: u64,
    progress: Option<StepReport>,
    evaluation: Option<EvaluationReport>,
    /// When a part of an evaluation was last done.
    evaluated_at: Millis,
    checkpoint: Option<CheckpointReport>,
    counters: Counters,
    /// When the training began, and ranks that went without being reclaimed or sent home while we led.
    began_at: Millis,
    losses: u64,
    /// What a rank needs, by number of ranks, as connected ranks say: kept, since every message asks for it.
    memory: Vec<MemoryNeed>,
    /// What the rank advises that has least.
    remedies: Vec<Remedy>,
    failures: BTreeMap<PodUid, RankFailure>,
    joined: u64,
    /// When a member called us that had not before, since we lead; 0 until one does.
    newest_hello: Millis,
    /// Members that peers have lost and that have not called us since we lead.
    lost_unheard: BTreeSet<PodUid>,
    effects: Vec<Effect>,
}

impl Membership {
    /// A new leader's membership: `record` as it was read, `counters` as the status has them.
    pub fn new(now: Millis, limits: Limits, record: Option<Record>, counters: Counters) -> Self {
        let mut membership = Self {
            limits,
            now,
            attentive_since: now,
            target: None,
            reproducibility: Reproducibility::Exact,
            state: State::held(now),
            ranks: BTreeMap::new(),
            pods: None,
            manifests: Manifests::default(),
            step: record.as_ref().map_or(0, |record| record.base_step),
            last_step_at: 0,
            committed: None,
            step_ms: None,
            pace: Pace::default(),
            step_is_next: false,
            moved_ms: 0,
            interrupted: false,
            recovery: Stages::default(),
            micro_batches: None,
            blocks: None,
            state_bytes: 0,
            steps: 0,
            fruitless: 0,
            stalls: 0,
            false_alarms: 0,
            false_alarm_in: 0,
            progress: None,
            evaluation: None,
            evaluated_at: now,
            checkpoint: None,
            counters,
            began_at: now,
            losses: 0,
            memory: Vec::new(),
            remedies: Vec::new(),
            failures: BTreeMap::new(),
            joined: 0,
            newest_hello: 0,
            lost_unheard: BTreeSet::new(),
            effects: Vec::new(),
            record: None,
        };
        membership.adopt(now, record);
        membership
    }

    /// What is known of the time before we led: when the training began, and its last checkpoint.
    pub fn after(self, began_at: Millis, checkpoint: Option<CheckpointReport>) -> Self {
        Self { began_at, checkpoint, ..self }
    }

    /// Whether ranks that compute other bits are kept out.
    pub fn reproducing(self, reproducibility: Reproducibility) -> Self {
        Self { reproducibility, ..self }
    }

    /// Mean time between interruptions so far; the next one is reckoned with now.
    fn between_interruptions_ms(&self, now: Millis) -> Millis {
        now.saturating_sub(self.began_at) / (self.counters.reclaims + self.losses + 1)
    }

    /// Takes one event and returns what is to be done, in order.
    pub fn step(&mut self, now: Millis, event: Event) -> Vec<Effect> {
        if now.saturating_sub(self.now) > self.limits.attention_ms {
            self.attentive_since = now;
        }
        self.now = now;
        self.learn(now, event);
        self.advance(now);
        std::mem::take(&mut self.effects)
    }

    fn adopt(&mut self, now: Millis, record: Option<Record>) {
        let Some(record) = record else { return };
        self.manifests.learn(record.base.clone());
        self.newest_hello = 0;
        self.state = match &record.finish {
            Some(finish) => State::Finished(finish.clone()),
            None if record.members.is_empty() => State::held(now),
            None => State::Adopting { since: now, answered: BTreeSet::new() },
        };
        self.record = Some(record);
    }

    fn generation(&self) -> u64 {
        self.record.as_ref().map_or(0, |record| record.generation)
    }

    /// Whether the record's members may be training right now.
    fn is_active(&self) -> bool {
        matches!(
            self.state,
            State::Adopting { .. } | State::Moving(_) | State::Steady { .. } | State::Collecting { .. }
        )
    }

    /// Members of the generation that trains or forms.
    fn members(&self) -> &[Member] {
        match (&self.record, self.is_active()) {
            (Some(record), true) => &record.members,
            _ => &[],
        }
    }

    fn is_member(&self, pod: &str) -> bool {
        self.members().iter().any(|member| member.pod_uid == pod)
    }

    /// Whether the rank can take part no more.
    fn is_gone(&self, pod: &str) -> bool {
        let ended = |pods: &BTreeMap<PodUid, PodFact>| pods.get(pod).is_none_or(|fact| fact.ended);
        self.pods.as_ref().is_some_and(ended) || self.ranks.get(pod).is_some_and(|rank| rank.failed)
    }

    /// Why and by when the rank goes: what its node says, or what it says itself; of two in a hurry the one that is over
    /// first.
    fn departure(&self, pod: &str) -> Option<&Departure> {
        let fact = self.pods.as_ref().and_then(|pods| pods.get(pod));
        let told = fact.and_then(|fact| fact.departure.as_ref());
        let own = self.ranks.get(pod).and_then(|rank| rank.own_notice.as_ref());
        match (told, own) {
            (Some(told), Some(own)) if own.hurry && (!told.hurry || own.is_over_before(told)) => Some(own),
            (Some(told), _) => Some(told),
            (None, own) => own,
        }
    }

    /// Whether the rank has been told to go in a hurry, be it by when it may.
    fn is_about_to_go(&self, pod: &str) -> bool {
        self.departure(pod).is_some_and(|departure| departure.hurry)
    }

    /// Whether it is time for it to leave: who has more of its notice left trains on.
    fn leaves_in_a_hurry(&self, pod: &str) -> bool {
        self.departure(pod).is_some_and(|departure| departure.hurry && self.is_due(departure))
    }

    /// Most ranks of use: more than micro-batches would have nothing to do.
    fn max(&self) -> usize {
        let asked = self.target.map_or(0, |target| target.max);
        self.micro_batches.map_or(asked, |most| asked.min(most.max(1)))
    }

    fn send(&mut self, pod: &str, body: Body) {
        if self.ranks.get(pod).is_some_and(|rank| rank.connected) {
            self.effects.push(Effect::Send(pod.to_owned(), body));
        }
    }

    fn happened(&mut self, happening: Happening) {
        self.effects.push(Effect::Happened(happening));
    }

    /// Where the training stands.
    pub fn report(&self, now: Millis) -> Report {
        // Once for all ranks: every message from a rank makes a report.
        let class = self.numerics_class();
        Report {
            phase: self.state.phase(),
            generation: self.generation(),
            members: self.members().to_vec(),
            ranks: self.ranks.iter().map(|(pod, rank)| (pod.clone(), self.view(pod, rank, class))).collect(),
            progress: self.progress.clone(),
            evaluation: self.evaluation,
            memory: self.memory.clone(),
            remedies: self.remedies.clone(),
            checkpoint: self.checkpoint.clone(),
            disruptions: self.counters,
            finish: match &self.state {
                State::Finished(finish) => Some(finish.clone()),
                _ => None,
            },
            failures: self.failures.clone(),
            unresponsive: self.unresponsive(now),
            activity: self.activity(),
            steps: self.steps,
        }
    }

    /// Fewer than these do not train: the spec says so, or that their memory does not suffice.
    fn fewest(&self) -> usize {
        let fit = MemoryNeed::fewest_that_fit(&self.memory) as usize;
        self.target.map_or(1, |target| target.min.max(1)).max(fit)
    }

    /// Nodes differ: all must have enough.
    fn memory_needs(&self) -> Vec<MemoryNeed> {
        let said = |rank: &&Rank| rank.connected && !rank.memory.is_empty();
        let all: Vec<&Rank> = self.ranks.values().filter(said).collect();
        let Some(first) = all.first() else { return Vec::new() };
        let fits = |index: usize| all.iter().all(|rank| rank.memory.get(index).is_none_or(|need| need.fits));
        first.memory.iter().enumerate().map(|(index, need)| MemoryNeed { fits: fits(index), ..*need }).collect()
    }

    fn least_remedies(&self) -> Vec<Remedy> {
        let said = self.ranks.values().filter(|rank| rank.connected && !rank.remedies.is_empty());
        let least = said.max_by_key(|rank| MemoryNeed::fewest_that_fit(&rank.memory));
        least.map_or_else(Vec::new, |rank| rank.remedies.clone())
    }

    fn view(&self, pod: &str, rank: &Rank, class: &str) -> super::report::RankView {
        super::report::RankView {
            connected: rank.connected,
            prepared: rank.prepared,
            leaving: self.is_about_to_go(pod),
            released: rank.released,
            blocked: Self::obstacle_of(rank, class),
            held_up: rank.held_up.clone(),
        }
    }

    fn unresponsive(&self, now: Millis) -> BTreeSet<PodUid> {
        let overdue =
            |rank: &Rank| rank.suspect_since.is_some_and(|since| now.saturating_sub(since) >= self.limits.suspect_ms);
        self.ranks.iter().filter(|(_, rank)| overdue(rank)).map(|(pod, _)| pod.clone()).collect()
    }

    fn activity(&self) -> String {
        let min = self.target.map_or(0, |target| target.min);
        match &self.state {
            State::Adopting { answered, .. } => {
                format!("a new leader waits for ranks: {} of {} answered", answered.len(), self.members().len())
            }
            State::Held { .. } => {
                format!("{} of at least {min} ranks are ready to train", self.candidates().len())
            }
            State::Planning(formation) => format!("records generation {}", formation.record.generation),
            State::Moving(Move { ready, purpose, .. }) => {
                let does = match purpose {
                    Purpose::Train => format!("load the base of generation {}", self.generation()),
                    Purpose::Save => "gather to write down what they hold".to_owned(),
                    Purpose::HandOver => "hand over what only leavers hold".to_owned(),
                };
                format!("ranks {does}: {} of {} ready", ready.len(), self.members().len())
            }
            State::Steady { .. } => {
                format!("generation {} trains with {} ranks", self.generation(), self.members().len())
            }
            State::Collecting { reason, answered, .. } => {
                format!(
                    "stops generation {}: {reason}; {} of {} answered",
                    self.generation(),
                    answered.len(),
                    self.members().len()
                )
            }
            State::Stopped => "suspended".to_owned(),
            State::Finishing(_) => "records the result".to_owned(),
            State::Finished(finish) => format!("complete after step {}", finish.step),
        }
    }
}

impl State {
    fn held(now: Millis) -> Self {
        Self::Held { not_before: now, enough_since: None, eager: false }
    }

    fn phase(&self) -> Phase {
        match self {
            Self::Adopting { .. } => Phase::Adopting,
            Self::Held { .. } => Phase::Held,
            Self::Planning(_) => Phase::Planning,
            Self::Moving(_) => Phase::Moving,
            Self::Steady { .. } => Phase::Steady,
            Self::Collecting { .. } => Phase::Collecting,
            Self::Stopped => Phase::Stopped,
            Self::Finishing(_) => Phase::Steady,
            Self::Finished(_) => Phase::Finished,
        }
    }
}
