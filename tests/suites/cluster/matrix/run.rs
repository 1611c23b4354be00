//! One training that something is done to, and what its status and Events tell of it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use vicuna_tests::cluster::wait_for;
use vicuna_tests::product::{Objects, SYSTEM_NAMESPACE, field};

use crate::bad_input::set;
use crate::fixture::{Fixture, NAMESPACE, training};

/// A machine with two cores that others use too may take this long for anything.
pub const PATIENCE: Duration = Duration::from_secs(300);
const LONGEST: Duration = Duration::from_secs(1500);

/// How the training of a row differs from the others'.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub steps: u64,
    pub min: u32,
    pub max: u32,
    pub notice_seconds: u64,
    /// The on-prem node may be used when spot nodes are gone.
    pub fallback: bool,
    /// Pools are these nodes, one each, in this order, instead.
    pub nodes: &'static [&'static str],
    pub interval_seconds: u64,
}

/// A training under way.
pub struct Run<'a> {
    pub fixture: &'a Fixture,
    pub name: String,
    pub shape: Shape,
}

/// A rank's pod.
#[derive(Debug, Clone)]
pub struct Rank {
    pub pod: String,
    pub uid: String,
    pub node: String,
    pub address: String,
}

/// One recovery, in seconds, as the operator's Event tells it.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Recovery {
    pub total: f64,
    pub notice: f64,
    pub agree: f64,
    pub state: f64,
    pub step: f64,
}

impl<'a> Run<'a> {
    /// Starts the training and waits until all its ranks train.
    pub fn start(fixture: &'a Fixture, name: &str, shape: Shape) -> Result<Self> {
        fixture.delete("vicunatraining", name)?;
        fixture.apply(&object(name, shape)?)?;
        let run = Self { fixture, name: name.to_owned(), shape };
        run.wait_for_ranks(shape.max)?;
        let ranks = run.ranks()?;
        let nodes: BTreeSet<&str> = ranks.iter().map(|rank| rank.node.as_str()).collect();
        ensure!(nodes.len() == ranks.len(), "ranks share a node, which one fault would take: {ranks:?}");
        Ok(run)
    }

    pub fn status(&self) -> Result<Value> {
        Ok(self.fixture.objects.get("vicunatraining", &self.name)?["status"].clone())
    }

    /// Waits until so many ranks have made a step together.
    pub fn wait_for_ranks(&self, ranks: u32) -> Result<()> {
        self.wait(&format!("{ranks} ranks"), |vt| {
            field(vt, "status.membership.ready") == ranks && step(vt) > 0 || is_over(vt)
        })?;
        self.must_run()
    }

    fn wait(&self, what: &str, ready: impl Fn(&Value) -> bool) -> Result<Value> {
        self.fixture
            .objects
            .wait("vicunatraining", &self.name, PATIENCE, ready)
            .with_context(|| format!("{}: waiting for {what}", self.name))
    }

    /// A fault that comes after the end tells nothing.
    pub fn must_run(&self) -> Result<()> {
        let over = is_over(&self.fixture.objects.get("vicunatraining", &self.name)?);
        ensure!(!over, "{} was over too early: give it more steps", self.name);
        Ok(())
    }

    /// The ranks whose pods run, those on spot nodes first.
    pub fn ranks(&self) -> Result<Vec<Rank>> {
        let pods = self.fixture.objects.list("pods", &format!("vicuna.dev/training={}", self.name))?;
        let mut ranks: Vec<Rank> = pods.iter().filter_map(rank).collect();
        ranks.sort_by_key(|rank| (!rank.node.starts_with("spot-"), rank.pod.clone()));
        Ok(ranks)
    }

    /// A rank on a spot node.
    pub fn victim(&self) -> Result<Rank> {
        let first = self.ranks()?.into_iter().find(|rank| rank.node.starts_with("spot-"));
        first.with_context(|| format!("no rank of {} is on a spot node", self.name))
    }

    pub fn generation(&self) -> Result<u64> {
        self.status()?["membership"]["generation"].as_u64().context("no generation yet")
    }

    pub fn recoveries(&self) -> Result<Vec<Recovery>> {
        let notes = self.notes("Recovered")?;
        Ok(notes.iter().filter_map(|note| recovery(note)).collect())
    }

    /// The notes of the Events of one reason about this training.
    pub fn notes(&self, reason: &str) -> Result<Vec<String>> {
        let selector = format!("involvedObject.name={},reason={reason}", self.name);
        let words = ["get", "events", "--namespace", NAMESPACE, "--field-selector", &selector, "--output", "json"];
        let listed: Value = serde_json::from_str(&self.fixture.cluster.kubectl().text(&words)?)?;
        let items = listed["items"].as_array().cloned().unwrap_or_default();
        Ok(items.iter().filter_map(|event| Some(event["message"].as_str()?.to_owned())).collect())
    }

    /// Waits until steps are made again, after `before` recoveries.
    pub fn wait_for_recovery(&self, before: usize) -> Result<()> {
        let recovered = wait_for(&format!("a recovery of {}", self.name), PATIENCE, || {
            // In this order: an Event may be written in the moment of the end.
            let over = is_over(&self.fixture.objects.get("vicunatraining", &self.name)?);
            let recovered = self.recoveries()?.len() > before;
            Ok((recovered || over).then_some(recovered))
        })
        .with_context(|| format!("status: {:#}", self.status().unwrap_or_default()))?;
        ensure!(recovered, "{} came to its end without a recovery: give it more steps", self.name);
        Ok(())
    }

    /// Waits until a later step than the present one is known.
    pub fn wait_for_progress(&self) -> Result<()> {
        let before = step(&self.fixture.objects.get("vicunatraining", &self.name)?);
        self.wait("another step", |vt| step(vt) > before || is_over(vt)).map(drop)
    }

    /// The status at the end, which is to be a good one.
    pub fn finish(&self) -> Result<Value> {
        let done = self.fixture.objects.wait("vicunatraining", &self.name, LONGEST, is_over)?;
        if !Objects::condition(&done, "Complete", "True") {
            bail!("{} failed: {:#}", self.name, done["status"]);
        }
        Ok(done["status"].clone())
    }
}

/// The pods of the operator, the leader first.
pub fn operators(fixture: &Fixture) -> Result<Vec<Rank>> {
    let words = ["get", "pods", "--namespace", SYSTEM_NAMESPACE, "--output", "json"];
    let selector = ["--selector", "app.kubernetes.io/component=operator"];
    let listed: Value = serde_json::from_str(&fixture.cluster.kubectl().text(&[&words[..], &selector[..]].concat())?)?;
    let holder = lease_holder(fixture)?;
    let mut pods: Vec<Rank> = listed["items"].as_array().into_iter().flatten().filter_map(rank).collect();
    pods.sort_by_key(|pod| !holder.starts_with(&format!("{}_", pod.pod)));
    Ok(pods)
}

pub fn lease_holder(fixture: &Fixture) -> Result<String> {
    let words = ["get", "lease", "vicuna-operator", "--namespace", SYSTEM_NAMESPACE];
    let path = ["--output", "jsonpath={.spec.holderIdentity}"];
    fixture.cluster.kubectl().text(&[&words[..], &path[..]].concat())
}

fn object(name: &str, shape: Shape) -> Result<Value> {
    let mut object = training(name, shape.steps);
    set(&mut object, "/spec/workers/min", json!(shape.min))?;
    set(&mut object, "/spec/workers/max", json!(shape.max))?;
    set(&mut object, "/spec/checkpoint/interval", json!(format!("{}s", shape.interval_seconds)))?;
    set(&mut object, "/spec/pools", pools(shape))?;
    set(&mut object, "/spec/placement", json!({"stockOutAfter": "5s", "returnAfter": "15s"}))?;
    Ok(object)
}

fn pools(shape: Shape) -> Value {
    let notice = format!("{}s", shape.notice_seconds);
    if !shape.nodes.is_empty() {
        let pool = |node: &&str| {
            let selector = json!({"kubernetes.io/hostname": node});
            json!({"name": node, "capacity": "Spot", "nodeSelector": selector, "notice": notice, "max": 1})
        };
        return shape.nodes.iter().map(pool).collect();
    }
    let spot = json!({"name": "spot", "capacity": "Spot", "nodeSelector": {"vicuna.dev/capacity": "spot"},
        "notice": notice, "max": 2});
    let own = json!({"name": "on-prem", "capacity": "OnPrem", "nodeSelector": {"vicuna.dev/capacity": "on-prem"}});
    if shape.fallback { json!([spot, own]) } else { json!([spot]) }
}

fn rank(pod: &Value) -> Option<Rank> {
    let text = |path: &str| field(pod, path).as_str().map(str::to_owned);
    let running = field(pod, "status.phase") == "Running" && pod["metadata"]["deletionTimestamp"].is_null();
    running.then_some(())?;
    Some(Rank {
        pod: text("metadata.name")?,
        uid: text("metadata.uid")?,
        node: text("spec.nodeName")?,
        address: text("status.podIP")?,
    })
}

pub fn step(training: &Value) -> u64 {
    field(training, "status.progress.step").as_u64().unwrap_or(0)
}

fn is_over(training: &Value) -> bool {
    Objects::condition(training, "Finished", "True")
}

/// The numbers of the sentence: the whole, then its four phases.
fn recovery(note: &str) -> Option<Recovery> {
    let numbers: Vec<f64> = note.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [_generation, total, notice, agree, state, step] = numbers[..] else { return None };
    Some(Recovery { total, notice, agree, state, step })
}
