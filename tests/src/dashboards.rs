//! What dashboards and alerts ask Prometheus for is what the programs tell it.

use crate::cluster::repository;
use std::collections::BTreeSet;
use std::path::Path;

const SOURCES: [&str; 4] = [
    "operator/src/metrics.rs",
    "runtime/gateway/src/metrics.rs",
    "runtime/worker/src/metrics.rs",
    "runtime/trainer/src/metrics.rs",
];
/// What Prometheus adds to the name of a histogram.
const OF_HISTOGRAMS: [&str; 3] = ["_bucket", "_sum", "_count"];

fn read(path: &str) -> String {
    std::fs::read_to_string(repository().join(Path::new(path))).unwrap()
}

/// Words that look like one of our metrics.
fn metrics(text: &str) -> BTreeSet<String> {
    let words = text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    let prefixes = ["vicuna_operator_", "vicuna_gateway_", "vicuna_worker_", "vicuna_checkpoint_"];
    words.filter(|word| prefixes.iter().any(|prefix| word.starts_with(prefix))).map(str::to_owned).collect()
}

#[test]
fn dashboards_and_alerts_name_metrics_that_exist() {
    let source: String = SOURCES.map(read).concat();
    let exists = |name: &str| {
        let bare = OF_HISTOGRAMS.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        let short = bare.trim_start_matches("vicuna_operator_");
        [name, bare, short].iter().any(|name| source.contains(&format!("\"{name}\"")))
    };
    let asked = metrics(&[read("manifests/dashboards/vicuna.json"), read("manifests/alerts/vicuna.yaml")].concat());
    assert!(asked.len() > 20, "{asked:?}");
    let missing: Vec<_> = asked.iter().filter(|name| !exists(name)).collect();
    assert!(missing.is_empty(), "no program tells {missing:?}");
}
