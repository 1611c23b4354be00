//! How long things may take before a notice is over, and how long a stop is waited for.

use super::{Departure, Membership, Millis, PodUid, Purpose, State};
use crate::coordinator::record::Record;

/// Until `at`; 0 if there is no hurry.
pub(super) fn time_left(now: Millis, at: Millis) -> Millis {
    match at {
        0 => 0,
        // Not none at all, which would be no hurry.
        at => at.saturating_sub(now).max(1),
    }
}

/// Of a notice, so many times what leaving takes are kept for it.
const SPARE: u64 = 2;

impl Membership {
    /// Whether what is left of the notice is what the step under way takes, and all that comes after it.
    pub(super) fn is_due(&self, departure: &Departure) -> bool {
        let Some(step_ms) = self.step_ms.filter(|_| departure.deadline_ms > 0) else { return true };
        let staying = self.ranks.iter().filter(|(pod, rank)| rank.is_fit() && !self.is_about_to_go(pod)).count();
        let saves_ms = self.checkpoint_ms().filter(|_| staying < self.fewest()).unwrap_or(0);
        let needs_ms = step_ms + self.limits.hand_over_ms.max(self.moved_ms) + saves_ms;
        self.now.saturating_add(SPARE * needs_ms) >= departure.deadline_ms
    }

    /// Whether the rank's notice is over.
    pub(super) fn is_late(&self, now: Millis, pod: &str) -> bool {
        self.departure(pod).is_some_and(|it| it.hurry && it.deadline_ms > 0 && it.deadline_ms <= now)
    }

    /// What has to be done after the last step, by what it took the last time: what only leavers hold is handed over and,
    /// where too few stay, written down.
    fn after_the_last_step_ms(&self, staying: &[PodUid]) -> Millis {
        let leavers = self.members().iter().filter(|member| !staying.contains(&member.pod_uid)).count();
        // What a single one holds its twins hold too, if there are any.
        let endangered = leavers > 1 || leavers == self.members().len();
        let hand_over = self.limits.hand_over_ms.max(if endangered { self.moved_ms } else { 0 });
        hand_over + self.checkpoint_ms().filter(|_| self.needs_checkpoint(staying)).unwrap_or(0)
    }

    /// How long a checkpoint takes that nothing else goes on beside: by the bytes that each rank has to write, fewer ranks
    /// more of them, and how fast one wrote the last time; or else by how long the last one took. `None`: none is known.
    pub(super) fn checkpoint_ms(&self) -> Option<Millis> {
        let last = self.checkpoint.as_ref()?;
        let members = self.record.iter().flat_map(|record| &record.members);
        let writers = members.filter(|member| !self.is_gone(&member.pod_uid)).count().max(1) as u64;
        let upload_ms = match (last.bytes_a_second, self.state_bytes) {
            (0, _) | (_, 0) => last.upload_ms,
            (rate, bytes) => (bytes / writers).saturating_mul(1000) / rate,
        };
        // A status may not say how long it took.
        Some(last.stall_ms.saturating_add(upload_ms)).filter(|ms| *ms > 0)
    }

    /// The last step must have been made by then; 0: no hurry.
    pub(super) fn last_step_due(&self, deadline_ms: Millis, staying: &[PodUid]) -> Millis {
        match deadline_ms {
            0 => 0,
            deadline => deadline.saturating_sub(self.after_the_last_step_ms(staying)).max(1),
        }
    }

    /// Members came together at a base that was in memory.
    pub(super) fn moved(&mut self, took: Millis) {
        // One that moved little says little of the next one.
        self.moved_ms = took.max(self.moved_ms / 2);
    }

    /// Whether the step under way ends in time, if it takes what the last one took. `since`: the generation trains since
    /// then.
    pub(super) fn step_fits(&self, now: Millis, since: Millis, deadline_ms: Millis) -> bool {
        let ends = self.step_ms.map_or(now, |step_ms| self.last_step_at.max(since) + step_ms).max(now);
        deadline_ms == 0 || ends <= self.last_step_due(deadline_ms, &self.candidates())
    }

    /// Until when the last step of a planned stop is waited for.
    pub(super) fn last_step_limit(&self, now: Millis, deadline_ms: Millis) -> Millis {
        let limit = now.saturating_add(self.patience(now));
        match self.last_step_due(deadline_ms, &self.candidates()) {
            0 => limit,
            due => due.clamp(now, limit.max(now)),
        }
    }

    /// … and after it for what it leaves to be done.
    pub(super) fn parting_limit(&self, now: Millis, deadline_ms: Millis, saves: bool) -> Millis {
        let patience = if saves { self.saving_ms() } else { self.limits.planned_ms };
        no_longer_than(deadline_ms, now, patience + 5 * self.step_ms.unwrap_or(0))
    }

    /// How long a checkpoint that nothing else goes on beside may take, by what the last one took. Who waits for the store
    /// says so, and is waited for: who is silent for so long hangs.
    fn saving_ms(&self) -> Millis {
        let usual = self.checkpoint_ms().map(|ms| ms.saturating_mul(5));
        usual.map_or(self.limits.store_ms, |usual| usual.clamp(self.limits.planned_ms, self.limits.store_ms))
    }

    /// … and of an unplanned one for the answers.
    pub(super) fn unplanned_limit(&self, now: Millis, deadline_ms: Millis) -> Millis {
        // Those who stay answer after the deadline too.
        no_longer_than(if deadline_ms > now { deadline_ms } else { 0 }, now, self.limits.collect_ms)
    }

    /// Until when members may get ready.
    pub(super) fn moving_limit(&self, now: Millis, record: &Record) -> Millis {
        let patience = if record.in_memory { self.limits.move_ms } else { self.limits.store_ms };
        let deadline_ms = match record.purpose {
            Purpose::Train => 0,
            Purpose::Save | Purpose::HandOver => self.earliest_deadline(&record.members),
        };
        no_longer_than(deadline_ms, now, patience)
    }

    /// The last step of a planned stop is made; what follows may take its own time.
    pub(super) fn parting(&mut self, now: Millis) {
        let State::Collecting { planned: true, saves, deadline, .. } = self.state else { return };
        let parting_limit = self.parting_limit(now, deadline, saves);
        if let State::Collecting { limit, .. } = &mut self.state {
            *limit = parting_limit;
        }
    }
}

/// What is not done when the first rank goes is not waited for, so that the others go on at once.
fn no_longer_than(deadline_ms: Millis, now: Millis, patience: Millis) -> Millis {
    let limit = now.saturating_add(patience);
    match deadline_ms {
        0 => limit,
        deadline => deadline.clamp(now, limit),
    }
}
