//! design.md's invariants, looked at after each write to the API server and by each rank that hears something.

use super::{NAME, NAMESPACE, STEPS, WORKERS_MAX};
use crate::coordinator::manifest::{Manifest, is_void};
use crate::coordinator::record::Record;
use parking_lot::Mutex;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use vicuna_protocol::coordinator as wire;
use vicuna_tests::api_server::Store;

/// Pods of one training: as many as it may have, as many to take over, and those that are on their way out.
const MAX_PODS: usize = 4 * WORKERS_MAX;
const MAX_HISTORY: usize = 256;

/// What has been seen so far, and what should not have been. Cheap to clone; all clones are one.
#[derive(Clone, Default)]
pub struct Watchdog(Arc<Mutex<Seen>>);

#[derive(Default)]
struct Seen {
    violations: Vec<String>,
    /// All that were ever swapped in.
    records: BTreeMap<u64, Record>,
    newest: Option<Record>,
    status: Value,
    /// Manifests that were ever written.
    manifests: BTreeSet<Manifest>,
    /// Ranks that failed by themselves.
    crashes: u64,
}

impl Watchdog {
    /// What was broken first, with its invariant's name.
    pub fn violation(&self) -> Option<String> {
        self.0.lock().violations.first().cloned()
    }

    pub fn broken(&self, invariant: &str, how: impl std::fmt::Display) {
        self.0.lock().broken(invariant, how);
    }

    pub fn manifest_written(&self, manifest: Manifest) {
        self.0.lock().manifests.insert(manifest);
    }

    pub fn crashed(&self) {
        self.0.lock().crashes += 1;
    }

    /// Only whose lease it is sends anything that changes something.
    pub fn is_written_by(&self, store: &Store, writer: &str) {
        let lease = store.objects("Lease").next();
        let holder = lease.and_then(|(_, lease)| lease["spec"]["holderIdentity"].as_str()).unwrap_or_default();
        if holder != writer {
            self.broken("one leader writes", format!("{writer} writes while the lease is {holder}'s"));
        }
    }

    /// After each write.
    pub fn look(&self, store: &Store) {
        let mut seen = self.0.lock();
        if let Some(record) = record(store) {
            seen.see_record(record);
        }
        if let Some(training) = store.find("VicunaTraining", NAMESPACE, NAME) {
            seen.see_status(&training["status"]);
        }
        let pods = store.objects("Pod").count();
        if pods > MAX_PODS {
            seen.broken("nothing grows without bound", format!("{pods} pods"));
        }
    }

    /// No rank hears of a generation that was not recorded just so.
    pub fn formed(&self, form: &wire::Form) {
        let mut seen = self.0.lock();
        let members = |record: &Record| record.members.iter().map(|member| member.pod_uid.clone()).collect::<Vec<_>>();
        let heard: Vec<String> = form.members.iter().map(|member| member.pod_uid.clone()).collect();
        let is_so = seen.records.get(&form.generation).is_some_and(|record| {
            let base = form.base.clone().map(Manifest::from);
            members(record) == heard
                && record.base_step == form.base_step
                && record.base == base
                && record.in_memory == form.memory.is_some()
        });
        if !is_so {
            seen.broken("at most one generation makes progress", format!("not recorded so: {form:?}"));
        }
    }

    /// All members make the first step of a generation from where it was recorded to start.
    pub fn goes(&self, form: &wire::Form, step: u64) {
        if step != form.base_step {
            let how = format!("generation {} starts at {} and a rank at {step}", form.generation, form.base_step);
            self.broken("a step is counted once", how);
        }
    }
}

impl Seen {
    fn broken(&mut self, invariant: &str, how: impl std::fmt::Display) {
        self.violations.push(format!("{invariant}: {how}"));
    }

    fn see_record(&mut self, record: Record) {
        if self.newest.as_ref() == Some(&record) {
            return;
        }
        let before = self.newest.replace(record.clone());
        let last = before.as_ref().map_or(0, |before| before.generation);
        let ended = before.as_ref().is_some_and(|before| before.finish.is_some());
        if ended {
            self.broken("a terminal state stays terminal", format!("generation {} after the end", record.generation));
        }
        if record.history.len() > MAX_HISTORY {
            self.broken("nothing grows without bound", format!("a history of {}", record.history.len()));
        }
        if let Some(finish) = &record.finish {
            if record.generation != last || finish.step != STEPS {
                let how = format!("{finish:?} of generation {} after {last}", record.generation);
                self.broken("a step is counted once", how);
            }
            return;
        }
        if record.generation != last + 1 {
            let how = format!("generation {} follows {last}", record.generation);
            self.broken("at most one generation makes progress", how);
        }
        let unique: BTreeSet<&str> = record.members.iter().map(|member| member.pod_uid.as_str()).collect();
        if unique.is_empty() || unique.len() != record.members.len() {
            self.broken("at most one generation makes progress", format!("members {:?}", record.members));
        }
        if let Some(base) = &record.base {
            let history = before.as_ref().map_or(&[][..], |before| &before.history);
            if !self.manifests.contains(base) || is_void(base, history) || base.step != record.base_step {
                self.broken("no manifest names what is not there", format!("{base:?} is no base"));
            }
        }
        self.records.insert(record.generation, record);
    }

    fn see_status(&mut self, status: &Value) {
        if self.status == *status {
            return;
        }
        let before = std::mem::replace(&mut self.status, status.clone());
        let is_over = |status: &Value| condition(status, "Finished") == Some("True");
        if is_over(&before) {
            self.broken("a terminal state stays terminal", format!("{status} after {before}"));
        }
        let number = |status: &Value, path: &[&str]| {
            path.iter().fold(status, |value, name| &value[*name]).as_u64().unwrap_or_default()
        };
        let never_fall: [&[&str]; 8] = [
            &["disruptions", "notices"],
            &["disruptions", "reclaims"],
            &["disruptions", "lostSteps"],
            &["restarts", "application"],
            &["restarts", "infrastructure"],
            &["workerTime", "heldSeconds"],
            &["workerTime", "advancedSeconds"],
            &["membership", "generation"],
        ];
        for path in never_fall {
            let (was, is) = (number(&before, path), number(status, path));
            if is < was {
                self.broken("one writer per field", format!("{} fell from {was} to {is}", path.join(".")));
            }
        }
        if number(status, &["restarts", "application"]) > self.crashes {
            self.broken(
                "a reclaim never spends a retry",
                format!("{} for {} crashes", status["restarts"], self.crashes),
            );
        }
        if number(status, &["progress", "step"]) > STEPS {
            self.broken("a step is counted once", status["progress"].to_string());
        }
        if condition(status, "Failed") == Some("True") {
            self.broken("a reclaim never spends a retry", format!("the training failed: {status}"));
        }
        let finished = self.newest.as_ref().is_some_and(|record| record.finish.is_some());
        if condition(status, "Complete") == Some("True") && !finished {
            self.broken("a terminal state stays terminal", "complete without a result");
        }
    }
}

fn record(store: &Store) -> Option<Record> {
    let map = store.find("ConfigMap", NAMESPACE, &format!("{NAME}-membership"))?;
    let envelope: Value = serde_json::from_str(map["data"]["record"].as_str()?).ok()?;
    serde_json::from_value(envelope["record"].clone()).ok()
}

pub fn condition<'a>(status: &'a Value, kind: &str) -> Option<&'a str> {
    let conditions = status["conditions"].as_array()?;
    conditions.iter().find(|condition| condition["type"] == kind)?["status"].as_str()
}
