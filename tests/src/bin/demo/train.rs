//! The training: two ranks on two spot nodes, one of which is taken back.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use vicuna_tests::product::{Objects, field};

use crate::report::Report;
use crate::stage::{NAMESPACE, Stage};

const NAME: &str = "identity";
const SAMPLE: &str = "training.yaml";
/// Half of what the largest provider gives: a checkpoint of 1.6 GB has to be written in it, on two busy cores.
const NOTICE: Duration = Duration::from_secs(60);
const LONGEST: Duration = Duration::from_secs(1500);
const POLL: Duration = Duration::from_millis(500);

/// Applies the sample, watches it, takes one spot node away on the way, and waits for the end.
pub fn with_a_reclaim(stage: &Stage, report: &mut Report) -> Result<()> {
    report.phase("train", "VicunaTraining `identity`: SmolLM2-135M-Instruct learns who it is, two ranks on spot nodes");
    stage.apply_sample(SAMPLE, report)?;
    let mut watch = Watch::default();
    let early = follow(stage, report, &mut watch, |vt| {
        let steps = number(vt, "status.progress.steps");
        steps > 0 && number(vt, "status.progress.step") * 3 >= steps
    })?;
    let victim = a_spot_node_of_a_rank(stage)?;
    report.phase("reclaim", &format!("The provider takes {victim} back, with {} s notice", NOTICE.as_secs()));
    report.note("reclaimed_at_step", number(&early, "status.progress.step"));
    let deadline = stage.cluster.notice(&victim, NOTICE)?;
    follow(stage, report, &mut watch, |_| Instant::now() >= deadline)?;
    stage.cluster.kill(&victim, true)?;
    report.say(&format!("{victim} is gone: kubelet, containerd, every process, and its Node object"));
    let done = follow(stage, report, &mut watch, |vt| Objects::condition(vt, "Finished", "True"))?;
    print_events(stage, report)?;
    conclude(&done, report)?;
    stage.cluster.node_add(&stage.cluster.known_node(&victim))?;
    report.say(&format!("a new {victim} has joined"));
    Ok(())
}

fn conclude(done: &Value, report: &mut Report) -> Result<()> {
    if !Objects::condition(done, "Complete", "True") {
        bail!("the training failed: {:#}", done["status"]);
    }
    let status = &done["status"];
    report.note("steps", status["progress"]["step"].clone());
    report.note("loss", status["progress"]["loss"].clone());
    report.note("lost_steps", status["disruptions"]["lostSteps"].clone());
    report.note("reclaims", status["disruptions"]["reclaims"].clone());
    report.note("recovery_seconds", status["disruptions"]["lastRecovery"].clone());
    report.note("generations", status["membership"]["generation"].clone());
    report.note("final_digest", status["result"]["digest"].clone());
    report.note("result_uri", status["result"]["uri"].clone());
    Ok(())
}

/// The same job under another name and prefix, with nobody disturbing it.
pub fn undisturbed(stage: &Stage, report: &mut Report) -> Result<()> {
    report.phase("undisturbed", "The same training once more, undisturbed, to compare the weights");
    let told = stage.objects.get("vicunatraining", NAME)?;
    let mut copy = json!({"apiVersion": told["apiVersion"], "kind": told["kind"], "spec": told["spec"],
        "metadata": {"name": "undisturbed", "namespace": NAMESPACE}});
    copy["spec"]["checkpoint"]["to"] = json!("s3://vicuna/trainings/undisturbed");
    stage.cluster.kubectl().apply(&copy.to_string())?;
    let done = stage
        .objects
        .wait("vicunatraining", "undisturbed", LONGEST, |vt| Objects::condition(vt, "Finished", "True"))?;
    let [ours, theirs] = [&told, &done].map(|vt| vt["status"]["result"]["digest"].clone());
    report.note("undisturbed_digest", theirs.clone());
    report.say(&format!("weights equal, bit for bit: {}", ours == theirs));
    if ours != theirs {
        bail!("the reclaimed run's weights {ours} differ from the undisturbed run's {theirs}");
    }
    Ok(())
}

#[derive(Default)]
struct Watch {
    line: String,
    pods: String,
}

/// Prints progress as it moves until `enough`.
fn follow(stage: &Stage, report: &Report, watch: &mut Watch, enough: impl Fn(&Value) -> bool) -> Result<Value> {
    let started = Instant::now();
    loop {
        let training = stage.objects.get("vicunatraining", NAME)?;
        watch.show(stage, report, &training)?;
        if enough(&training) {
            return Ok(training);
        }
        if Objects::condition(&training, "Failed", "True") || started.elapsed() > LONGEST {
            bail!("the training does not get there: {:#}", training["status"]);
        }
        std::thread::sleep(POLL);
    }
}

impl Watch {
    fn show(&mut self, stage: &Stage, report: &Report, training: &Value) -> Result<()> {
        let pods = pods_line(stage)?;
        if pods != self.pods {
            report.say(&format!("pods   {pods}"));
            self.pods = pods;
        }
        let line = progress_line(training);
        if line != self.line {
            report.say(&line);
            self.line = line;
        }
        Ok(())
    }
}

fn progress_line(training: &Value) -> String {
    let progress = &training["status"]["progress"];
    let float = |name: &str| progress[name].as_f64().unwrap_or(0.0);
    format!(
        "{:<11} generation {}  step {:>3}/{:<3}  loss {:<7.4} {:>6.0} tokens/s",
        training["status"]["state"].as_str().unwrap_or("New"),
        field(training, "status.membership.generation").as_u64().unwrap_or(0),
        number(training, "status.progress.step"),
        number(training, "status.progress.steps"),
        float("loss"),
        float("tokensPerSecond"),
    )
}

fn pods_line(stage: &Stage) -> Result<String> {
    let pods = stage.objects.list("pods", &format!("vicuna.dev/training={NAME}"))?;
    let lines = pods.iter().map(|pod| {
        let leaving = if pod["metadata"]["deletionTimestamp"].is_string() { ", leaving" } else { "" };
        let [name, node, phase] = ["metadata.name", "spec.nodeName", "status.phase"].map(|path| text(pod, path));
        format!("{name} ({node}, {phase}{leaving})")
    });
    Ok(lines.collect::<Vec<_>>().join("  "))
}

fn a_spot_node_of_a_rank(stage: &Stage) -> Result<String> {
    let pods = stage.objects.list("pods", &format!("vicuna.dev/training={NAME}"))?;
    let mut nodes: Vec<_> = pods.iter().map(|pod| text(pod, "spec.nodeName")).collect();
    nodes.sort();
    nodes.into_iter().find(|node| node.starts_with("spot-")).context("no rank runs on a spot node")
}

fn print_events(stage: &Stage, report: &Report) -> Result<()> {
    let selector = format!("involvedObject.name={NAME}");
    let words = ["get", "events", "--namespace", NAMESPACE, "--field-selector", &selector, "--output", "json"];
    let events: Value = serde_json::from_str(&stage.cluster.kubectl().text(&words)?)?;
    report.say("what the operator did (Events):");
    for event in events["items"].as_array().into_iter().flatten() {
        println!("           {:<22} {}", text(event, "reason"), text(event, "message"));
    }
    Ok(())
}

fn number(object: &Value, path: &str) -> u64 {
    field(object, path).as_u64().unwrap_or(0)
}

fn text(object: &Value, path: &str) -> String {
    field(object, path).as_str().unwrap_or("-").to_owned()
}
