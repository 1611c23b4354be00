//! What follows from what is known: one function for each state of design.md's table.

use super::base::HeldState;
use super::notice::time_left;
use super::pace::MAX_DOUBLINGS;
use super::rank::Rank;
use super::{Body, Effect, Formation, Happening, Membership, Millis, Move, PodUid, Purpose, Stages, State};
use crate::coordinator::manifest::{Base, extend_history};
use crate::coordinator::record::{Member, Record};
use std::collections::{BTreeMap, BTreeSet};
use vicuna_protocol::coordinator as wire;
use wire::shutdown::Why;

/// Transitions that one event can set off: Adopting → Collecting → Held → Planning is the longest way.
const MAX_TRANSITIONS: usize = 8;

impl Membership {
    pub(super) fn advance(&mut self, now: Millis) {
        if self.target.is_none() || self.pods.is_none() {
            return;
        }
        for _ in 0..MAX_TRANSITIONS {
            let moved = match self.state.clone() {
                State::Adopting { since, answered } => self.adopting(now, since, &answered),
                State::Held { not_before, enough_since, eager } => self.held(now, not_before, enough_since, eager),
                State::Moving(moving) => self.moving(now, &moving),
                State::Steady { since, progressed } => self.steady(now, since, progressed),
                State::Collecting { planned, limit, answered, .. } => self.collecting(now, planned, limit, &answered),
                State::Stopped => self.suspended(now),
                State::Finished(_) => self.complete(),
                State::Planning(_) | State::Finishing(_) => false,
            };
            if !moved {
                return;
            }
        }
    }

    /// A new leader goes on with the generation only when every member still is in it. As long as hellos come it waits for
    /// more: where many trainings call at once they take their time.
    fn adopting(&mut self, now: Millis, since: Millis, answered: &BTreeSet<PodUid>) -> bool {
        let members = self.members().to_vec();
        let here = |member: &&Member| answered.contains(&member.pod_uid);
        let gone = members.iter().filter(|member| self.is_gone(&member.pod_uid)).count();
        // Who has not called yet may hold what nobody else does: without any of them nothing is decided before its time.
        if gone > 0 && (self.newest_hello > 0 || gone == members.len()) {
            self.interrupt(now);
            self.collect(now, false, "a rank went while there was no leader".to_owned(), 0);
            return true;
        }
        if members.iter().filter(here).count() == members.len() {
            return self.go_on(now);
        }
        let limit = match self.newest_hello {
            0 => since + self.limits.first_hello_ms,
            newest => match self.last_step_due(self.earliest_deadline(&members), &self.candidates()) {
                0 => newest + self.limits.adopt_ms,
                due => due.min(newest + self.limits.adopt_ms),
            },
        };
        if now >= limit {
            let reason = "a new leader does not hear from every rank".to_owned();
            self.collect(now, false, reason, 0);
        }
        now >= limit
    }

    /// Members of a generation that trains were told to, or are now. Those of another say again when they have done their
    /// part.
    fn go_on(&mut self, now: Millis) -> bool {
        let Some(record) = self.record.clone().filter(|record| record.purpose != Purpose::Train) else {
            return self.go(now);
        };
        self.state = State::Moving(self.move_of(now, &record, BTreeSet::new()));
        true
    }

    /// Waits for enough ranks.
    fn held(&mut self, now: Millis, not_before: Millis, enough_since: Option<Millis>, eager: bool) -> bool {
        let suspend = self.is_suspended();
        let candidates = self.candidates();
        if suspend || candidates.len() < self.fewest() {
            let since = enough_since.unwrap_or(now);
            let to_be_saved = self.is_to_be_saved(now, &candidates);
            let enough_since = to_be_saved.then_some(since);
            self.state = State::Held { not_before, enough_since, eager: eager && suspend };
            if to_be_saved {
                // Who is about to go is not kept waiting for long by failures of before.
                let pause_ms = if suspend { Millis::MAX } else { self.limits.settle_ms };
                let due = now >= not_before.min(since.saturating_add(pause_ms));
                if due {
                    // Not again at once if nothing comes of it.
                    self.fruitless += 1;
                    self.plan(now, candidates, true);
                }
                return due;
            }
            if suspend && !self.awaits_memory(now, &candidates) {
                self.interrupted = false;
                self.state = State::Stopped;
                return true;
            }
            return false;
        }
        let since = enough_since.unwrap_or(now);
        let settled = eager || candidates.len() >= self.max() || self.is_settled(now, since);
        if now < self.due(now, not_before, since, &candidates) || !settled || self.awaits_memory(now, &candidates) {
            self.state = State::Held { not_before, enough_since: Some(since), eager };
            return false;
        }
        self.plan(now, candidates, false);
        true
    }

    fn is_suspended(&self) -> bool {
        self.target.is_some_and(|target| target.suspend)
    }

    /// The newest generation; a record that somebody deleted had issued every one that left a checkpoint.
    pub(super) fn issued(&self) -> u64 {
        self.record.as_ref().map_or_else(|| self.manifests.generation(), |record| record.generation)
    }

    /// Ranks hold what the store does not have, and some of them are about to go; those who stay are too few.
    fn is_to_be_saved(&self, now: Millis, candidates: &[PodUid]) -> bool {
        let Some(held) = self.held_state(now, candidates) else { return false };
        let stored = self.newest_manifest().map_or(0, |manifest| manifest.step);
        let goes = |pod: &PodUid, rank: &Rank| {
            let here = rank.connected && !self.is_gone(pod) && !self.is_late(now, pod);
            rank.holding.is_some() && here && self.is_about_to_go(pod)
        };
        held.step > stored && (self.is_suspended() || self.ranks.iter().any(|(pod, rank)| goes(pod, rank)))
    }

    /// When the next generation may form: failures of before do not keep those waiting for long who are about to go with what
    /// only they hold.
    fn due(&self, now: Millis, not_before: Millis, since: Millis, candidates: &[PodUid]) -> Millis {
        let soon = not_before.min(since.saturating_add(self.limits.settle_ms));
        let hurried = |held: HeldState| held.members.iter().any(|pod| self.leaves_in_a_hurry(pod));
        if now >= not_before || now < soon || !self.held_state(now, candidates).is_some_and(hurried) {
            return not_before;
        }
        soon
    }

    /// A rank that only lost its stream is about to be back with what the others do not have.
    fn awaits_memory(&self, now: Millis, candidates: &[PodUid]) -> bool {
        let away = |since: Millis| now < since.saturating_add(self.limits.adopt_ms);
        let mut ranks = self.ranks.iter().filter(|(pod, rank)| rank.holding.is_some() && !self.is_gone(pod));
        ranks.any(|(_, rank)| rank.away_since.is_some_and(away)) && self.held_state(now, candidates).is_none()
    }

    /// Whether waiting longer for more ranks is of no use.
    fn is_settled(&self, now: Millis, since: Millis) -> bool {
        let newest = self.ranks.values().map(|rank| rank.prepared_at).max().unwrap_or(0);
        let quiet = now >= newest.max(since).saturating_add(self.limits.settle_ms);
        let joining = self
            .ranks
            .iter()
            .any(|(pod, rank)| rank.is_joining() && !self.is_gone(pod) && !self.leaves_in_a_hurry(pod));
        quiet && (!joining || now >= since.saturating_add(self.limits.joining_ms))
    }

    /// Ranks that the next generation may have, at most `max`: members first, so that the work stays
    /// where it is; those that are to leave some time last.
    pub(super) fn candidates(&self) -> Vec<PodUid> {
        let former: BTreeMap<&str, usize> = self
            .record
            .iter()
            .flat_map(|record| &record.members)
            .enumerate()
            .map(|(rank, member)| (member.pod_uid.as_str(), rank))
            .collect();
        let class = self.numerics_class();
        let mut fit: Vec<_> = self
            .ranks
            .iter()
            .filter(|(pod, rank)| rank.is_fit() && !self.is_gone(pod) && !self.leaves_in_a_hurry(pod))
            .filter(|(_, rank)| self.takes_any_class() || rank.numerics_class == class)
            .map(|(pod, rank)| {
                let place = former.get(pod.as_str()).copied().unwrap_or(usize::MAX);
                (self.departure(pod).is_some(), place, rank.order, pod)
            })
            .collect();
        fit.sort_unstable();
        fit.into_iter().take(self.max()).map(|(.., pod)| pod.clone()).collect()
    }

    /// Plan: chooses the base and has the record swapped. No rank hears of it before that is done.
    fn plan(&mut self, now: Millis, candidates: Vec<PodUid>, saves: bool) {
        let generation = self.issued();
        let history = self.record.as_ref().map_or(&[][..], |record| &record.history);
        let manifest = self.newest_manifest().cloned();
        let stored_step = manifest.as_ref().map_or(0, |manifest| manifest.step);
        let held = self.held_state(now, &candidates).filter(|held| held.step >= stored_step);
        let (base_step, base, members, memory) = match held {
            Some(HeldState { step, members, memory }) => (step, None, members, Some(memory)),
            None => (stored_step, manifest, candidates.clone(), None),
        };
        let leavers: BTreeSet<PodUid> = members.iter().filter(|pod| !candidates.contains(pod)).cloned().collect();
        let purpose = match (saves, leavers.is_empty()) {
            (true, _) => Purpose::Save,
            (false, true) => Purpose::Train,
            (false, false) => Purpose::HandOver,
        };
        self.committed = memory.as_ref().map(|memory| wire::Holding {
            step: base_step,
            updates: memory.updates,
            norm: memory.norm,
            updated: memory.updated,
            ..Default::default()
        });
        let mut history = history.to_vec();
        extend_history(&mut history, Base { generation: generation + 1, step: base_step });
        let lost = self.step.saturating_sub(base_step);
        if lost > 0 {
            self.counters.lost_steps += lost;
            self.happened(Happening::StepsLost { steps: lost, base_step });
        }
        self.step = base_step;
        let record = Record {
            generation: generation + 1,
            members: members.iter().filter_map(|pod| self.member(pod)).collect(),
            base_step,
            purpose,
            base,
            in_memory: memory.is_some(),
            numerics_class: self.numerics_class().to_owned(),
            history,
            finish: None,
        };
        let newcomers = memory.is_none() || members.iter().any(|pod| !self.is_proven(pod));
        let alike = self.reproducibility.is_exact() && newcomers && record.members.len() > 1;
        let canary = purpose == Purpose::Train && alike;
        self.effects.push(Effect::WriteRecord(record.clone()));
        let between_interruptions_ms = self.between_interruptions_ms(now);
        let formation = Formation { record, memory, canary, leavers, between_interruptions_ms };
        self.state = State::Planning(formation);
    }

    fn is_proven(&self, pod: &str) -> bool {
        self.ranks.get(pod).is_some_and(|rank| rank.proven)
    }

    fn member(&self, pod: &str) -> Option<Member> {
        self.ranks.get(pod).map(|rank| Member {
            pod_uid: pod.to_owned(),
            pod_name: rank.pod_name.clone(),
            node: rank.node.clone(),
            address: rank.address.clone(),
        })
    }

    /// The record is in place: tells its members.
    pub(super) fn move_to(&mut self, now: Millis, formation: Formation) {
        let record = &formation.record;
        for (pod, rank) in &mut self.ranks {
            rank.step = None;
            rank.held_up = None;
            rank.reported_lost = false;
            // Who leaves and was not needed still holds the same until it goes, should the others be lost at once.
            if !record.in_memory || record.members.iter().any(|member| member.pod_uid == *pod) {
                rank.holding = None;
            }
        }
        self.lost_unheard.clear();
        if self.interrupted {
            self.recovery.agreed = Some(now);
        }
        self.happened(Happening::Formed {
            generation: record.generation,
            members: record.members.len(),
            base_step: record.base_step,
            purpose: record.purpose,
        });
        let moving = self.move_of(now, record, self.holders(&formation));
        self.effects.push(Effect::Form(formation));
        self.state = State::Moving(moving);
    }

    fn move_of(&self, now: Millis, record: &Record, holders: BTreeSet<PodUid>) -> Move {
        let leavers = record.members.iter().map(|member| member.pod_uid.clone());
        let leavers = leavers.filter(|pod| self.leaves_in_a_hurry(pod)).collect();
        let (purpose, limit) = (record.purpose, self.moving_limit(now, record));
        Move { ready: BTreeMap::new(), leavers, holders, purpose, since: now, limit }
    }

    /// Members that computed with the others before or, where nobody is known to have done, that hold something.
    fn holders(&self, formation: &Formation) -> BTreeSet<PodUid> {
        let members = || formation.record.members.iter().map(|member| member.pod_uid.clone());
        let proven: BTreeSet<PodUid> = members().filter(|pod| self.is_proven(pod)).collect();
        if !proven.is_empty() {
            return proven;
        }
        let holdings = formation.memory.iter().flat_map(|memory| &memory.holdings);
        members()
            .zip(holdings)
            .filter(|(_, holding)| holding.blocks.iter().any(|bits| *bits != 0))
            .map(|(pod, _)| pod)
            .collect()
    }

    fn moving(&mut self, now: Millis, moving: &Move) -> bool {
        let Move { ready, holders, purpose, since, limit, .. } = moving;
        let members = self.members().to_vec();
        if let Some(reason) = self.obstacle(now, &members, moving) {
            self.fruitless += 1;
            self.collect(now, false, reason, self.earliest_deadline(&members));
            return true;
        }
        if members.iter().all(|member| ready.contains_key(&member.pod_uid)) {
            if self.record.as_ref().is_some_and(|record| record.in_memory) {
                self.moved(now.saturating_sub(*since));
            }
            let digests: BTreeSet<&String> = ready.values().collect();
            if digests.len() <= 1 {
                return self.all_ready(now, &members, *purpose);
            }
            self.fruitless += 1;
            self.keep_out_who_differs(ready, holders);
            self.happened(Happening::StateMismatch { generation: self.generation() });
            self.collect(now, false, "ranks loaded different states".to_owned(), 0);
            return true;
        }
        let waits =
            members.iter().any(|member| self.ranks.get(&member.pod_uid).is_some_and(|rank| rank.blocked.is_some()));
        let overdue = !waits && now >= *limit;
        if overdue {
            self.fruitless += 1;
            self.collect(now, false, "a rank does not get ready".to_owned(), 0);
        }
        overdue
    }

    /// A generation that was not formed to train has done what it was formed for, or does once it is stopped.
    fn all_ready(&mut self, now: Millis, members: &[Member], purpose: Purpose) -> bool {
        let reason = match purpose {
            Purpose::Train => return self.go(now),
            Purpose::Save => "what ranks hold is written down",
            Purpose::HandOver => "what only leavers held is handed over",
        };
        let deadline_ms = self.earliest_deadline(members);
        self.collect(now, true, reason.to_owned(), deadline_ms);
        true
    }

    /// What keeps a generation from starting. That those leave who were known to is not: their notice came while it was
    /// being recorded. Nor is anyone's leaving where all that is wanted is to write down or hand over what is held.
    fn obstacle(&mut self, now: Millis, members: &[Member], moving: &Move) -> Option<String> {
        if self.is_suspended() && moving.purpose != Purpose::Save {
            return Some("the training is suspended".to_owned());
        }
        if members.iter().any(|member| self.is_gone(&member.pod_uid)) {
            self.interrupt(now);
            return Some("a rank is gone".to_owned());
        }
        let absent = |member: &Member| {
            let away = self.ranks.get(&member.pod_uid).and_then(|rank| rank.away_since);
            away.is_some_and(|since| now >= since.saturating_add(self.limits.stall_ms))
        };
        if members.iter().any(absent) {
            return Some("a rank is out of reach".to_owned());
        }
        let leaves = |pod: &PodUid| self.leaves_in_a_hurry(pod) && !moving.leavers.contains(pod);
        let trains = moving.purpose == Purpose::Train;
        let leaver = members.iter().find(|member| trains && leaves(&member.pod_uid))?;
        self.interrupt(now);
        Some(self.why_it_leaves(leaver))
    }

    /// From here on time counts as recovery.
    pub(super) fn interrupt(&mut self, now: Millis) {
        if !self.interrupted {
            self.interrupted = true;
            self.recovery = Stages { detected: Some(now), ..Stages::default() };
        }
    }

    fn go(&mut self, now: Millis) -> bool {
        let generation = self.generation();
        for member in self.members().to_vec() {
            self.send(&member.pod_uid, Body::Go(wire::Go { generation }));
        }
        if self.interrupted {
            self.recovery.restored = Some(now);
        }
        self.step_is_next = false;
        self.state = State::Steady { since: now, progressed: false };
        true
    }

    fn steady(&mut self, now: Millis, since: Millis, progressed: bool) -> bool {
        let members = self.members().to_vec();
        if members.iter().any(|member| self.is_gone(&member.pod_uid)) {
            self.interrupt(now);
            self.collect(now, false, "a rank is gone".to_owned(), 0);
            return true;
        }
        if self.is_stalled(now, since) {
            self.interrupt(now);
            self.stalls += 1;
            self.suspect_laggards(now, &members);
            self.collect(now, false, "no step was made in time".to_owned(), 0);
            return true;
        }
        if let Some((reason, deadline_ms)) = self.wish(now, &members, progressed) {
            self.stop_for_a_reason(now, since, reason, deadline_ms);
            return true;
        }
        self.release_surplus(&members);
        false
    }

    /// A reason for a planned change, and its deadline.
    fn wish(&mut self, now: Millis, members: &[Member], progressed: bool) -> Option<(String, Millis)> {
        let target = self.target?;
        let leaver = members.iter().find(|member| self.leaves_in_a_hurry(&member.pod_uid));
        if let Some(leaver) = leaver {
            self.interrupt(now);
            return Some((self.why_it_leaves(leaver), self.earliest_deadline(members)));
        }
        if target.suspend {
            return Some(("the training is suspended".to_owned(), 0));
        }
        if members.len() > self.max() || members.len() < target.min {
            let (min, max) = (target.min, self.max());
            return Some((format!("{min} to {max} ranks are asked for"), 0));
        }
        if !progressed || !self.can_grow(now, members) {
            return None;
        }
        let candidates = self.candidates();
        let is_replaced = |pod: &PodUid| self.departure(pod).is_some_and(|it| it.hurry) && !candidates.contains(pod);
        if members.iter().any(|member| is_replaced(&member.pod_uid)) {
            // Its replacement is here before it is due to leave: what that takes is the notice's doing all the same.
            self.interrupt(now);
        }
        Some(("ranks join".to_owned(), 0))
    }

    fn why_it_leaves(&self, member: &Member) -> String {
        let source = self.departure(&member.pod_uid).map_or("", |departure| &departure.source);
        format!("{} on node {} leaves: {source}", member.pod_name, member.node)
    }

    pub(super) fn earliest_deadline(&self, members: &[Member]) -> Millis {
        members
            .iter()
            .filter_map(|member| self.departure(&member.pod_uid))
            .filter(|departure| departure.hurry && departure.deadline_ms > 0)
            .map(|departure| departure.deadline_ms)
            .min()
            .unwrap_or(0)
    }

    /// Whether newcomers make the generation larger, or take the place of one that is to leave.
    fn can_grow(&self, now: Millis, members: &[Member]) -> bool {
        let room = members.len() < self.max() || self.anyone_leaves(members);
        if !room {
            return false;
        }
        let candidates = self.candidates();
        let newcomers = candidates.iter().filter(|pod| !self.is_member(pod) && self.departure(pod).is_none());
        let newest = newcomers.filter_map(|pod| self.ranks.get(pod)).map(|rank| rank.prepared_at).max();
        newest.is_some_and(|newest| self.is_settled(now, newest))
    }

    fn anyone_leaves(&self, members: &[Member]) -> bool {
        members.iter().any(|member| self.departure(&member.pod_uid).is_some())
    }

    /// Sends home whom a full generation does not need.
    fn release_surplus(&mut self, members: &[Member]) {
        if members.len() < self.max() || self.anyone_leaves(members) {
            return;
        }
        let surplus: Vec<PodUid> = self
            .ranks
            .iter()
            .filter(|(pod, rank)| !rank.released && rank.connected && !self.is_member(pod))
            .map(|(pod, _)| pod.clone())
            .collect();
        for pod in surplus {
            self.release(&pod, Why::Released);
        }
    }

    pub(super) fn release(&mut self, pod: &str, why: Why) {
        self.send(pod, Body::Shutdown(wire::Shutdown { why: why.into() }));
        if let Some(rank) = self.ranks.get_mut(pod) {
            rank.released = true;
        }
    }

    /// A planned stop, but where the step under way would end too late for what has to be done after it.
    fn stop_for_a_reason(&mut self, now: Millis, since: Millis, reason: String, deadline_ms: Millis) {
        if self.step_fits(now, since, deadline_ms) {
            return self.collect(now, true, reason, deadline_ms);
        }
        if self.needs_checkpoint(&self.candidates()) {
            self.warn_of_a_late_checkpoint(now, deadline_ms, 0);
        }
        self.collect(now, false, format!("{reason}; the step would end too late"), deadline_ms);
    }

    fn is_stalled(&self, now: Millis, since: Millis) -> bool {
        // Ranks that are all out of reach may well be training: it is we who are cut off.
        let in_reach = |member: &Member| self.ranks.get(&member.pod_uid).is_some_and(|rank| rank.connected);
        // What was said while we stood still is heard after the first tick.
        let last = self.last_step_at.max(since).max(self.evaluated_at).max(self.attentive_since);
        self.members().iter().any(in_reach) && now >= last.saturating_add(self.patience(now))
    }

    /// After so long without a step a rank is taken to hang.
    pub(super) fn patience(&self, now: Millis) -> Millis {
        let patience = match self.step_ms {
            // After the last step the result is written.
            Some(_) if self.steps > 0 && self.step >= self.steps => self.limits.store_ms,
            Some(step_ms) if self.is_one_silent(now) => self.limits.silent_ms.max(3 * step_ms),
            Some(step_ms) => self.step_patience(step_ms),
            None => self.limits.first_step_ms,
        };
        // A step may just take longer than those before: with fewer ranks, on other nodes.
        patience << self.stalls.min(MAX_DOUBLINGS)
    }

    /// A member is out of reach, and not just for a moment.
    fn is_one_silent(&self, now: Millis) -> bool {
        self.members().iter().any(|member| self.is_silent(now, &member.pod_uid))
    }

    fn is_silent(&self, now: Millis, pod: &str) -> bool {
        let away = self.ranks.get(pod).and_then(|rank| rank.away_since);
        away.is_some_and(|since| now >= since.saturating_add(self.limits.silent_ms / 2))
    }

    /// Others wait on the ranks that are behind. (All are level when none of them can finish a step:
    /// then those that do not answer the stop are out.)
    fn suspect_laggards(&mut self, now: Millis, members: &[Member]) {
        let step_of = |member: &Member| self.ranks.get(&member.pod_uid).and_then(|rank| rank.step);
        let ahead = members.iter().filter_map(step_of).max();
        let laggards: Vec<PodUid> = members
            .iter()
            .filter(|member| step_of(member).is_some_and(|step| Some(step) < ahead))
            .map(|member| member.pod_uid.clone())
            .collect();
        for pod in laggards {
            self.suspect(now, &pod);
        }
    }

    fn suspect(&mut self, now: Millis, pod: &str) {
        let Some(rank) = self.ranks.get_mut(pod) else { return };
        if rank.suspect_since.is_none() {
            rank.suspect_since = Some(now);
            let (pod, node) = (rank.pod_name.clone(), rank.node.clone());
            self.effects.push(Effect::Happened(Happening::Hung { pod, node }));
        }
    }

    /// Collect: tells every member to leave the generation for ever.
    pub(super) fn collect(&mut self, now: Millis, planned: bool, reason: String, deadline_ms: Millis) {
        let generation = self.generation();
        let answered = BTreeSet::new();
        let saves = planned && self.saves_when_stopped(&self.candidates());
        // What is waited for from here on is more than a step.
        self.step_is_next = false;
        self.send_stop(now, planned, &reason, deadline_ms, &answered);
        // One that trains nothing ends as it was formed to, which has been told.
        if !planned || !matches!(self.state, State::Moving(_)) {
            self.happened(Happening::Stopping { generation, planned, reason: reason.clone() });
        }
        if saves {
            let trains = !matches!(self.state, State::Moving(_));
            self.warn_of_a_late_checkpoint(now, deadline_ms, self.step_ms.filter(|_| trains).unwrap_or(0));
        }
        let limit = match (&self.state, planned) {
            (_, false) => self.unplanned_limit(now, deadline_ms),
            (State::Moving(_), true) => self.parting_limit(now, deadline_ms, saves),
            (_, true) => self.last_step_limit(now, deadline_ms),
        };
        self.state = State::Collecting { planned, saves, limit, deadline: deadline_ms, reason, answered };
    }

    /// Where nothing is trained only a generation that was formed for it writes anything down.
    fn saves_when_stopped(&self, staying: &[PodUid]) -> bool {
        match &self.state {
            State::Moving(moving) => moving.purpose == Purpose::Save,
            _ => self.needs_checkpoint(staying),
        }
    }

    /// Said beforehand, where those who stay are too few to hold the state. Before the first checkpoint nobody knows what one
    /// takes, and there is most to lose.
    fn warn_of_a_late_checkpoint(&mut self, now: Millis, deadline_ms: Millis, step_ms: Millis) {
        let needs_ms = self.checkpoint_ms().map(|takes| step_ms.saturating_add(takes));
        let has_ms = deadline_ms.saturating_sub(now);
        if deadline_ms > 0 && needs_ms.is_none_or(|needs| needs > has_ms) {
            let (bytes, durable_step) = (self.state_bytes, self.durable_step());
            self.happened(Happening::CheckpointWillBeLate { needs_ms, has_ms, bytes, durable_step });
        }
    }

    /// The last step that the store has, as far as we know.
    pub(super) fn durable_step(&self) -> Option<u64> {
        let told = self.checkpoint.as_ref().map(|last| last.step);
        told.max(self.newest_manifest().map(|manifest| manifest.step))
    }

    pub(super) fn needs_checkpoint(&self, staying: &[PodUid]) -> bool {
        self.is_suspended() || staying.len() < self.fewest()
    }

    fn send_stop(
        &mut self,
        now: Millis,
        planned: bool,
        reason: &str,
        deadline_ms: Millis,
        answered: &BTreeSet<PodUid>,
    ) {
        let members = self.record.as_ref().map_or(Vec::new(), |record| record.members.clone());
        let staying = self.candidates();
        for member in members {
            if !answered.contains(&member.pod_uid) {
                let stop = self.stop_for(now, &member.pod_uid, &staying, planned, reason, deadline_ms);
                self.send(&member.pod_uid, Body::Stop(stop));
            }
        }
    }

    /// Memory is enough for a change as long as enough ranks stay to hold it.
    pub(super) fn stop_for(
        &self,
        now: Millis,
        pod: &str,
        staying: &[PodUid],
        planned: bool,
        reason: &str,
        deadline_ms: Millis,
    ) -> wire::Stop {
        wire::Stop {
            generation: self.generation(),
            planned,
            reason: reason.to_owned(),
            time_left_ms: time_left(now, deadline_ms),
            step_time_ms: time_left(now, self.last_step_due(deadline_ms, staying)),
            checkpoint: self.needs_checkpoint(staying),
            leaves: !staying.iter().any(|stays| stays == pod),
        }
    }

    fn collecting(&mut self, now: Millis, planned: bool, limit: Millis, answered: &BTreeSet<PodUid>) -> bool {
        let waiting: Vec<PodUid> = self
            .members()
            .iter()
            .map(|member| &member.pod_uid)
            .filter(|pod| !answered.contains(*pod))
            .cloned()
            .collect();
        let (gone, mut waiting): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|pod| self.is_gone(pod));
        if planned && !waiting.is_empty() && !gone.is_empty() {
            self.interrupt(now);
            return self.cut_short(now, "a rank went during the planned stop");
        }
        if !planned {
            // Whose notice is over is gone, or as good as gone.
            waiting.retain(|pod| !self.is_late(now, pod));
        }
        if waiting.is_empty() {
            self.count_false_alarm();
            return self.disband(now);
        }
        if !planned && self.may_yet_call(now, &waiting) {
            return false;
        }
        let limit = if planned { limit } else { self.answers_due(limit) };
        let given_up = !planned && self.are_lost(now, limit, &waiting);
        if (now < limit && !given_up) || (planned && self.store_is_in_the_way(&waiting)) {
            return false;
        }
        if planned {
            return self.cut_short(now, "the planned stop took too long");
        }
        for pod in waiting {
            self.suspect(now, &pod);
        }
        self.disband(now)
    }

    /// A new leader that has not heard from all of a generation that broke: who did not call yet may hold what the others do
    /// not, as long as hellos come.
    fn may_yet_call(&self, now: Millis, waiting: &[PodUid]) -> bool {
        let in_time = match self.state {
            State::Collecting { deadline, .. } if deadline > 0 => now < deadline,
            _ => true,
        };
        let unheard = |pod: &PodUid| !self.ranks.contains_key(pod) && !self.lost_unheard.contains(pod);
        in_time && now < self.newest_hello.saturating_add(self.limits.adopt_ms) && waiting.iter().any(unheard)
    }

    /// Who called for the first time after the stop has as long as the others had.
    fn answers_due(&self, limit: Millis) -> Millis {
        match self.state {
            State::Collecting { deadline, .. } if deadline > 0 => limit,
            _ => limit.max(self.newest_hello.saturating_add(self.limits.collect_ms)),
        }
    }

    /// Whom peers have lost, and who does not answer us either, is not waited for to the end; not at all where its stream
    /// is broken too and the others have all that it may hold.
    fn are_lost(&self, now: Millis, limit: Millis, waiting: &[PodUid]) -> bool {
        let since = limit.saturating_sub(self.limits.collect_ms);
        let lost = |pod: &PodUid| self.ranks.get(pod).is_none_or(|rank| rank.reported_lost) || self.is_silent(now, pod);
        // Whom a new leader does not know may just not have called it yet.
        let away = |pod: &PodUid| self.ranks.get(pod).is_some_and(|rank| !rank.connected);
        let dispensable = || waiting.iter().all(away) && self.held_state(now, &self.candidates()).is_some();
        let hung = || now >= since.saturating_add(self.limits.hung_ms) && self.goes_on_without(now, waiting);
        (waiting.iter().all(lost) && (now >= since.saturating_add(self.limits.lost_ms) || dispensable()))
            || (self.stalls > 0 && hung())
    }

    /// The ranks that have answered are enough, and hold everything.
    fn goes_on_without(&self, now: Millis, waiting: &[PodUid]) -> bool {
        let staying: Vec<PodUid> = self.candidates().into_iter().filter(|pod| !waiting.contains(pod)).collect();
        staying.len() >= self.fewest() && self.held_state(now, &staying).is_some_and(|held| held.members == staying)
    }

    /// No step came in time, and every member answers: none of them hangs.
    fn count_false_alarm(&mut self) {
        let suspected =
            |member: &Member| self.ranks.get(&member.pod_uid).is_some_and(|rank| rank.suspect_since.is_some());
        if self.stalls > 0
            && self.pace.usual().is_some()
            && !self.members().iter().any(|member| self.is_gone(&member.pod_uid) || suspected(member))
        {
            self.count_false_alarm_in(self.generation());
        }
    }

    pub(super) fn count_false_alarm_in(&mut self, generation: u64) {
        if self.false_alarm_in < generation {
            self.false_alarm_in = generation;
            self.false_alarms = (self.false_alarms + 1).min(MAX_DOUBLINGS);
        }
    }

    /// A checkpoint that cannot be written is waited for, unless somebody is about to go.
    fn store_is_in_the_way(&self, waiting: &[PodUid]) -> bool {
        let hurried = matches!(&self.state, State::Collecting { deadline, .. } if *deadline > 0);
        !hurried
            && waiting
                .iter()
                .any(|pod| self.ranks.get(pod).is_some_and(|rank| rank.connected && rank.blocked.is_some()))
    }

    /// A planned stop that does not come to its end becomes an unplanned one.
    fn cut_short(&mut self, now: Millis, why: &str) -> bool {
        let State::Collecting { deadline, reason, answered, .. } = self.state.clone() else {
            return false;
        };
        let reason = format!("{reason}; {why}");
        self.send_stop(now, false, &reason, deadline, &answered);
        let limit = self.unplanned_limit(now, deadline);
        self.state = State::Collecting { planned: false, saves: false, limit, deadline, reason, answered };
        true
    }

    /// All have left the generation, or are out.
    fn disband(&mut self, now: Millis) -> bool {
        let pause_ms = match self.fruitless {
            0 | 1 => 0,
            many => 1000u64 << many.min(6),
        };
        self.state = State::Held { not_before: now + pause_ms, enough_since: None, eager: true };
        true
    }

    /// No pods are needed until the training is resumed.
    fn suspended(&mut self, now: Millis) -> bool {
        if !self.target.is_some_and(|target| target.suspend) {
            self.state = State::held(now);
            return true;
        }
        self.release_everyone(Why::Suspended)
    }

    fn complete(&mut self) -> bool {
        self.release_everyone(Why::Complete)
    }

    fn release_everyone(&mut self, why: Why) -> bool {
        let connected: Vec<PodUid> = self
            .ranks
            .iter()
            .filter(|(_, rank)| rank.connected && !rank.released)
            .map(|(pod, _)| pod.clone())
            .collect();
        for pod in connected {
            self.release(&pod, why);
        }
        false
    }
}
