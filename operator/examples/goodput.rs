//! Goodput on a public spot trace, simulated: the operator's own membership, event by event in virtual time, beside the same
//! run when it is stopped at each change and restarted from its newest checkpoint. How long things take are arguments. Their
//! defaults: copies, detection and a step's computation as measured with SmolLM2-135M on two cores, a restart a little shorter
//! than torchrun's there (`tests/bench/recovery.sh`); boot, save and upload are assumed.
//!
//! Real: the membership's decisions and waits, and the trace. Simulated: nodes, ranks, network and store.

use anyhow::{Context, Result, bail};
use clap::Parser;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::path::{Path, PathBuf};
use vicuna_operator::coordinator::membership::{
    Departure, Effect, Event, Formation, Limits, Membership, Millis, PodFact, Target,
};
use vicuna_operator::coordinator::report::{Counters, Happening};
use vicuna_protocol::coordinator as wire;
use vicuna_protocol::coordinator::coordinator_message::Body;
use vicuna_protocol::coordinator::form::Purpose;
use vicuna_protocol::coordinator::rank_message::Body as Said;

/// Micro-batches of a step, and blocks of the state.
const MICRO_BATCHES: u32 = 32;
const BLOCKS: usize = 64;
const TICK_MS: Millis = 500;
const SAVE_EVERY_MS: Millis = 60_000;

#[derive(Parser, Clone)]
struct Options {
    /// Lines `MS,add|remove,NODE`.
    trace: PathBuf,
    /// Ranks that the training needs.
    #[arg(long, default_value_t = 2)]
    min: usize,
    /// How long before it goes a node is announced to go.
    #[arg(long, default_value_t = 0.0)]
    notice_seconds: f64,
    /// A step's computation, were it all on one rank.
    #[arg(long, default_value_t = 144.0)]
    step_seconds: f64,
    /// What a step takes beside that, however many ranks there are.
    #[arg(long, default_value_t = 0.3)]
    exchange_seconds: f64,
    /// From a node's arrival until its rank is ready to join.
    #[arg(long, default_value_t = 15.0)]
    boot_seconds: f64,
    /// To copy the whole state to one newcomer, which gets its share of it.
    #[arg(long, default_value_t = 6.6)]
    move_seconds: f64,
    /// Until peers find out that one is gone without notice.
    #[arg(long, default_value_t = 4.5)]
    detect_seconds: f64,
    /// How long a checkpoint is on its way to the store, behind the training, once a minute.
    #[arg(long, default_value_t = 10.0)]
    upload_seconds: f64,
    /// How long a checkpoint of the stop-and-restart run holds it up.
    #[arg(long, default_value_t = 2.0)]
    save_seconds: f64,
    /// From a change to the first step's beginning when everything is restarted from a checkpoint.
    #[arg(long, default_value_t = 12.0)]
    restart_seconds: f64,
}

impl Options {
    fn step_ms(&self, world: usize) -> Millis {
        // The rank with most micro-batches is waited for.
        let share = f64::from(MICRO_BATCHES.div_ceil(world.max(1) as u32)) / f64::from(MICRO_BATCHES);
        ms(self.step_seconds * share + self.exchange_seconds)
    }
}

fn ms(seconds: f64) -> Millis {
    (seconds * 1000.0).round() as Millis
}

/// What becomes of nodes, in order.
struct Change {
    at: Millis,
    node: String,
    comes: bool,
}

fn read(path: &Path) -> Result<Vec<Change>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("no trace {}", path.display()))?;
    let change = |line: &str| {
        let mut fields = line.split(',').map(str::trim);
        let (at, what, node) = (fields.next()?, fields.next()?, fields.next()?);
        Some(Change { at: at.parse().ok()?, node: node.to_owned(), comes: what == "add" })
    };
    let changes: Vec<Change> = text.lines().filter_map(change).collect();
    if changes.is_empty() {
        bail!("{} has no lines MS,add|remove,NODE", path.display());
    }
    Ok(changes)
}

/// One way of running, in numbers.
#[derive(Default)]
struct Outcome {
    /// Steps that count.
    steps: u64,
    lost_steps: u64,
    /// Spent in steps that count.
    advancing_ms: Millis,
    /// From the first step on, with at least `min` nodes.
    possible_ms: Millis,
    /// Generations that train, or starts.
    rounds: u64,
    /// Generations that only hand over or save.
    without_a_step: u64,
}

impl Outcome {
    fn goodput(&self) -> f64 {
        self.advancing_ms as f64 / self.possible_ms.max(1) as f64
    }

    fn print(&self, name: &str, ideal_steps: f64) {
        println!(
            "{name}: goodput {:.1} %, {} steps ({:.1} % of the ideal), {} lost, {} times formed, {} only to hand over or save",
            100.0 * self.goodput(),
            self.steps,
            100.0 * self.steps as f64 / ideal_steps,
            self.lost_steps,
            self.rounds,
            self.without_a_step
        );
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Comes(String),
    Announced(String),
    Goes(String),
    Boots(String),
    /// Its peers have lost it.
    Missed(String),
    Loaded(String, u64),
    StepEnds(u64),
    /// What was on its way to the store is there.
    Durable(u64, u64),
    Tick,
}

#[derive(Clone, Default)]
struct Rank {
    generation: u64,
    loading: bool,
    trains: bool,
    stopping: bool,
    leaves: bool,
    saves: bool,
    step: u64,
    blocks: BTreeSet<usize>,
    /// What it has once it is ready.
    coming: BTreeSet<usize>,
}

/// The membership and its simulated ranks.
struct Elastic<'a> {
    options: &'a Options,
    now: Millis,
    due: BinaryHeap<Reverse<(Millis, u64, Due)>>,
    order: u64,
    membership: Membership,
    /// Events that wait while another one is carried out.
    waiting: VecDeque<Event>,
    busy: bool,
    /// Steps in the store, newest last, and when the last one was started for it.
    manifests: Vec<wire::ManifestRef>,
    saved_at: Millis,
    facts: BTreeMap<String, PodFact>,
    ranks: BTreeMap<String, Rank>,
    formation: Option<Formation>,
    /// The generation that lost a member: nothing moves in it any more.
    broken: u64,
    /// When the step under way began, and how long each one took that may still be lost.
    step_began: Option<Millis>,
    durations: BTreeMap<u64, Millis>,
    step: u64,
    outcome: Outcome,
}

impl<'a> Elastic<'a> {
    fn run(options: &'a Options, changes: &[Change]) -> Outcome {
        let start = 1;
        let membership = Membership::new(start, Limits::default(), None, Counters::default());
        let mut run = Self {
            options,
            now: start,
            due: BinaryHeap::new(),
            order: 0,
            membership,
            waiting: VecDeque::new(),
            busy: false,
            manifests: Vec::new(),
            saved_at: start,
            facts: BTreeMap::new(),
            ranks: BTreeMap::new(),
            formation: None,
            broken: 0,
            step_began: None,
            durations: BTreeMap::new(),
            step: 0,
            outcome: Outcome::default(),
        };
        run.feed(Event::Pods(BTreeMap::new()));
        run.feed(Event::Target(Target {
            min: options.min,
            max: MICRO_BATCHES as usize,
            suspend: false,
            any_class: false,
        }));
        let end = changes.last().map_or(0, |change| change.at) + start;
        for change in changes {
            let (at, node) = (change.at + start, change.node.clone());
            if change.comes {
                run.plan(at, Due::Comes(node));
                continue;
            }
            if options.notice_seconds > 0.0 {
                run.plan(at.saturating_sub(ms(options.notice_seconds)).max(start), Due::Announced(node.clone()));
            }
            run.plan(at, Due::Goes(node));
        }
        run.plan(start + TICK_MS, Due::Tick);
        while let Some(Reverse((at, _, due))) = run.due.pop().filter(|Reverse((at, ..))| *at <= end) {
            let possible = !run.durations.is_empty() && run.there() >= options.min;
            run.outcome.possible_ms += if possible { at - run.now } else { 0 };
            run.now = at;
            run.happens(due);
        }
        run.outcome.advancing_ms = run.durations.values().sum();
        run.outcome.steps = run.step;
        run.outcome
    }

    fn there(&self) -> usize {
        self.ranks.len()
    }

    fn plan(&mut self, at: Millis, due: Due) {
        self.order += 1;
        self.due.push(Reverse((at, self.order, due)));
    }

    fn feed(&mut self, event: Event) {
        self.waiting.push_back(event);
        if std::mem::replace(&mut self.busy, true) {
            return;
        }
        while let Some(event) = self.waiting.pop_front() {
            for effect in self.membership.step(self.now, event) {
                match effect {
                    Effect::WriteRecord(_) => self.waiting.push_front(Event::RecordWritten),
                    Effect::Welcome(_) => {}
                    Effect::Send(pod, body) => self.hears(&pod, body),
                    Effect::Form(formation) => self.forms(formation),
                    Effect::Happened(happening) => self.account(&happening),
                }
            }
        }
        self.busy = false;
    }

    fn account(&mut self, happening: &Happening) {
        match happening {
            Happening::StepsLost { steps, base_step } => {
                self.outcome.lost_steps += steps;
                self.step = *base_step;
                self.durations.split_off(&(base_step + 1));
            }
            Happening::Formed { purpose: Purpose::Train, .. } => self.outcome.rounds += 1,
            Happening::Formed { .. } => self.outcome.without_a_step += 1,
            _ => {}
        }
    }

    fn happens(&mut self, due: Due) {
        match due {
            Due::Tick => {
                self.plan(self.now + TICK_MS, Due::Tick);
                self.feed(Event::Pods(self.facts.clone()));
                self.feed(Event::Tick);
            }
            Due::Comes(node) => self.plan(self.now + ms(self.options.boot_seconds), Due::Boots(node)),
            Due::Boots(node) => self.boots(node),
            Due::Announced(node) => self.announced(&node),
            Due::Goes(node) => self.goes(&node),
            Due::Missed(node) => self.missed(&node),
            Due::Loaded(node, generation) => self.loaded(&node, generation),
            Due::StepEnds(generation) => self.step_ends(generation),
            Due::Durable(generation, step) => self.durable(generation, step),
        }
    }

    fn boots(&mut self, node: String) {
        self.ranks.insert(node.clone(), Rank::default());
        self.facts.insert(node.clone(), PodFact::default());
        self.feed(Event::Pods(self.facts.clone()));
        let hello =
            wire::Hello { pod_name: node.clone(), pod_uid: node.clone(), node: node.clone(), ..Default::default() };
        self.feed(Event::Joined(hello));
        let prepared = wire::Prepared {
            micro_batches: MICRO_BATCHES,
            steps: u64::MAX,
            blocks: BLOCKS as u32,
            manifests: self.newest(),
            ..Default::default()
        };
        self.feed(Event::Said(node, Said::Prepared(prepared)));
    }

    fn announced(&mut self, node: &str) {
        let deadline_ms = self.now + ms(self.options.notice_seconds);
        if let Some(fact) = self.facts.get_mut(node) {
            let source = "trace".to_owned();
            fact.departure = Some(Departure { source, deadline_ms, hurry: true, reclaim: true });
            self.feed(Event::Pods(self.facts.clone()));
        }
    }

    /// The machine is off. If its rank had been let go before, nobody misses it.
    fn goes(&mut self, node: &str) {
        // Gone before it was ready to join.
        let booting = Due::Boots(node.to_owned());
        self.due.retain(|Reverse((.., due))| *due != booting);
        let Some(rank) = self.ranks.remove(node) else { return };
        if rank.trains || rank.loading {
            self.broken = rank.generation;
            self.step_began = None;
            self.plan(self.now + ms(self.options.detect_seconds), Due::Missed(node.to_owned()));
        } else {
            self.forgotten(node);
        }
    }

    fn forgotten(&mut self, node: &str) {
        self.facts.remove(node);
        self.feed(Event::Disconnected(node.to_owned()));
        self.feed(Event::Pods(self.facts.clone()));
    }

    /// Peers end the generation and say who is lost; its stream breaks about then. Its pod is thought to run.
    fn missed(&mut self, node: &str) {
        let generation = self.formation.as_ref().map_or(0, |formation| formation.record.generation);
        self.feed(Event::Disconnected(node.to_owned()));
        for pod in self.members() {
            // The first one's word may already have led to the next generation.
            if self.is_in(&pod, generation) {
                self.leaves(&pod, vec![node.to_owned()]);
            }
        }
        self.facts.remove(node);
        self.feed(Event::Pods(self.facts.clone()));
    }

    fn members(&self) -> Vec<String> {
        let members = self.formation.iter().flat_map(|formation| &formation.record.members);
        members.map(|member| member.pod_uid.clone()).collect()
    }

    fn is_in(&self, pod: &str, generation: u64) -> bool {
        self.ranks.get(pod).is_some_and(|rank| rank.generation == generation && (rank.trains || rank.loading))
    }

    fn hears(&mut self, pod: &str, body: Body) {
        match body {
            Body::Go(go) if self.is_in(pod, go.generation) => {
                if let Some(rank) = self.ranks.get_mut(pod) {
                    (rank.loading, rank.trains) = (false, true);
                    rank.blocks = rank.coming.clone();
                }
                self.begin_step();
            }
            Body::Stop(stop) => {
                let Some(rank) = self.ranks.get_mut(pod) else { return };
                (rank.leaves, rank.saves) = (stop.leaves, stop.checkpoint);
                let saves = |formation: &Formation| formation.record.purpose == Purpose::Save;
                let writes = rank.loading && self.formation.as_ref().is_some_and(saves);
                if stop.planned && (rank.trains || writes) && rank.generation == stop.generation {
                    rank.stopping = true;
                    rank.saves |= writes;
                    self.save_without_a_step(stop.generation);
                } else {
                    self.leaves(pod, Vec::new());
                }
            }
            Body::Shutdown(_) => {
                self.ranks.remove(pod);
                self.facts.remove(pod);
            }
            Body::Stale(_) => {
                if let Some(rank) = self.ranks.get_mut(pod) {
                    *rank = Rank::default();
                }
            }
            _ => {}
        }
    }

    fn leaves(&mut self, pod: &str, lost: Vec<String>) {
        self.step_began = None;
        let Some(rank) = self.ranks.get_mut(pod) else { return };
        (rank.trains, rank.loading, rank.stopping) = (false, false, false);
        let mut bits = vec![0u8; BLOCKS.div_ceil(8)];
        rank.blocks.iter().for_each(|block| bits[block / 8] |= 1 << (block % 8));
        let (step, generation) = (rank.step, rank.generation);
        let holding =
            wire::Holding { step, updates: step, blocks: bits, weights: true, updated: true, ..Default::default() };
        let holding = (!rank.blocks.is_empty()).then_some(holding);
        let stopped = wire::Stopped { generation, step, holding, lost, manifests: self.newest() };
        self.feed(Event::Said(pod.to_owned(), Said::Stopped(stopped)));
    }

    /// What a rank lacks is copied to it: what it is to keep, or what only leavers hold.
    fn forms(&mut self, formation: Formation) {
        let (generation, base_step) = (formation.record.generation, formation.record.base_step);
        let members: Vec<String> = formation.record.members.iter().map(|member| member.pod_uid.clone()).collect();
        let world = members.len();
        let (purpose, in_memory) = (formation.record.purpose, formation.record.in_memory);
        let rescued = if purpose == Purpose::Train { BTreeMap::new() } else { self.rescued(&formation) };
        self.formation = Some(formation);
        self.step_began = None;
        for (place, pod) in members.iter().enumerate() {
            let Some(rank) = self.ranks.get_mut(pod) else { continue };
            let kept = (0..BLOCKS).filter(|block| keeps(place, *block, world) && purpose != Purpose::HandOver);
            let wanted: BTreeSet<usize> = kept.chain(rescued.get(pod).into_iter().flatten().copied()).collect();
            let missing = wanted.difference(&rank.blocks).count();
            // Weights to compute with are a third of the state, and on every rank.
            let computes = rank.blocks.is_empty() && purpose == Purpose::Train;
            let share = if computes { 1.0 / 3.0 } else { 0.0 } + missing as f64 / BLOCKS as f64;
            let share = if base_step == 0 { 0.0 } else { share };
            let blocks = if in_memory { std::mem::take(&mut rank.blocks) } else { BTreeSet::new() };
            let coming = if purpose == Purpose::Train { wanted } else { blocks.union(&wanted).copied().collect() };
            *rank = Rank { generation, loading: true, step: base_step, blocks, coming, ..Rank::default() };
            let at = self.now + ms(0.1 + share * self.options.move_seconds);
            self.plan(at, Due::Loaded(pod.clone(), generation));
        }
    }

    /// Which blocks that only leavers hold go to whom.
    fn rescued(&self, formation: &Formation) -> BTreeMap<String, Vec<usize>> {
        let members = formation.record.members.iter().map(|member| &member.pod_uid);
        let staying: Vec<&String> = members.filter(|pod| !formation.leavers.contains(*pod)).collect();
        let has = |pod: &String, block: usize| self.ranks.get(pod).is_some_and(|rank| rank.blocks.contains(&block));
        let mut rescued: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for block in (0..BLOCKS).filter(|block| !staying.is_empty() && !staying.iter().any(|pod| has(pod, *block))) {
            rescued.entry(staying[block % staying.len()].clone()).or_default().push(block);
        }
        rescued
    }

    fn loaded(&mut self, pod: &str, generation: u64) {
        if self.is_in(pod, generation) && self.broken != generation {
            if let Some(rank) = self.ranks.get_mut(pod) {
                rank.blocks = rank.blocks.union(&rank.coming).copied().collect();
            }
            let state_digest = "same".to_owned();
            self.feed(Event::Said(pod.to_owned(), Said::Ready(wire::Ready { generation, state_digest })));
        }
    }

    /// The members came together only to write down what they hold.
    fn save_without_a_step(&mut self, generation: u64) {
        let waits = |rank: &Rank| rank.loading && rank.stopping && rank.saves;
        if self.members().iter().all(|pod| self.ranks.get(pod).is_some_and(waits)) {
            let step = self.step;
            self.plan(self.now + ms(self.options.upload_seconds), Due::Durable(generation, step));
        }
    }

    fn begin_step(&mut self) {
        let members = self.members();
        let Some(formation) = &self.formation else { return };
        let generation = formation.record.generation;
        let all = members
            .iter()
            .all(|pod| self.ranks.get(pod).is_some_and(|rank| rank.trains && rank.generation == generation));
        if all && self.step_began.is_none() {
            self.step_began = Some(self.now);
            self.plan(self.now + self.options.step_ms(members.len()), Due::StepEnds(generation));
        }
    }

    fn step_ends(&mut self, generation: u64) {
        let members = self.members();
        let step_ms = self.options.step_ms(members.len());
        let under_way = self.step_began.is_some_and(|began| began + step_ms == self.now);
        if !under_way || !members.iter().all(|pod| self.is_in(pod, generation)) {
            return;
        }
        self.step_began = None;
        self.step += 1;
        self.durations.insert(self.step, step_ms);
        for pod in &members {
            if let Some(rank) = self.ranks.get_mut(pod) {
                rank.step = self.step;
            }
        }
        let step = self.step;
        for pod in &members {
            let step_seconds = step_ms as f64 / 1000.0;
            let progress = wire::Progress { generation, step, steps: u64::MAX, step_seconds, ..Default::default() };
            self.feed(Event::Said(pod.clone(), Said::Progress(progress)));
        }
        let any = |wants: fn(&Rank) -> bool| members.iter().filter_map(|pod| self.ranks.get(pod)).any(wants);
        if any(|rank| rank.stopping && rank.saves) {
            return self.plan(self.now + ms(self.options.upload_seconds), Due::Durable(generation, step));
        }
        if any(|rank| rank.stopping) {
            return self.part(&members);
        }
        if self.now - self.saved_at >= SAVE_EVERY_MS {
            self.saved_at = self.now;
            self.plan(self.now + ms(self.options.upload_seconds), Due::Durable(generation, step));
        }
        self.begin_step();
    }

    fn part(&mut self, members: &[String]) {
        self.evacuate(members);
        members.iter().for_each(|pod| self.leaves(pod, Vec::new()));
    }

    fn newest(&self) -> Vec<wire::ManifestRef> {
        self.manifests.iter().rev().take(3).cloned().collect()
    }

    /// Nothing comes of an upload whose generation has ended.
    fn durable(&mut self, generation: u64, step: u64) {
        let members = self.members();
        if !members.iter().all(|pod| self.is_in(pod, generation)) {
            return;
        }
        let key = format!("{generation}-{step}");
        let manifest = wire::ManifestRef { step, generation, key, digest: "d".to_owned(), ..Default::default() };
        self.manifests.push(manifest.clone());
        let checkpointed = wire::Checkpointed { generation, manifest: Some(manifest), ..Default::default() };
        self.feed(Event::Said(members[0].clone(), Said::Checkpointed(checkpointed)));
        if members.iter().filter_map(|pod| self.ranks.get(pod)).any(|rank| rank.stopping && rank.saves) {
            self.part(&members);
        }
    }

    /// What only leavers have goes to those who stay.
    fn evacuate(&mut self, members: &[String]) {
        let stays = |run: &Self, pod: &String| run.ranks.get(pod).is_some_and(|rank| !rank.leaves);
        for block in 0..BLOCKS {
            let has = |run: &Self, pod: &String| run.ranks.get(pod).is_some_and(|rank| rank.blocks.contains(&block));
            if members.iter().any(|pod| has(self, pod) && stays(self, pod)) {
                continue;
            }
            if let Some(to) = members.iter().find(|pod| stays(self, pod))
                && let Some(rank) = self.ranks.get_mut(to)
            {
                rank.blocks.insert(block);
            }
        }
    }
}

/// Owner and twin, in turn.
fn keeps(place: usize, block: usize, world: usize) -> bool {
    block % world == place || (block + 1) % world == place
}

/// Stopped at each change and restarted from the newest checkpoint; changes while it starts are taken along. Where a change is
/// known in time, which an arrival always is, it writes a checkpoint first.
fn restarted(options: &Options, changes: &[Change], interval_ms: Millis) -> Outcome {
    let mut outcome = Outcome::default();
    let end = changes.last().map_or(0, |change| change.at);
    let timeline = timeline(options, changes);
    let (mut next, mut now, mut present, mut saved) = (0, 0, 0i64, 0);
    let mut durations: Vec<Millis> = Vec::new();
    while now < end {
        while let Some((_, by)) = timeline.get(next).filter(|change| change.0 <= now) {
            present += by;
            next += 1;
        }
        let world = usize::try_from(present).unwrap_or(0).min(MICRO_BATCHES as usize);
        let (change_at, by) = timeline.get(next).copied().filter(|change| change.0 < end).unwrap_or((end, 0));
        if world < options.min {
            now = change_at;
            continue;
        }
        let (began, had, step_ms) = (now, durations.len(), options.step_ms(world));
        outcome.rounds += 1;
        now += ms(options.restart_seconds);
        let mut saved_at = now;
        while now + step_ms <= change_at {
            now += step_ms;
            durations.push(step_ms);
            if now - saved_at >= interval_ms {
                now += ms(options.save_seconds);
                (saved, saved_at) = (durations.len(), now);
            }
        }
        now = now.max(change_at);
        let known = by > 0 || options.notice_seconds >= options.save_seconds;
        if by != 0 && known && durations.len() > had {
            now += ms(options.save_seconds);
            saved = durations.len();
        } else if by < 0 {
            now += ms(options.detect_seconds);
            outcome.lost_steps += (durations.len() - saved) as u64;
            durations.truncate(saved);
        }
        outcome.possible_ms += if had > 0 { now - began } else { 0 };
    }
    outcome.steps = durations.len() as u64;
    outcome.advancing_ms = durations.iter().sum();
    outcome
}

/// When a node begins to count, having booted, and when it goes; one that goes before that never counts.
fn timeline(options: &Options, changes: &[Change]) -> Vec<(Millis, i64)> {
    let mut booting: BTreeMap<&str, Millis> = BTreeMap::new();
    let mut timeline = Vec::new();
    for change in changes {
        if change.comes {
            booting.insert(&change.node, change.at + ms(options.boot_seconds));
        } else if let Some(booted) = booting.remove(change.node.as_str()).filter(|booted| *booted < change.at) {
            timeline.extend([(booted, 1), (change.at, -1)]);
        }
    }
    timeline.extend(booting.into_values().map(|booted| (booted, 1)));
    timeline.sort_unstable();
    timeline
}

/// Steps that all nodes could make that are there, if changes cost nothing.
fn ideal(options: &Options, changes: &[Change]) -> f64 {
    let mut there = 0usize;
    let mut steps = 0.0;
    for pair in changes.windows(2) {
        there = if pair[0].comes { there + 1 } else { there.saturating_sub(1) };
        let world = there.min(MICRO_BATCHES as usize);
        if world >= options.min {
            steps += (pair[1].at - pair[0].at) as f64 / options.step_ms(world) as f64;
        }
    }
    steps
}

fn main() -> Result<()> {
    let options = Options::parse();
    let changes = read(&options.trace)?;
    let hours = changes.last().map_or(0, |change| change.at) as f64 / 3.6e6;
    let going = changes.iter().filter(|change| !change.comes).count();
    println!(
        "{}: {hours:.1} h, {} arrivals, {going} departures, notice {} s",
        options.trace.file_name().unwrap_or_default().display(),
        changes.len() - going,
        options.notice_seconds
    );
    let ideal = ideal(&options, &changes);
    let ours = Elastic::run(&options, &changes);
    ours.print("ours", ideal);
    // The interval that suits it best of these.
    let intervals = [15, 30, 60, 120, 300, 600].map(|seconds| (seconds, restarted(&options, &changes, seconds * 1000)));
    let best = intervals.iter().max_by_key(|(_, outcome)| outcome.advancing_ms).context("there are intervals")?;
    best.1.print(&format!("stop and restart, a checkpoint every {} s", best.0), ideal);
    Ok(())
}
