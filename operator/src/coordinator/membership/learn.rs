//! What an event says. Nothing here decides; see `advance.rs`.

use super::notice::time_left;
use super::rank::Rank;
use super::{
    Body, Departure, Effect, Event, MAX_FAILURES, MAX_RANKS, MAX_REMEDIES, Membership, Millis, PodFact, Stages, State,
};
use crate::coordinator::manifest::Manifest;
use crate::coordinator::record::{Finish, Member, Record};
use crate::coordinator::report::{
    Blockage, CheckpointReport, EvaluationReport, Happening, MemoryNeed, PodUid, RankFailure, RecoveryPhases, Remedy,
    StepReport,
};
use std::collections::BTreeMap;
use vicuna_protocol::coordinator as wire;
use vicuna_protocol::coordinator::rank_message::Body as Said;

/// Parts of a training whose ends are told.
const MILESTONES: u64 = 4;

impl Membership {
    pub(super) fn learn(&mut self, now: Millis, event: Event) {
        let of_memory = matches!(
            event,
            Event::Joined(_) | Event::Disconnected(_) | Event::Pods(_) | Event::Said(_, Said::Estimated(_))
        );
        match event {
            Event::Joined(hello) => self.joined(now, hello),
            Event::Disconnected(pod) => {
                if let Some(rank) = self.ranks.get_mut(&pod) {
                    rank.connected = false;
                    rank.away_since = Some(now);
                }
            }
            Event::Said(pod, body) => self.said(now, &pod, body),
            Event::Pods(pods) => self.pods(pods),
            Event::Target(target) => self.target = Some(target),
            Event::Tick => {}
            Event::RecordWritten => self.record_written(now),
            Event::RecordConflict(record) => self.record_conflict(now, record),
        }
        if of_memory {
            self.memory = self.memory_needs();
            self.remedies = self.least_remedies();
        }
    }

    fn joined(&mut self, now: Millis, hello: wire::Hello) {
        let pod = hello.pod_uid.clone();
        if self.ranks.len() >= MAX_RANKS && !self.ranks.contains_key(&pod) {
            return;
        }
        // Caches lag behind calls: the service has just seen the pod.
        if let Some(pods) = &mut self.pods {
            pods.entry(pod.clone()).or_default();
        }
        let member = self.is_member(&pod);
        if member && !self.ranks.contains_key(&pod) {
            self.newest_hello = now;
        }
        let uncalled = member && self.is_uncalled(&hello);
        let current = hello.generation == self.generation() && (member || self.is_held(&pod));
        if hello.generation != 0 && !current && !uncalled {
            self.rejoin_as_newcomer(&pod, &hello);
            return;
        }
        self.remember(&hello);
        if let State::Finished(_) = self.state {
            return self.release(&pod, wire::shutdown::Why::Complete);
        }
        if member && hello.since_step_ms > 0 {
            // Steps that were made while there was no leader: a recovery is counted from them.
            self.last_step_at = self.last_step_at.max(now.saturating_sub(hello.since_step_ms));
        }
        self.effects.push(Effect::Welcome(pod.clone()));
        match (member, hello.generation) {
            (true, 0) => self.dropped_out(now, &pod),
            (true, _) if uncalled => self.missed_the_call(now, &pod),
            (true, _) => self.came_back(now, &pod, hello.step),
            (false, _) => {}
        }
    }

    /// It has said what it holds of the last generation, and waits with us for the next one.
    fn is_held(&self, pod: &str) -> bool {
        let holds = || self.ranks.get(pod).is_some_and(|rank| rank.holding.is_some());
        matches!(self.state, State::Held { .. }) && holds()
    }

    /// The generation was recorded, and the rank that it counts on never heard of it: the leader went in that moment, or
    /// the stream broke. It still has what it held, and nobody has gone on without it.
    fn is_uncalled(&self, hello: &wire::Hello) -> bool {
        let waited_for = matches!(self.state, State::Adopting { .. } | State::Moving(_) | State::Collecting { .. });
        waited_for && hello.generation > 0 && hello.generation + 1 == self.generation()
    }

    fn missed_the_call(&mut self, now: Millis, pod: &str) {
        if matches!(self.state, State::Collecting { .. }) {
            return self.came_back(now, pod, 0);
        }
        self.interrupt(now);
        self.collect(now, false, "a rank did not hear of its generation".to_owned(), 0);
    }

    fn rejoin_as_newcomer(&mut self, pod: &str, hello: &wire::Hello) {
        self.remember(hello);
        let generation = hello.generation;
        // It forgets its state when it hears that: nobody may count on it any more.
        if let Some(rank) = self.ranks.get_mut(pod) {
            rank.holding = None;
        }
        if let State::Finished(_) = self.state {
            return self.release(pod, wire::shutdown::Why::Complete);
        }
        self.send(pod, Body::Stale(wire::Stale { generation }));
    }

    /// A member that says hello as a newcomer has lost its place.
    fn dropped_out(&mut self, now: Millis, pod: &str) {
        match &mut self.state {
            State::Collecting { answered, .. } => {
                answered.insert(pod.to_owned());
            }
            _ => {
                self.collect(now, false, "a rank started anew".to_owned(), 0);
                self.answered(pod);
            }
        }
    }

    fn came_back(&mut self, now: Millis, pod: &str, step: u64) {
        let generation = self.generation();
        match &mut self.state {
            State::Adopting { answered, .. } => {
                answered.insert(pod.to_owned());
                self.step = self.step.max(step);
                if let Some(rank) = self.ranks.get_mut(pod) {
                    rank.prepared = true;
                }
            }
            State::Steady { since, .. } => {
                *since = now;
                self.send(pod, Body::Go(wire::Go { generation }));
            }
            State::Collecting { planned, deadline, reason, answered, .. } if !answered.contains(pod) => {
                let (planned, reason, deadline) = (*planned, reason.clone(), *deadline);
                let stop = self.stop_for(now, pod, &self.candidates(), planned, &reason, deadline);
                self.send(pod, Body::Stop(stop));
            }
            _ => {}
        }
    }

    fn remember(&mut self, hello: &wire::Hello) {
        let order = self.joined;
        self.joined += 1;
        let rank = self.ranks.entry(hello.pod_uid.clone()).or_insert_with(|| Rank {
            pod_name: hello.pod_name.clone(),
            node: hello.node.clone(),
            address: hello.peer_address.clone(),
            order,
            connected: true,
            away_since: None,
            prepared: false,
            prepared_at: 0,
            blocked: None,
            held_up: None,
            memory: Vec::new(),
            remedies: Vec::new(),
            own_notice: None,
            failed: false,
            released: false,
            suspect_since: None,
            step: None,
            noticed: false,
            holding: None,
            reported_lost: false,
            numerics_class: String::new(),
            mismatched: false,
            proven: false,
        });
        rank.connected = true;
        rank.away_since = None;
        rank.address.clone_from(&hello.peer_address);
        rank.suspect_since = None;
        rank.numerics_class = bounded(hello.numerics_class.clone());
        if hello.generation == 0 {
            rank.holding = None;
            rank.prepared = false;
            rank.blocked = None;
            rank.proven = false;
        }
    }

    fn said(&mut self, now: Millis, pod: &str, body: Said) {
        if !self.ranks.contains_key(pod) {
            return;
        }
        match body {
            // The service turns it into `Event::Joined`.
            Said::Hello(_) => {}
            Said::Prepared(prepared) => self.prepared(now, pod, prepared),
            Said::Blocked(blocked) => self.blocked(pod, blocked),
            Said::Ready(ready) => self.ready(pod, ready),
            Said::Progress(progress) => self.progressed(now, pod, &progress),
            Said::Estimated(estimated) => self.estimated(pod, &estimated),
            Said::Evaluated(evaluated) => self.evaluated(now, pod, &evaluated),
            Said::Checkpointed(checkpointed) => self.checkpointed(now, checkpointed),
            Said::Notice(notice) => self.noticed(now, pod, notice),
            Said::Stopped(stopped) => self.stopped(now, pod, stopped),
            Said::Finished(finished) => self.finished(pod, finished),
            Said::Failed(failed) => self.failed(pod, failed),
            Said::LoadFailed(failed) => self.load_failed(now, failed),
        }
    }

    fn prepared(&mut self, now: Millis, pod: &str, prepared: wire::Prepared) {
        self.manifests.learn(prepared.manifests.into_iter().map(Manifest::from));
        if prepared.micro_batches > 0 {
            self.micro_batches = Some(prepared.micro_batches as usize);
        }
        if prepared.blocks > 0 {
            self.blocks = Some(prepared.blocks as usize);
        }
        self.steps = self.steps.max(prepared.steps);
        self.state_bytes = self.state_bytes.max(prepared.state_bytes);
        if let Some(rank) = self.ranks.get_mut(pod) {
            rank.prepared = true;
            rank.prepared_at = now;
            rank.blocked = None;
        }
    }

    fn estimated(&mut self, pod: &str, said: &wire::Estimated) {
        let need = |need: &wire::estimated::Need| MemoryNeed {
            ranks: need.ranks,
            host_bytes: need.host_bytes,
            device_bytes: need.device_bytes,
            fits: need.fits,
        };
        let remedy = |remedy: &wire::estimated::Remedy| Remedy {
            settings: bounded(remedy.settings.clone()),
            ranks: remedy.ranks,
        };
        if let Some(rank) = self.ranks.get_mut(pod) {
            rank.memory = said.needs.iter().take(MAX_RANKS).map(need).collect();
            rank.remedies = said.remedies.iter().take(MAX_REMEDIES).map(remedy).collect();
        }
    }

    fn blocked(&mut self, pod: &str, blocked: wire::Blocked) {
        let (behind, cause) = (blocked.behind, blocked.cause());
        let blockage = Some(Blockage { cause, message: bounded(blocked.message) });
        let new = !self.ranks.values().any(|rank| rank.held_up.is_some());
        let Some(rank) = self.ranks.get_mut(pod) else { return };
        if !behind {
            // The training does not go on any more.
            (rank.blocked, rank.held_up) = (blockage, None);
            return;
        }
        rank.held_up = blockage;
        if let Some(Blockage { message, .. }) = rank.held_up.clone().filter(|_| new) {
            let durable_step = self.durable_step();
            self.happened(Happening::CheckpointHeldUp { message, durable_step });
        }
    }

    fn unblock(&mut self, pod: &str) {
        if let Some(rank) = self.ranks.get_mut(pod) {
            rank.blocked = None;
        }
    }

    fn ready(&mut self, pod: &str, said: wire::Ready) {
        if said.generation != self.generation() || !self.is_member(pod) {
            return;
        }
        self.unblock(pod);
        if let State::Moving(moving) = &mut self.state {
            moving.ready.insert(pod.to_owned(), said.state_digest);
        }
    }

    fn progressed(&mut self, now: Millis, pod: &str, said: &wire::Progress) {
        if said.generation != self.generation() || !self.is_member(pod) {
            return;
        }
        if let Some(rank) = self.ranks.get_mut(pod) {
            rank.step = rank.step.max(Some(said.step));
        }
        if said.last_of_generation {
            self.parting(now);
        }
        if matches!(self.state, State::Moving(_)) || said.step <= self.step {
            return;
        }
        self.stepped(now, step_report(said), said.next() == wire::progress::Next::Step);
    }

    /// A step counts when the first rank says so.
    fn stepped(&mut self, now: Millis, report: StepReport, step_is_next: bool) {
        // The last step of a generation that is being stopped is not the first one after it.
        if self.interrupted && matches!(self.state, State::Steady { .. }) {
            self.interrupted = false;
            self.recovered(now);
        }
        let part = |step: u64| (step * MILESTONES).checked_div(report.steps);
        if part(report.step) > part(self.step) && report.step < report.steps {
            self.happened(Happening::Milestone { step: report.step, steps: report.steps, loss: report.loss });
        }
        self.step = report.step;
        self.steps = self.steps.max(report.steps);
        self.measure_pace(now, step_is_next);
        self.last_step_at = now;
        self.step_ms = Some((report.step_seconds * 1000.0).clamp(0.0, 1e9) as u64);
        self.fruitless = 0;
        self.stalls = 0;
        if let State::Steady { progressed, .. } = &mut self.state
            && !std::mem::replace(progressed, true)
        {
            self.proved();
        }
        self.progress = Some(report.clone());
        self.happened(Happening::Stepped(report));
    }

    /// All members have computed a step together.
    fn proved(&mut self) {
        for member in self.members().to_vec() {
            if let Some(rank) = self.ranks.get_mut(&member.pod_uid) {
                rank.proven = true;
            }
        }
    }

    /// Steps are made again. What befell a training before its first step is no recovery.
    fn recovered(&mut self, now: Millis) {
        let phases = self.recovery_phases(now);
        if self.last_step_at > 0 {
            let after_ms = now.saturating_sub(self.last_step_at);
            self.counters.last_recovery_ms = Some(after_ms);
            self.happened(Happening::Recovered { generation: self.generation(), after_ms, phases });
        }
    }

    fn evaluated(&mut self, now: Millis, pod: &str, said: &wire::Evaluated) {
        if said.generation != self.generation() || !self.is_member(pod) {
            return;
        }
        self.evaluated_at = now;
        let newer = self.evaluation.is_none_or(|last| last.step < said.step);
        if let Some(loss) = said.loss.filter(|loss| loss.is_finite() && newer) {
            let report = EvaluationReport { step: said.step, loss };
            self.evaluation = Some(report);
            self.happened(Happening::Evaluated(report));
        }
    }

    fn checkpointed(&mut self, now: Millis, said: wire::Checkpointed) {
        let Some(manifest) = said.manifest.map(Manifest::from) else { return };
        if said.generation != self.generation() || manifest.generation != said.generation {
            return;
        }
        // A manifest names the blocks of every rank: the store takes what each of them writes.
        for member in self.members().to_vec() {
            self.unblock(&member.pod_uid);
        }
        for rank in self.ranks.values_mut() {
            rank.held_up = None;
        }
        let newer = self.checkpoint.as_ref().is_none_or(|last| last.step < manifest.step);
        // Who found most of its part in the store says nothing of how fast it writes.
        let part = self.state_bytes / self.members().len().max(1) as u64;
        let written = Some(said.bytes_written).filter(|bytes| *bytes >= part / 2);
        let before = self.checkpoint.as_ref().map_or(0, |last| last.bytes_a_second);
        self.manifests.learn([manifest.clone()]);
        if newer {
            let ms = |seconds: f64| (seconds * 1000.0).clamp(0.0, 1e12).round() as u64;
            let report = CheckpointReport {
                step: manifest.step,
                uri: said.uri,
                digest: manifest.digest,
                at_ms: now,
                stall_ms: ms(said.stall_seconds),
                upload_ms: ms(said.upload_seconds),
                interval_ms: ms(said.interval_seconds),
                bytes_a_second: written.and_then(|bytes| rate(bytes, said.upload_seconds)).unwrap_or(before),
            };
            self.checkpoint = Some(report.clone());
            self.happened(Happening::Checkpointed(report));
        }
    }

    fn noticed(&mut self, now: Millis, pod: &str, notice: wire::Notice) {
        if let Some(rank) = self.ranks.get_mut(pod) {
            rank.own_notice = Some(Departure {
                source: notice.source,
                deadline_ms: match notice.time_left_ms {
                    0 => notice.deadline_ms,
                    left => now.saturating_add(left),
                },
                hurry: true,
                // SIGTERM comes with a deletion as well as with a reclaim: the node tells which.
                reclaim: false,
            });
        }
        self.count_notices();
    }

    fn stopped(&mut self, now: Millis, pod: &str, said: wire::Stopped) {
        if said.generation != self.generation() || !self.is_member(pod) {
            return self.answered_late(pod, said);
        }
        self.unblock(pod);
        self.manifests.learn(said.manifests.into_iter().map(Manifest::from));
        if let Some(last) = said.holding.as_ref().and_then(|holding| holding.last.as_ref()) {
            // Its own report of the step may never have been sent.
            self.progressed(now, pod, last);
        }
        self.step = self.step.max(said.step);
        for lost in &said.lost {
            self.lost(lost);
        }
        if let Some(rank) = self.ranks.get_mut(pod) {
            rank.prepared = true;
            rank.reported_lost = false;
            // Who was behind and answers does not hang.
            rank.suspect_since = None;
            rank.holding = said.holding;
        }
        if !matches!(self.state, State::Collecting { .. }) {
            self.interrupt(now);
            self.collect(now, false, "a rank lost its peers".to_owned(), 0);
        }
        self.answered(pod);
    }

    /// It was taken to hang, and does not: it takes part with what it holds as long as nobody has gone on without it, and else
    /// anew.
    fn answered_late(&mut self, pod: &str, said: wire::Stopped) {
        let generation = said.generation;
        let members = self.record.as_ref().filter(|record| record.generation == generation).map(|it| &it.members);
        let member = members.is_some_and(|members| members.iter().any(|member| member.pod_uid == pod));
        let waited_for = member && matches!(self.state, State::Held { .. });
        let Some(rank) = self.ranks.get_mut(pod).filter(|rank| rank.suspect_since.is_some()) else { return };
        // Who answers as late as this was out for longer than any step is waited for.
        let hung = rank.suspect_since.is_some_and(|since| self.now >= since.saturating_add(self.limits.stall_ms));
        if waited_for {
            (rank.suspect_since, rank.prepared, rank.holding) = (None, true, said.holding);
        } else {
            rank.holding = None;
        }
        if !hung {
            self.count_false_alarm_in(generation.min(self.generation()));
        }
        if !waited_for {
            return self.send(pod, Body::Stale(wire::Stale { generation }));
        }
        self.step = self.step.max(said.step);
        self.manifests.learn(said.manifests.into_iter().map(Manifest::from));
    }

    fn lost(&mut self, pod_name: &str) {
        let named = |member: &&Member| member.pod_name == pod_name && !self.ranks.contains_key(&member.pod_uid);
        let unheard = self.members().iter().find(named).map(|member| member.pod_uid.clone());
        self.lost_unheard.extend(unheard);
        for rank in self.ranks.values_mut().filter(|rank| rank.pod_name == pod_name) {
            rank.reported_lost = true;
        }
    }

    fn recovery_phases(&mut self, now: Millis) -> RecoveryPhases {
        let Stages { detected, agreed, restored } = std::mem::take(&mut self.recovery);
        // Steps that were made after we noticed are none of the recovery's.
        let detected = detected.unwrap_or(now).max(self.last_step_at);
        let agreed = agreed.unwrap_or(now).max(detected);
        let restored = restored.unwrap_or(now).max(agreed);
        RecoveryPhases {
            detect: detected.saturating_sub(self.last_step_at),
            agree: agreed - detected,
            restore: restored - agreed,
            step: now.saturating_sub(restored),
        }
    }

    fn answered(&mut self, pod: &str) {
        if let State::Collecting { answered, .. } = &mut self.state {
            answered.insert(pod.to_owned());
        }
    }

    fn finished(&mut self, pod: &str, said: wire::Finished) {
        let ours = said.generation == self.generation() && self.is_member(pod);
        if !ours || said.uri.is_empty() {
            return;
        }
        let Some(mut record) = self.record.clone() else { return };
        record.finish = Some(Finish { step: said.step, uri: said.uri, digest: said.digest, loss: said.loss });
        self.step = self.step.max(said.step);
        self.effects.push(Effect::WriteRecord(record.clone()));
        self.state = State::Finishing(record);
    }

    fn failed(&mut self, pod: &str, said: wire::Failed) {
        if let Some(rank) = self.ranks.get_mut(pod) {
            rank.failed = true;
        }
        while self.failures.len() >= MAX_FAILURES {
            self.failures.pop_first();
        }
        let failure = RankFailure { cause: said.cause(), message: bounded(said.message), step: said.step };
        self.failures.insert(pod.to_owned(), failure);
    }

    fn load_failed(&mut self, now: Millis, said: wire::LoadFailed) {
        let Some(manifest) = said.manifest.map(Manifest::from) else { return };
        if said.generation != self.generation() || !self.is_active() {
            return;
        }
        if self.manifests.exclude(&manifest) {
            self.happened(Happening::ManifestUnusable { key: manifest.key, message: bounded(said.message) });
        }
        if matches!(self.state, State::Moving(_)) {
            self.collect(now, false, "the base cannot be loaded".to_owned(), 0);
        }
    }

    fn pods(&mut self, mut pods: BTreeMap<PodUid, PodFact>) {
        let before = self.pods.take().unwrap_or_default();
        for (pod, rank) in &self.ranks {
            let Some(last) = before.get(pod).filter(|fact| !fact.ended) else { continue };
            if pods.get(pod).is_some_and(|fact| !fact.ended) {
                continue;
            }
            // Why it went is needed after it is gone, to tell a reclaim from a deletion.
            let said = pods.get(pod).and_then(|fact| fact.departure.as_ref());
            let reclaim = said.or(last.departure.as_ref()).is_some_and(|departure| departure.reclaim);
            let (pod, node) = (rank.pod_name.clone(), rank.node.clone());
            self.counters.reclaims += u64::from(reclaim);
            self.losses += u64::from(!reclaim && !rank.released);
            if reclaim {
                self.effects.push(Effect::Happened(Happening::Reclaimed { pod, node }));
            } else if !rank.released {
                self.effects.push(Effect::Happened(Happening::Lost { pod, node }));
            }
        }
        // A pod that ended keeps the reason for which it was to go.
        for (pod, fact) in &mut pods {
            if fact.ended && fact.departure.is_none() {
                fact.departure = before.get(pod).and_then(|last| last.departure.clone());
            }
        }
        self.pods = Some(pods);
        self.count_notices();
        self.forget_strangers();
    }

    /// Counts each rank's notice once, until it is taken back.
    fn count_notices(&mut self) {
        let hurried: Vec<(PodUid, Option<Departure>)> = self
            .ranks
            .keys()
            .map(|pod| {
                // What has gone already gave no notice.
                let departure = self.departure(pod).filter(|it| it.hurry && !self.is_gone(pod));
                (pod.clone(), departure.cloned())
            })
            .collect();
        for (pod, departure) in hurried {
            let Some(rank) = self.ranks.get_mut(&pod) else { continue };
            let first = departure.is_some() && !rank.noticed && !rank.released;
            rank.noticed = departure.is_some();
            if let (true, Some(Departure { source, deadline_ms, .. })) = (first, departure) {
                let (pod, node) = (rank.pod_name.clone(), rank.node.clone());
                self.counters.notices += 1;
                self.tell_of_notice(&pod, &node, &source, deadline_ms);
                self.happened(Happening::Noticed { pod, node, source });
            }
        }
    }

    /// Every rank of the training hears at once by when one of them goes, long before it is told to stop.
    fn tell_of_notice(&mut self, pod_name: &str, node: &str, source: &str, deadline_ms: Millis) {
        let noticed = wire::Noticed {
            pod_name: pod_name.to_owned(),
            node: node.to_owned(),
            source: source.to_owned(),
            time_left_ms: time_left(self.now, deadline_ms),
        };
        for pod in self.ranks.keys().cloned().collect::<Vec<_>>() {
            self.send(&pod, Body::Noticed(noticed.clone()));
        }
    }

    fn exists(&self, pod: &str) -> bool {
        self.pods.as_ref().is_some_and(|pods| pods.contains_key(pod))
    }

    /// Drops ranks whose pods are gone and that no generation counts on.
    fn forget_strangers(&mut self) {
        let kept: Vec<PodUid> = self
            .ranks
            .iter()
            .filter(|(pod, rank)| rank.connected || self.exists(pod) || self.is_member(pod))
            .map(|(pod, _)| pod.clone())
            .collect();
        self.ranks.retain(|pod, _| kept.binary_search(pod).is_ok());
    }

    fn record_written(&mut self, now: Millis) {
        match std::mem::replace(&mut self.state, State::held(now)) {
            State::Planning(formation) => {
                self.expect_other_steps(formation.record.members.len());
                self.record = Some(formation.record.clone());
                self.move_to(now, formation);
            }
            State::Finishing(record) => {
                if let Some(finish) = &record.finish {
                    self.state = State::Finished(finish.clone());
                }
                self.record = Some(record);
            }
            other => self.state = other,
        }
    }

    /// Fewer ranks share the same work, or more.
    fn expect_other_steps(&mut self, members: usize) {
        let before = self.record.as_ref().map_or(0, |record| record.members.len()) as u64;
        if members > 0 && before > 0 {
            let scaled = |step_ms: Millis| (step_ms * before / members as u64).min(1_000_000_000);
            self.step_ms = self.step_ms.map(scaled);
            self.pace.slow_down(before, members as u64);
        }
    }

    fn record_conflict(&mut self, now: Millis, current: Option<Record>) {
        let planned = match &self.state {
            State::Planning(formation) => Some(formation.record.clone()),
            State::Finishing(record) => Some(record.clone()),
            _ => return,
        };
        if current == planned {
            return self.record_written(now);
        }
        self.state = State::held(now);
        self.record = None;
        self.adopt(now, current);
    }
}

fn step_report(said: &wire::Progress) -> StepReport {
    StepReport {
        generation: said.generation,
        step: said.step,
        steps: said.steps,
        epoch: said.epoch,
        loss: said.loss.is_finite().then_some(said.loss),
        learning_rate: said.learning_rate,
        tokens: said.tokens,
        step_seconds: said.step_seconds,
    }
}

/// Bytes a second.
fn rate(bytes: u64, seconds: f64) -> Option<u64> {
    (bytes > 0 && seconds > 0.0).then(|| ((bytes as f64 / seconds) as u64).max(1))
}

/// Messages end in conditions, which hold 32 KiB at most.
fn bounded(message: String) -> String {
    const MOST: usize = 1024;
    match message.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &message[..end]),
        None => message,
    }
}
