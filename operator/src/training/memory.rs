//! What one reconciliation of a training leaves for the next. The rest is in the API server.

use super::accounts::Accounts;
use crate::coordinator::membership::Millis;
use std::collections::{BTreeMap, BTreeSet};
use vicuna_crds::training::{Failure, Restarts};
use vicuna_crds::{VicunaTraining, VicunaTrainingStatus};

/// Failed pods remembered so that each is counted once, at most.
const MAX_COUNTED: usize = 256;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Memory {
    pub restarts: Restarts,
    /// Failures in a row that were not the application's.
    pub mishaps: u32,
    /// Pods whose end was counted.
    pub counted: BTreeSet<String>,
    /// The step that the training had reached at its last failure.
    pub step_at_failure: u64,
    pub last_incident_ms: Millis,
    /// No pod is made before.
    pub backoff_until_ms: Millis,
    pub last_failure: Option<Failure>,
    /// Given up: reason in one word, and a sentence.
    pub verdict: Option<(String, String)>,
    /// Ranks that hung, by pod: charged once it is known that their nodes live.
    pub hung: BTreeMap<String, Failure>,
    pub accounts: Accounts,
    /// Since when it has had fewer than `workers.min` pods with a node, and pods without.
    pub forming_since_ms: Option<Millis>,
    /// How often it gave its pods back since it last had enough.
    pub gave_back: u32,
    pub given_back: Option<GivenBack>,
    /// Moves to another pool that found no node there, in a row.
    pub moves_failed: u32,
    /// No pod is moved to another pool before.
    pub no_move_before_ms: Millis,
    /// The same of ranks that all share a node: that there is no other one says nothing of other pools.
    pub partings_failed: u32,
    pub no_parting_before_ms: Millis,
    /// The status with which the training ended, from when it was to be written: no other one may be, however late the
    /// cache shows it, and whether or not an answer came.
    pub ended: Option<VicunaTrainingStatus>,
    /// The status as we wrote it last, and when.
    pub written: Option<(VicunaTrainingStatus, Millis)>,
}

/// No pods until then, for the sake of other trainings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GivenBack {
    pub until_ms: Millis,
    /// It was the oldest, and lets younger ones try.
    pub as_the_oldest: bool,
}

impl Memory {
    /// What a new leader knows from the status.
    pub fn recall(training: &VicunaTraining) -> Self {
        let Some(status) = &training.status else { return Self::default() };
        Self {
            restarts: status.restarts.clone().unwrap_or_default(),
            step_at_failure: status.progress.as_ref().map_or(0, |progress| progress.step),
            last_failure: status.last_failure.clone(),
            accounts: Accounts::recall(status),
            ..Self::default()
        }
    }

    /// `false`: it was counted before.
    pub fn count(&mut self, incident: &str) -> bool {
        while self.counted.len() >= MAX_COUNTED {
            self.counted.pop_first();
        }
        self.counted.insert(incident.to_owned())
    }
}
