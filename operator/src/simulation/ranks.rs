//! Simulated ranks: processes that say what real ones say, and hold what real ones hold, block by block. Their streams to
//! the coordinator are late and break; each other they see as they are.

use super::bucket::Bucket;
use super::network::Life;
use super::replica::Replica;
use super::watchdog::Watchdog;
use super::{BLOCKS, NAMESPACE, Random, STEPS};
use crate::coordinator::manifest::Manifest;
use crate::testing::{heirs, kept};
use futures::channel::mpsc::{UnboundedSender, unbounded};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use tokio::sync::mpsc;
use tonic::Status;
use vicuna_protocol::auth::Caller;
use vicuna_protocol::coordinator as wire;
use wire::coordinator_message::Body;
use wire::form::Purpose;
use wire::progress::Next;
use wire::rank_message::Body as Said;

const MICRO_BATCHES: u32 = 8;
const ALL: u8 = (1 << BLOCKS) - 1;
const CHECKPOINT_EVERY: u64 = 6;
pub const STEP_MS: u64 = 1_200;
/// A rank that does not come to the base gives it up.
const LOADING_MS: u64 = 25_000;
const RETRY_MS: u64 = 2_000;
/// Within this the coordinator finds out that a rank's machine is gone, and peers by theirs.
const KEEP_ALIVE_MS: u64 = 5_000;
const PEERS_ALIVE_MS: u64 = 4_000;
const HOUR_MS: u64 = 3_600_000;
/// A checkpoint that waits for the store says so this often.
const TOLD_EVERY_MS: u64 = 15_000;
/// The result is told again until somebody has heard it.
const SAY_AGAIN_MS: u64 = 5_000;

/// How a process came to its end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ending {
    Done,
    Crashed,
}

#[derive(Clone)]
enum Doing {
    Fetching { until: u64 },
    Waiting,
    Loading { form: Rc<wire::Form>, since: u64, next: u64 },
    Ready(Rc<wire::Form>),
    Training(Rc<wire::Form>),
}

/// Bit maps of blocks at a step, and of those whose gradient of the next one is there.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Memory {
    step: u64,
    blocks: u8,
    advancing: u8,
}

struct Rank {
    name: String,
    node: String,
    doing: Doing,
    step: u64,
    memory: Option<Memory>,
    /// The generation that it was in last, and what is in memory is of.
    left: u64,
    /// A planned stop was heard, with these words.
    stopping: bool,
    leaves: bool,
    saves: bool,
    saved_at: Option<u64>,
    /// It does nothing, and until when.
    hung: bool,
    hung_until: u64,
    /// Notices that it heard of, by pod, and when it did.
    noticed: BTreeMap<String, u64>,
    /// Told to end by its kubelet.
    terminated: Option<u64>,
    said_notice: bool,
    blocked: bool,
    /// Since when a peer has been missing.
    misses_since: Option<u64>,
    finished_said_at: u64,
    stream: Option<Stream>,
    dials_at: u64,
    ending: Option<Ending>,
}

struct Stream {
    life: Life,
    up: UnboundedSender<Result<wire::RankMessage, Status>>,
    down: mpsc::Receiver<Result<wire::CoordinatorMessage, Status>>,
    /// What is on its way, with when it arrives.
    outbox: VecDeque<(u64, Said)>,
    inbox: VecDeque<(u64, Body)>,
}

fn pods(form: &wire::Form) -> impl Iterator<Item = &String> {
    form.members.iter().map(|member| &member.pod_uid)
}

impl Rank {
    fn form(&self) -> Option<&Rc<wire::Form>> {
        match &self.doing {
            Doing::Loading { form, .. } | Doing::Ready(form) | Doing::Training(form) => Some(form),
            Doing::Fetching { .. } | Doing::Waiting => None,
        }
    }

    fn is_in(&self, generation: u64) -> bool {
        self.form().is_some_and(|form| form.generation == generation)
    }

    fn has_left(&self, generation: u64) -> bool {
        match self.form() {
            Some(form) => form.generation > generation,
            None => self.left >= generation,
        }
    }

    fn trains(&self) -> Option<&Rc<wire::Form>> {
        match &self.doing {
            Doing::Training(form) if !self.hung => Some(form),
            _ => None,
        }
    }

    fn hangs(&mut self, until: u64) {
        (self.hung, self.hung_until) = (true, until);
    }

    fn acts(&self) -> bool {
        !self.hung && self.ending.is_none()
    }
}

/// A step, for whoever looks on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Made {
    pub at: u64,
    pub generation: u64,
    pub step: u64,
}

/// All of them, by pod.
pub struct Ranks {
    all: BTreeMap<String, Rank>,
    /// When a generation makes its next step.
    next_step: BTreeMap<u64, u64>,
    /// Checkpoints behind the training: when they are done, and of what.
    uploads: Vec<(u64, Rc<wire::Form>, u64)>,
    /// Streams whose ranks are gone, which the coordinator does not know yet.
    half_open: Vec<(u64, Stream)>,
    /// How long a step takes.
    pub step_ms: u64,
    pub made: Vec<Made>,
    /// When a checkpoint that waits was last said to.
    held_up_at: u64,
}

impl Default for Ranks {
    fn default() -> Self {
        Self {
            all: BTreeMap::new(),
            next_step: BTreeMap::new(),
            uploads: Vec::new(),
            half_open: Vec::new(),
            step_ms: STEP_MS,
            made: Vec::new(),
            held_up_at: 0,
        }
    }
}

/// What ranks see of the rest.
pub struct Surroundings<'a> {
    pub now: u64,
    pub trouble: bool,
    pub bucket: &'a mut Bucket,
    pub replicas: &'a [Replica],
    pub watchdog: &'a Watchdog,
    pub random: &'a mut Random,
}

impl Ranks {
    pub fn start(&mut self, uid: &str, name: &str, node: &str, now: u64) {
        let rank = Rank {
            name: name.to_owned(),
            node: node.to_owned(),
            doing: Doing::Waiting,
            step: 0,
            memory: None,
            left: 0,
            stopping: false,
            leaves: false,
            saves: false,
            saved_at: None,
            hung: false,
            hung_until: 0,
            noticed: BTreeMap::new(),
            terminated: None,
            said_notice: false,
            blocked: false,
            misses_since: None,
            finished_said_at: 0,
            stream: None,
            dials_at: now,
            ending: None,
        };
        self.all.insert(uid.to_owned(), rank);
    }

    /// Its node takes it with it: nobody is told.
    pub fn node_died(&mut self, node: &str, now: u64, random: &mut Random) {
        let on_it: Vec<String> =
            self.all.iter().filter(|(_, rank)| rank.node == node).map(|(uid, _)| uid.clone()).collect();
        on_it.iter().for_each(|uid| self.kill(uid, now, random));
    }

    /// The coordinator finds out at once, or by keep-alives.
    pub fn kill(&mut self, uid: &str, now: u64, random: &mut Random) {
        if let Some(rank) = self.all.remove(uid) {
            self.half_open.extend(rank.stream.map(|stream| (now + random.between(0, KEEP_ALIVE_MS), stream)));
        }
    }

    pub fn kill_all_but(&mut self, uids: &BTreeSet<String>, now: u64, random: &mut Random) {
        let gone: Vec<String> = self.all.keys().filter(|uid| !uids.contains(*uid)).cloned().collect();
        gone.iter().for_each(|uid| self.kill(uid, now, random));
    }

    /// SIGTERM; it is killed at the deadline.
    pub fn terminate(&mut self, uid: &str, deadline: u64) {
        if let Some(rank) = self.all.get_mut(uid) {
            rank.terminated = Some(deadline);
        }
    }

    /// How it came to its end, if it has.
    pub fn ended(&mut self, uid: &str) -> Option<Ending> {
        let ending = self.all.get(uid)?.ending?;
        self.all.remove(uid);
        Some(ending)
    }

    /// One of the things that processes and networks do.
    pub fn make_trouble(&mut self, around: &mut Surroundings) -> Option<String> {
        let uids: Vec<String> = self.all.keys().cloned().collect();
        let uid = around.random.pick(&uids)?.clone();
        let rank = self.all.get_mut(&uid)?;
        Some(match around.random.between(0, 10) {
            0..=4 => {
                rank.stream = None;
                rank.dials_at = around.now + around.random.between(200, 6_000);
                format!("{} loses its stream", rank.name)
            }
            5 | 6 => {
                rank.stream = None;
                rank.dials_at = around.now + around.random.between(10_000, 60_000);
                format!("{} is cut off from the coordinator", rank.name)
            }
            7 => {
                // Some only seem to.
                let lasts = *around.random.pick(&[4_000, 9_000, 20_000, HOUR_MS])?;
                rank.hangs(around.now + lasts);
                format!("{} hangs for {lasts} ms", rank.name)
            }
            8 if around.random.percent(50) => {
                rank.ending = Some(Ending::Crashed);
                rank.stream = None;
                around.watchdog.crashed();
                format!("{} crashes", rank.name)
            }
            _ => return self.tear_step(around),
        })
    }

    /// The step is committed by some, and the generation breaks before the others apply it.
    fn tear_step(&mut self, around: &mut Surroundings) -> Option<String> {
        let form = self.all.values().find_map(|rank| rank.trains().cloned())?;
        if !self.all_train(&form) {
            return None;
        }
        let step = self.all[pods(&form).next()?].step + 1;
        if step > STEPS {
            return None;
        }
        let world = form.members.len();
        for (place, uid) in pods(&form).enumerate() {
            let applies = around.random.percent(50);
            let Some(rank) = self.all.get_mut(uid) else { continue };
            let kept = kept(BLOCKS, place, world);
            let before = Memory { step: step - 1, blocks: kept, advancing: kept };
            rank.memory = Some(if applies { Memory { step, blocks: kept, advancing: 0 } } else { before });
            rank.step = if applies { step } else { step - 1 };
        }
        for uid in pods(&form) {
            self.leave(uid, form.generation, Vec::new(), around);
        }
        Some(format!("step {step} of generation {} is torn", form.generation))
    }

    pub fn tend(&mut self, around: &mut Surroundings) {
        let now = around.now;
        self.half_open.retain(|(due, stream)| now < *due && !stream.life.is_over());
        for rank in self.all.values_mut() {
            rank.hung &= now < rank.hung_until;
        }
        for uid in self.all.keys().cloned().collect::<Vec<_>>() {
            self.dial(&uid, around);
            self.exchange(&uid, around);
            self.act(&uid, around);
        }
        self.miss_peers(around);
        self.train(around);
        self.save(around);
        self.upload(around);
        for uid in self.all.keys().cloned().collect::<Vec<_>>() {
            self.exchange(&uid, around);
        }
    }

    fn dial(&mut self, uid: &str, around: &mut Surroundings) {
        let now = around.now;
        let Some(rank) = self.all.get_mut(uid).filter(|rank| rank.acts()) else { return };
        if rank.stream.as_ref().is_some_and(|stream| stream.life.is_over() || stream.down.is_closed()) {
            rank.stream = None;
            rank.dials_at = now + around.random.between(200, 3_000);
        }
        if rank.stream.is_some() || now < rank.dials_at {
            return;
        }
        rank.dials_at = now + around.random.between(500, 2_500);
        let doors: Vec<_> = around.replicas.iter().filter_map(Replica::door).collect();
        let Some((service, life)) = around.random.pick(&doors) else { return };
        let caller = Caller {
            namespace: NAMESPACE.to_owned(),
            service_account: crate::training::build::service_account::NAME.to_owned(),
            pod_name: Some(rank.name.clone()),
            pod_uid: Some(uid.to_owned()),
        };
        let (up, messages) = unbounded();
        if let Ok(down) = service.take(&caller, hello(uid, rank), messages) {
            let (outbox, inbox) = (VecDeque::new(), VecDeque::new());
            rank.stream = Some(Stream { life: life.clone(), up, down, outbox, inbox });
            rank.said_notice = false;
        }
    }

    /// What has been under way for long enough arrives.
    fn exchange(&mut self, uid: &str, around: &mut Surroundings) {
        let now = around.now;
        let mut heard = Vec::new();
        {
            let Some(rank) = self.all.get_mut(uid) else { return };
            let Some(stream) = &mut rank.stream else { return };
            while let Ok(Ok(message)) = stream.down.try_recv() {
                let last = stream.inbox.back().map_or(0, |(at, _)| *at);
                let at = (now + delay(around)).max(last);
                stream.inbox.extend(message.body.map(|body| (at, body)));
            }
            while stream.outbox.front().is_some_and(|(at, _)| now >= *at) {
                let Some((_, body)) = stream.outbox.pop_front() else { break };
                // The coordinator may have gone.
                let _ = stream.up.unbounded_send(Ok(wire::RankMessage { body: Some(body) }));
            }
            while !rank.hung && stream.inbox.front().is_some_and(|(at, _)| now >= *at) {
                heard.extend(stream.inbox.pop_front().map(|(_, body)| body));
            }
        }
        for body in heard {
            self.hear(uid, body, around);
        }
    }

    fn say(&mut self, uid: &str, body: Said, around: &mut Surroundings) {
        let at = around.now + delay(around);
        let Some(stream) = self.all.get_mut(uid).and_then(|rank| rank.stream.as_mut()) else { return };
        let last = stream.outbox.back().map_or(0, |(at, _)| *at);
        stream.outbox.push_back((at.max(last), body));
    }

    fn hear(&mut self, uid: &str, body: Body, around: &mut Surroundings) {
        let now = around.now;
        let Some(rank) = self.all.get_mut(uid).filter(|rank| rank.acts()) else { return };
        match body {
            Body::Welcome(_) => match rank.doing {
                // What it said last is said again to a new leader.
                Doing::Waiting if rank.left > 0 => self.say_stopped(uid, Vec::new(), around),
                Doing::Waiting => rank.doing = Doing::Fetching { until: now + around.random.between(500, 5_000) },
                Doing::Ready(_) => self.say_ready(uid, around),
                _ => {}
            },
            Body::Form(form) => {
                around.watchdog.formed(&form);
                (rank.stopping, rank.leaves, rank.saves, rank.left) = (false, false, false, 0);
                (rank.saved_at, rank.misses_since) = (None, None);
                let most = if around.trouble { 2_500 } else { 800 };
                let next = now + around.random.between(100, most);
                rank.doing = Doing::Loading { form: Rc::new(form), since: now, next };
            }
            Body::Go(go) => {
                if let Doing::Ready(form) = &rank.doing
                    && form.generation == go.generation
                {
                    let form = form.clone();
                    match form.purpose() {
                        Purpose::Train => {
                            around.watchdog.goes(&form, rank.step);
                            rank.doing = Doing::Training(form);
                        }
                        Purpose::Save => rank.stopping = true,
                        Purpose::HandOver => self.leave(uid, go.generation, Vec::new(), around),
                    }
                }
            }
            Body::Stop(stop) => {
                let here = rank.is_in(stop.generation);
                (rank.leaves, rank.saves) = (stop.leaves, stop.checkpoint);
                let writes = matches!(&rank.doing, Doing::Ready(form) if form.purpose() == Purpose::Save);
                let trains = matches!(&rank.doing, Doing::Training(_));
                if stop.planned && here && (trains || writes) {
                    rank.stopping = true;
                } else {
                    rank.stopping = false;
                    self.leave(uid, stop.generation, Vec::new(), around);
                }
            }
            Body::Stale(_) => {
                rank.doing = Doing::Waiting;
                (rank.memory, rank.left, rank.step, rank.stopping) = (None, 0, 0, false);
                let hello = hello(uid, rank);
                self.say(uid, Said::Hello(hello), around);
            }
            Body::Noticed(noticed) => {
                rank.noticed.insert(noticed.pod_name, now);
            }
            Body::Shutdown(_) => {
                rank.ending = Some(Ending::Done);
                rank.stream = None;
            }
        }
    }

    /// Leaves a generation for ever.
    fn leave(&mut self, uid: &str, generation: u64, lost: Vec<String>, around: &mut Surroundings) {
        let Some(rank) = self.all.get_mut(uid) else { return };
        if rank.form().is_some_and(|form| form.generation != generation) {
            return;
        }
        rank.doing = Doing::Waiting;
        (rank.left, rank.stopping, rank.saved_at, rank.misses_since) = (generation, false, None, None);
        self.say_stopped(uid, lost, around);
    }

    fn say_stopped(&mut self, uid: &str, lost: Vec<String>, around: &mut Surroundings) {
        let Some(rank) = self.all.get(uid) else { return };
        let holding = rank.memory.map(|memory| wire::Holding {
            step: memory.step,
            updates: memory.step,
            blocks: vec![memory.blocks],
            advancing: vec![memory.advancing],
            weights: true,
            ..Default::default()
        });
        let (generation, step) = (rank.left, rank.step);
        let manifests = manifests(around);
        self.say(uid, Said::Stopped(wire::Stopped { generation, step, manifests, holding, lost }), around);
    }

    fn act(&mut self, uid: &str, around: &mut Surroundings) {
        let now = around.now;
        let reached = around.bucket.is_reached(now);
        let Some(rank) = self.all.get_mut(uid).filter(|rank| rank.acts()) else { return };
        if let Some(deadline_ms) = rank.terminated.filter(|_| !rank.said_notice && rank.stream.is_some()) {
            rank.said_notice = true;
            let time_left_ms = deadline_ms.saturating_sub(now).max(1);
            self.say(
                uid,
                Said::Notice(wire::Notice { source: "SIGTERM".to_owned(), time_left_ms, ..Default::default() }),
                around,
            );
        }
        let Some(rank) = self.all.get_mut(uid) else { return };
        match rank.doing.clone() {
            Doing::Fetching { until } if now >= until && rank.stream.is_some() => {
                if !reached {
                    if !std::mem::replace(&mut rank.blocked, true) {
                        self.say(uid, blocked(false), around);
                    }
                    return;
                }
                rank.blocked = false;
                rank.doing = Doing::Waiting;
                let manifests = manifests(around);
                let prepared = wire::Prepared {
                    manifests,
                    micro_batches: MICRO_BATCHES,
                    steps: STEPS,
                    blocks: BLOCKS as u32,
                    state_bytes: 0,
                };
                self.say(uid, Said::Prepared(prepared), around);
            }
            Doing::Loading { form, since, next } if now >= next => self.load(uid, form, since, around),
            _ => {}
        }
    }

    fn load(&mut self, uid: &str, form: Rc<wire::Form>, since: u64, around: &mut Surroundings) {
        let (now, generation) = (around.now, form.generation);
        let retry = Doing::Loading { form: form.clone(), since, next: now + RETRY_MS };
        let Some(rank) = self.all.get_mut(uid) else { return };
        if !around.bucket.is_reached(now) && form.memory.is_none() {
            rank.doing = retry;
            return self.say(uid, blocked(false), around);
        }
        if let Some(base) = form.base.clone().filter(|base| !around.bucket.has(&Manifest::from(base.clone()))) {
            rank.doing = retry;
            let failed = wire::LoadFailed { generation, manifest: Some(base), message: "gone".into() };
            return self.say(uid, Said::LoadFailed(failed), around);
        }
        let Some(memory) = self.receive(uid, &form, around) else {
            if now >= since + LOADING_MS {
                return self.leave(uid, generation, Vec::new(), around);
            }
            if let Some(rank) = self.all.get_mut(uid) {
                rank.doing = retry;
            }
            return;
        };
        if let Some(rank) = self.all.get_mut(uid) {
            rank.step = form.base_step;
            rank.memory = Some(memory);
            rank.doing = Doing::Ready(form);
        }
        self.say_ready(uid, around);
    }

    fn say_ready(&mut self, uid: &str, around: &mut Surroundings) {
        let Some(rank) = self.all.get(uid) else { return };
        let Doing::Ready(form) = &rank.doing else { return };
        let ready = wire::Ready { generation: form.generation, state_digest: format!("state of step {}", rank.step) };
        self.say(uid, Said::Ready(ready), around);
    }

    /// What the rank has once it is at the base: what it had, and what it is to keep. `None`: peers do not have it (yet).
    fn receive(&self, uid: &str, form: &wire::Form, around: &Surroundings) -> Option<Memory> {
        let step = form.base_step;
        let place = pods(form).position(|pod| pod == uid)?;
        let kept = kept(BLOCKS, place, form.members.len());
        let Some(base) = &form.memory else {
            return Some(Memory { step, blocks: kept, advancing: 0 });
        };
        let own = self.all[uid].memory;
        let said = base.holdings.get(place).filter(|holding| holding.blocks.iter().any(|bits| *bits != 0));
        let same = |said: &wire::Holding, own: &Memory| said.step == own.step && said.blocks == [own.blocks];
        if let (Some(said), Some(own)) = (said, own)
            && !same(said, &own)
            && own.step != step
        {
            around.watchdog.broken("a step is counted once", format!("{said:?} is counted on, and there is {own:?}"));
        }
        let at_base = |pod: &str| {
            let here = self.all.get(pod).filter(|rank| rank.is_in(form.generation) && rank.acts());
            here.and_then(|rank| rank.memory).map_or(0, |memory| match step {
                step if memory.step == step => memory.blocks,
                step if memory.step + 1 == step => memory.advancing,
                _ => 0,
            })
        };
        let offered = pods(form).fold(0, |all, pod| all | at_base(pod));
        let staying: Vec<&wire::Member> = form.members.iter().filter(|member| !member.leaves).collect();
        // What only leavers hold goes to the first one who stays.
        let first = staying.first().is_some_and(|member| member.pod_uid == uid);
        let held_by_staying = staying.iter().fold(0, |all, member| all | at_base(&member.pod_uid));
        let rescued = if first { ALL & !held_by_staying } else { 0 };
        let wanted = match form.purpose() {
            Purpose::Train => kept,
            Purpose::Save => kept | rescued,
            Purpose::HandOver => rescued,
        };
        (offered & wanted == wanted).then(|| Memory { step, blocks: at_base(uid) | wanted, advancing: 0 })
    }

    /// Who has lost a peer stops after a moment.
    fn miss_peers(&mut self, around: &mut Surroundings) {
        let now = around.now;
        for uid in self.all.keys().cloned().collect::<Vec<_>>() {
            let rank = &self.all[&uid];
            let Some(form) = rank.form().cloned().filter(|_| rank.acts()) else { continue };
            let missing = |member: &&wire::Member| {
                let peer = self.all.get(&member.pod_uid).filter(|peer| peer.ending.is_none());
                peer.is_none_or(|peer| peer.has_left(form.generation))
            };
            let lost: Vec<String> = form.members.iter().filter(missing).map(|member| member.pod_name.clone()).collect();
            let Some(rank) = self.all.get_mut(&uid) else { continue };
            if lost.is_empty() {
                rank.misses_since = None;
                continue;
            }
            let most = if around.trouble { KEEP_ALIVE_MS } else { PEERS_ALIVE_MS };
            let since = *rank.misses_since.get_or_insert(now + around.random.between(500, most));
            // One that writes down what it holds needs nobody for it.
            if now >= since && !(rank.stopping && form.purpose() == Purpose::Save) {
                self.leave(&uid, form.generation, lost, around);
            }
        }
    }

    fn all_train(&self, form: &wire::Form) -> bool {
        let trains = |uid: &String| {
            let rank = self.all.get(uid).and_then(Rank::trains);
            rank.is_some_and(|theirs| theirs.generation == form.generation)
        };
        pods(form).all(trains)
    }

    /// Each generation whose members all train makes a step.
    fn train(&mut self, around: &mut Surroundings) {
        let forms: BTreeMap<u64, Rc<wire::Form>> =
            self.all.values().filter_map(|rank| rank.trains().map(|form| (form.generation, form.clone()))).collect();
        self.next_step.retain(|generation, _| forms.contains_key(generation));
        for (generation, form) in forms {
            if !self.all_train(&form) {
                continue;
            }
            let due = *self.next_step.entry(generation).or_insert(around.now + self.step_ms);
            if around.now >= due {
                self.next_step.insert(generation, around.now + self.step_ms);
                self.train_together(&form, around);
            }
        }
    }

    fn train_together(&mut self, form: &Rc<wire::Form>, around: &mut Surroundings) {
        let all: Vec<String> = pods(form).cloned().collect();
        let steps: BTreeSet<u64> = all.iter().map(|uid| self.all[uid].step).collect();
        let Some(step) = steps.first().filter(|_| steps.len() == 1).copied() else {
            return around.watchdog.broken("a step is counted once", format!("members stand at {steps:?}"));
        };
        // A rank that saves has made its last step.
        let saving = all.iter().any(|uid| self.all[uid].saved_at.is_some());
        if step < STEPS && !saving {
            self.make_step(form, &all, step + 1, around);
        }
        let step = self.all[&all[0]].step;
        if all.iter().any(|uid| self.all[uid].stopping) {
            return self.stop_together(form, &all, step, around);
        }
        if step == STEPS {
            self.finish(form, &all, around);
        } else if step.is_multiple_of(CHECKPOINT_EVERY) && self.uploads.is_empty() {
            self.uploads.push((around.now + around.random.between(500, 4_000), form.clone(), step));
        }
    }

    fn make_step(&mut self, form: &wire::Form, all: &[String], step: u64, around: &mut Surroundings) {
        let held = all.iter().filter_map(|uid| self.all[uid].memory).fold(0, |held, memory| held | memory.blocks);
        if held != ALL {
            around.watchdog.broken("a step is counted once", format!("step {step} is made without all blocks"));
        }
        self.made.push(Made { at: around.now, generation: form.generation, step });
        let stopping = all.iter().any(|uid| self.all[uid].stopping);
        let next = if stopping || step == STEPS { Next::Unspecified } else { Next::Step };
        for (place, uid) in all.iter().enumerate() {
            if let Some(rank) = self.all.get_mut(uid) {
                rank.step = step;
                rank.memory = Some(Memory { step, blocks: kept(BLOCKS, place, all.len()), advancing: 0 });
            }
            let progress = wire::Progress {
                generation: form.generation,
                step,
                steps: STEPS,
                step_seconds: self.step_ms as f64 / 1000.0,
                updated: true,
                next: next.into(),
                ..Default::default()
            };
            self.say(uid, Said::Progress(progress), around);
        }
    }

    /// The stop was planned: what has to be saved is, what only leavers hold is handed over.
    fn stop_together(&mut self, form: &wire::Form, all: &[String], step: u64, around: &mut Surroundings) {
        let nobody_stays = all.iter().all(|uid| self.all[uid].leaves);
        let saves = nobody_stays || all.iter().any(|uid| self.all[uid].saves);
        if saves {
            if !self.write_down(form, all, step, around) {
                return;
            }
        } else {
            self.evacuate(all);
        }
        for uid in all {
            self.leave(uid, form.generation, Vec::new(), around);
        }
    }

    /// Whether it is done. It takes a while, and the store has to be there.
    fn write_down(&mut self, form: &wire::Form, all: &[String], step: u64, around: &mut Surroundings) -> bool {
        let now = around.now;
        let saved_at = now + around.random.between(500, 3_000);
        let Some(first) = self.all.get_mut(&all[0]) else { return false };
        let due = *first.saved_at.get_or_insert(saved_at);
        if !around.bucket.is_reached(now) {
            if !std::mem::replace(&mut first.blocked, true) {
                self.say(&all[0], blocked(false), around);
            }
            return false;
        }
        first.blocked = false;
        if now >= due {
            around.bucket.put(form.generation, step, around.watchdog, around.random);
        }
        now >= due
    }

    /// What both keepers take away goes to one who stays.
    fn evacuate(&mut self, all: &[String]) {
        let leaves: Vec<bool> = all.iter().map(|pod| self.all[pod].leaves).collect();
        for (block, to) in heirs(BLOCKS, &leaves) {
            if let Some(memory) = self.all.get_mut(&all[to]).and_then(|rank| rank.memory.as_mut()) {
                memory.blocks |= 1 << block;
            }
        }
    }

    /// Members that came together only for it write down what they hold.
    fn save(&mut self, around: &mut Surroundings) {
        let forms: BTreeMap<u64, Rc<wire::Form>> = self
            .all
            .values()
            .filter(|rank| rank.stopping && rank.acts())
            .filter_map(|rank| match &rank.doing {
                Doing::Ready(form) if form.purpose() == Purpose::Save => Some((form.generation, form.clone())),
                _ => None,
            })
            .collect();
        for form in forms.into_values() {
            let ready = |uid: &String| {
                let rank = self.all.get(uid).filter(|rank| rank.stopping && rank.acts());
                rank.is_some_and(|rank| matches!(&rank.doing, Doing::Ready(it) if it.generation == form.generation))
            };
            let all: Vec<String> = pods(&form).cloned().collect();
            if all.iter().all(ready) && self.write_down(&form, &all, form.base_step, around) {
                for uid in &all {
                    self.leave(uid, form.generation, Vec::new(), around);
                }
            }
        }
    }

    /// Checkpoints behind the training: they are there once every rank has written its blocks.
    fn upload(&mut self, around: &mut Surroundings) {
        let now = around.now;
        let (due, waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut self.uploads)
            .into_iter()
            .filter(|(_, form, _)| self.all_train(form))
            .partition(|(at, ..)| now >= *at && around.bucket.is_reached(now));
        self.uploads = waiting;
        self.say_held_up(around);
        for (_, form, step) in due {
            let manifest = around.bucket.put(form.generation, step, around.watchdog, around.random);
            let checkpointed = wire::Checkpointed {
                generation: form.generation,
                uri: format!("s3://bucket/run/{}", manifest.key),
                manifest: Some(manifest.into()),
                stall_seconds: 0.1,
                upload_seconds: 2.0,
                ..Default::default()
            };
            for uid in pods(&form).take(1) {
                self.say(uid, Said::Checkpointed(checkpointed.clone()), around);
            }
        }
    }

    /// The training goes on meanwhile.
    fn say_held_up(&mut self, around: &mut Surroundings) {
        let (now, reached) = (around.now, around.bucket.is_reached(around.now));
        let Some((_, form, _)) = self.uploads.iter().find(|(at, ..)| now >= *at && !reached) else { return };
        if now >= self.held_up_at + TOLD_EVERY_MS {
            self.held_up_at = now;
            let writers: Vec<String> = pods(form).cloned().collect();
            writers.iter().for_each(|uid| self.say(uid, blocked(true), around));
        }
    }

    /// Nodes of ranks that train, by name.
    pub fn nodes_that_train(&self) -> Vec<String> {
        self.all.values().filter(|rank| rank.trains().is_some()).map(|rank| rank.node.clone()).collect()
    }

    /// The rank on this node does nothing any more, and its stream stays open.
    pub fn hang_on(&mut self, node: &str) {
        self.all.values_mut().filter(|rank| rank.node == node).for_each(|rank| rank.hangs(u64::MAX));
    }

    /// The process of the rank on this node ends by itself.
    pub fn crash_on(&mut self, node: &str, watchdog: &Watchdog) {
        for rank in self.all.values_mut().filter(|rank| rank.node == node) {
            (rank.ending, rank.stream) = (Some(Ending::Crashed), None);
            watchdog.crashed();
        }
    }

    /// When each rank that is connected heard of a notice to the one on this node.
    pub fn heard_of_notice(&self, node: &str) -> Vec<Option<u64>> {
        let noticed = self.all.values().filter(|rank| rank.node == node).map(|rank| rank.name.clone()).next();
        let connected = self.all.values().filter(|rank| rank.stream.is_some());
        connected.map(|rank| rank.noticed.get(noticed.as_ref()?).copied()).collect()
    }

    fn finish(&mut self, form: &wire::Form, all: &[String], around: &mut Surroundings) {
        if !around.bucket.is_reached(around.now) {
            return;
        }
        for uid in all {
            let Some(rank) = self.all.get_mut(uid) else { continue };
            if around.now < rank.finished_said_at + SAY_AGAIN_MS {
                continue;
            }
            rank.finished_said_at = around.now;
            let finished = wire::Finished {
                generation: form.generation,
                step: STEPS,
                uri: "s3://bucket/run/result".to_owned(),
                digest: "d".to_owned(),
                loss: 0.0,
            };
            self.say(uid, Said::Finished(finished), around);
        }
    }
}

fn delay(around: &mut Surroundings) -> u64 {
    match around.random.between(0, 100) {
        0..5 if around.trouble => around.random.between(500, 4_000),
        _ => around.random.between(0, 60),
    }
}

fn manifests(around: &Surroundings) -> Vec<wire::ManifestRef> {
    // A list that cannot be read says nothing.
    if !around.bucket.is_reached(around.now) {
        return Vec::new();
    }
    around.bucket.newest_first().into_iter().map(Into::into).collect()
}

fn blocked(behind: bool) -> Said {
    let message = "the store does not answer".to_owned();
    Said::Blocked(wire::Blocked { cause: wire::Cause::Store.into(), message, behind })
}

fn hello(uid: &str, rank: &Rank) -> wire::Hello {
    let generation = rank.form().map_or(rank.left, |form| form.generation);
    wire::Hello {
        pod_name: rank.name.clone(),
        pod_uid: uid.to_owned(),
        node: rank.node.clone(),
        peer_address: "10.0.0.1:7600".to_owned(),
        generation,
        step: if generation > 0 { rank.step } else { 0 },
        ..Default::default()
    }
}
