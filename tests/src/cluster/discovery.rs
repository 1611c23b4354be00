//! Tells Prometheus which pods to scrape: Debian's build of it cannot ask Kubernetes itself.
//!
//! A detached process follows the pods and rewrites a target file, which Prometheus watches.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Deserializer, Value, json};

use super::forward::cluster_program;
use super::kubectl::Kubectl;
use super::layout::Layout;
use super::process::Process;

const ANNOTATION: &str = "prometheus.io";

pub fn start(layout: &Layout) -> Result<()> {
    fs::write(target_file(layout), "[]")?;
    let mut command = std::process::Command::new(cluster_program()?);
    command.arg("--name").arg(&layout.name).arg("--state").arg(&layout.root).arg("discover");
    Process::new(layout, "discover").start(&mut command, None)
}

pub fn target_file(layout: &Layout) -> PathBuf {
    layout.root.join("prometheus-targets.json")
}

/// Follows the pods until killed; a broken watch starts over from a fresh list.
pub fn serve(layout: &Layout) -> Result<()> {
    loop {
        if let Err(error) = follow(layout) {
            eprintln!("discovery: {error:#}");
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn follow(layout: &Layout) -> Result<()> {
    let mut command = Kubectl::of(layout).command()?;
    command.args(["get", "pods", "--all-namespaces", "--watch", "--output-watch-events", "--output=json"]);
    command.args(["--request-timeout=0"]).stdout(Stdio::piped());
    let mut child = command.spawn().context("cannot start kubectl")?;
    let output = child.stdout.take().context("kubectl has no standard output")?;
    let mut targets = BTreeMap::new();
    for event in Deserializer::from_reader(std::io::BufReader::new(output)).into_iter::<Value>() {
        let event = event?;
        let pod = &event["object"];
        let key = text(&pod["metadata"]["uid"]);
        let before = match target(pod) {
            Some(target) if event["type"] != "DELETED" => targets.insert(key.clone(), target),
            _ => targets.remove(&key),
        };
        if before.as_ref() != targets.get(&key) {
            write(layout, &targets)?;
        }
    }
    child.wait()?;
    Ok(())
}

fn write(layout: &Layout, targets: &BTreeMap<String, Value>) -> Result<()> {
    let file = target_file(layout);
    let draft = file.with_extension("draft");
    fs::write(&draft, serde_json::to_string(&targets.values().collect::<Vec<_>>())?)?;
    fs::rename(draft, file)?;
    Ok(())
}

/// The scrape target that a running pod asks for with the annotations scrape, scheme, path and port.
fn target(pod: &Value) -> Option<Value> {
    let annotation = |name: &str| pod["metadata"]["annotations"][format!("{ANNOTATION}/{name}")].as_str();
    let address = pod["status"]["podIP"].as_str()?;
    if annotation("scrape") != Some("true") || pod["status"]["phase"] != "Running" {
        return None;
    }
    let mut labels = pod_labels(pod);
    labels.insert("__scheme__".to_owned(), annotation("scheme").unwrap_or("http").to_owned());
    labels.insert("__metrics_path__".to_owned(), annotation("path").unwrap_or("/metrics").to_owned());
    labels.insert("namespace".to_owned(), text(&pod["metadata"]["namespace"]));
    labels.insert("pod".to_owned(), text(&pod["metadata"]["name"]));
    labels.insert("node".to_owned(), text(&pod["spec"]["nodeName"]));
    Some(json!({"targets": [format!("{address}:{}", annotation("port")?)], "labels": labels}))
}

/// The pod's labels under names that Prometheus allows.
fn pod_labels(pod: &Value) -> BTreeMap<String, String> {
    let allowed = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    let labels = pod["metadata"]["labels"].as_object().cloned().unwrap_or_default();
    labels.into_iter().map(|(key, value)| (key.chars().map(allowed).collect(), text(&value))).collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(phase: &str) -> Value {
        json!({
            "metadata": {"name": "gateway-0", "namespace": "default", "labels": {"app.kubernetes.io/name": "gateway"},
                "annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": "9000"}},
            "spec": {"nodeName": "spot-1"},
            "status": {"phase": phase, "podIP": "10.201.1.2"},
        })
    }

    #[test]
    fn a_running_pod_with_annotations_is_scraped() {
        let target = target(&pod("Running")).unwrap();
        assert_eq!(target["targets"], json!(["10.201.1.2:9000"]));
        assert_eq!(target["labels"]["__metrics_path__"], "/metrics");
        assert_eq!(target["labels"]["app_kubernetes_io_name"], "gateway");
    }

    #[test]
    fn a_pod_that_does_not_run_is_left_alone() {
        assert_eq!(target(&pod("Pending")), None);
    }
}
