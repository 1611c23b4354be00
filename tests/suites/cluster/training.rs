//! The first promise: a reclaim is invisible in the weights.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use vicuna_tests::product::{Objects, SYSTEM_NAMESPACE, field};

use crate::bad_input::set;
use crate::fixture::{Fixture, NAMESPACE, SOON, TRAINED, training};

const STEPS: u64 = 600;
const NOTICE: Duration = Duration::from_secs(10);

pub fn a_reclaimed_run_has_the_weights_of_an_undisturbed_one(fixture: &Fixture) -> Result<()> {
    let mut still = training("undisturbed", STEPS);
    set(&mut still, "/spec/workers/max", json!(1))?;
    set(
        &mut still,
        "/spec/pools",
        json!([{"name": "on-prem", "capacity": "OnPrem", "nodeSelector": {"vicuna.dev/capacity": "on-prem"}}]),
    )?;
    fixture.apply(&still)?;
    let undisturbed = finished(fixture, "undisturbed")?;
    fixture.apply(&training("reclaimed", STEPS))?;
    fixture.objects.wait("vicunatraining", "reclaimed", SOON, |vt| step(vt) > 0 && ready(vt) == 2)?;
    let victim = node_of_a_rank(fixture, "reclaimed")?;
    fixture.cluster.reclaim(&victim, NOTICE)?;
    let reclaimed = finished(fixture, "reclaimed")?;
    fixture.cluster.node_add(&fixture.cluster.known_node(&victim))?;
    let status = &reclaimed["status"];
    ensure!(status["disruptions"]["reclaims"] == 1, "one reclaim, not {:#}", status["disruptions"]);
    ensure!(status["disruptions"]["lostSteps"] == 0, "a step was lost: {:#}", status["disruptions"]);
    ensure!(status["restarts"]["application"].as_u64().unwrap_or(0) == 0, "a reclaim spent a retry: {status:#}");
    let digests = [&undisturbed, &reclaimed].map(|vt| field(vt, "status.result.digest").clone());
    ensure!(digests[0].is_string() && digests[0] == digests[1], "weights differ: {digests:?}");
    println!("  recovery {}", status["disruptions"]["lastRecovery"]);
    fixture.delete("vicunatraining", "undisturbed")
}

/// The node's cable is pulled: nothing is closed, nobody is told.
pub fn a_rank_that_is_cut_off_takes_no_step_with_it(fixture: &Fixture) -> Result<()> {
    fixture.apply(&training("cut-off", STEPS))?;
    fixture.objects.wait("vicunatraining", "cut-off", SOON, |vt| step(vt) > 0 && ready(vt) == 2)?;
    let victim = node_of_a_rank(fixture, "cut-off")?;
    fixture.cluster.cut(&victim)?;
    let done = finished(fixture, "cut-off");
    fixture.cluster.heal(&victim)?;
    let done = done?;
    let disruptions = &done["status"]["disruptions"];
    ensure!(disruptions["lostSteps"].as_u64().unwrap_or(0) == 0, "a completed step was lost: {disruptions:#}");
    ensure!(disruptions["lastRecovery"].is_string(), "it was never disturbed: {:#}", done["status"]);
    let reference = fixture.objects.get("vicunatraining", "reclaimed")?;
    let digests = [&done, &reference].map(|vt| field(vt, "status.result.digest").clone());
    ensure!(digests[0] == digests[1], "weights differ from the other run's: {digests:?}");
    println!("  recovery {}", disruptions["lastRecovery"]);
    vicuna_tests::cluster::wait_for("the node's return", SOON, || {
        let node = fixture.objects.get("node", &victim)?;
        Ok(Objects::condition(&node, "Ready", "True").then_some(()))
    })?;
    fixture.delete("vicunatraining", "cut-off")
}

pub fn a_suspended_training_gives_its_pods_back_and_goes_on(fixture: &Fixture) -> Result<()> {
    fixture.apply(&training("paused", STEPS))?;
    fixture.objects.wait("vicunatraining", "paused", SOON, |vt| step(vt) > 0)?;
    suspend(fixture, true)?;
    let paused =
        fixture.objects.wait("vicunatraining", "paused", SOON, |vt| Objects::condition(vt, "Suspended", "True"))?;
    ensure!(step(&paused) < STEPS, "the training was over before it could be suspended");
    vicuna_tests::cluster::wait_for("the pods' end", SOON, || {
        Ok(fixture.objects.list("pods", "vicuna.dev/training=paused")?.is_empty().then_some(()))
    })?;
    suspend(fixture, false)?;
    let done = finished(fixture, "paused")?;
    let reference = fixture.objects.get("vicunatraining", "reclaimed")?;
    let digests = [&done, &reference].map(|vt| field(vt, "status.result.digest").clone());
    ensure!(digests[0] == digests[1], "weights differ from the other run's: {digests:?}");
    fixture.delete("vicunatraining", "paused")
}

pub fn the_operators_restart_costs_no_step(fixture: &Fixture) -> Result<()> {
    fixture.apply(&training("orphan", STEPS))?;
    fixture.objects.wait("vicunatraining", "orphan", SOON, |vt| step(vt) > 0 && ready(vt) == 2)?;
    let words = [
        "delete",
        "pod",
        "--namespace",
        SYSTEM_NAMESPACE,
        "--selector",
        "app.kubernetes.io/component=operator",
        "--grace-period=0",
        "--force",
    ];
    fixture.cluster.kubectl().text(&words)?;
    let done = finished(fixture, "orphan")?;
    ensure!(done["status"]["disruptions"]["lostSteps"].as_u64().unwrap_or(0) == 0, "{:#}", done["status"]);
    fixture.delete("vicunatraining", "orphan")
}

fn suspend(fixture: &Fixture, value: bool) -> Result<()> {
    let patch = json!({"spec": {"suspend": value}}).to_string();
    let words = ["patch", "vicunatraining", "paused", "--namespace", NAMESPACE, "--type=merge", "--patch", &patch];
    fixture.cluster.kubectl().text(&words).map(drop)
}

fn finished(fixture: &Fixture, name: &str) -> Result<Value> {
    let done =
        fixture.objects.wait("vicunatraining", name, TRAINED, |vt| Objects::condition(vt, "Finished", "True"))?;
    if !Objects::condition(&done, "Complete", "True") {
        bail!("{name} failed: {:#}", done["status"]);
    }
    ensure!(step(&done) > 0, "{name} is complete without a step: {:#}", done["status"]);
    Ok(done)
}

fn step(training: &Value) -> u64 {
    field(training, "status.progress.step").as_u64().unwrap_or(0)
}

fn ready(training: &Value) -> u64 {
    field(training, "status.membership.ready").as_u64().unwrap_or(0)
}

fn node_of_a_rank(fixture: &Fixture, name: &str) -> Result<String> {
    let pods = fixture.objects.list("pods", &format!("vicuna.dev/training={name}"))?;
    let nodes = pods.iter().filter_map(|pod| pod["spec"]["nodeName"].as_str());
    nodes.map(str::to_owned).find(|node| node.starts_with("spot-")).context("no rank is on a spot node")
}
