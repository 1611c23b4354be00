//! What one reconciliation of a training leaves for the next. The rest is in the API server.

use crate::coordinator::membership::Millis;
use std::collections::BTreeSet;
use vicuna_crds::training::Failure;
use vicuna_crds::{VicunaTraining, VicunaTrainingStatus};

/// Failed pods remembered so that each is counted once, at most.
const MAX_COUNTED: usize = 256;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Memory {
    /// Application failures since progress was last made.
    pub restarts: u32,
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
    /// The status as we wrote it last, and when.
    pub written: Option<(VicunaTrainingStatus, Millis)>,
}

impl Memory {
    /// What a new leader knows from the status.
    pub fn recall(training: &VicunaTraining) -> Self {
        let Some(status) = &training.status else { return Self::default() };
        Self {
            restarts: status.restarts.as_ref().map_or(0, |restarts| restarts.application),
            step_at_failure: status.progress.as_ref().map_or(0, |progress| progress.step),
            last_failure: status.last_failure.clone(),
            ..Self::default()
        }
    }

    /// `false`: it was counted before.
    pub fn count(&mut self, pod_uid: &str) -> bool {
        while self.counted.len() >= MAX_COUNTED {
            self.counted.pop_first();
        }
        self.counted.insert(pod_uid.to_owned())
    }
}
