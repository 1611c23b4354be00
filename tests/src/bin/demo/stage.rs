//! The cluster with the product on it, and what every phase uses.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use vicuna_tests::cluster::{Cluster, ClusterOptions, repository, wait_for};
use vicuna_tests::product::{self, Bucket, Images, Objects, Prometheus};

use crate::report::Report;

pub const NAMESPACE: &str = "default";

pub struct Stage {
    pub cluster: Cluster,
    pub objects: Objects,
    pub gateway: SocketAddr,
}

impl Stage {
    pub fn build(name: &str, report: &mut Report) -> Result<Self> {
        report.phase("cluster", "A real Kubernetes: etcd, API server, controllers, DNS, S3, and three nodes");
        let cluster = Cluster::up(&ClusterOptions::named(name))?;
        report.say(&format!(
            "nodes\n{}",
            indent(&cluster.kubectl().text(&["get", "nodes", "--label-columns=vicuna.dev/capacity"])?)
        ));
        report.phase("install", "Images on the nodes; CRDs and operator by Helm");
        let images = Images::build()?;
        let [operator, runtime] = images.sizes_mb()?;
        report.say(&format!(
            "images: {} {operator:.0} MB, {} {runtime:.0} MB",
            images.operator.reference, images.runtime.reference
        ));
        report.note("image_megabytes", json!({"operator": operator.round(), "runtime": runtime.round()}));
        product::install(&cluster, &images)?;
        product::storage_secret(&cluster, NAMESPACE, product::STORAGE_SECRET)?;
        upload(&cluster)?;
        report.say("base model and conversations are in the bucket");
        let gateway = product::gateway(&cluster)?;
        let objects = Objects::new(cluster.kubectl(), NAMESPACE);
        Ok(Self { cluster, objects, gateway })
    }

    /// Applies a file of manifests/samples, as a user does.
    pub fn apply_sample(&self, file: &str, report: &Report) -> Result<()> {
        let path = repository().join("manifests/samples").join(file);
        report.say(&format!("kubectl apply -f manifests/samples/{file}"));
        self.cluster.kubectl().text(&["apply", "--server-side", "-f", &path.display().to_string()])?;
        Ok(())
    }

    pub fn say_how_to_look_around(&self) {
        println!("\n\u{25b8} The cluster is up. Look around:");
        println!("  export KUBECONFIG={}", self.cluster.kubeconfig_path().display());
        println!("  kubectl get vt,vs,pods -o wide");
        println!("  web page and OpenAI API: http://{}/", self.gateway);
        if let Ok(url) = self.cluster.prometheus() {
            println!("  Prometheus: {url}   (dashboard for Grafana: manifests/dashboards/vicuna.json)");
        }
        println!("  make demo-down removes every trace");
    }
}

fn upload(cluster: &Cluster) -> Result<()> {
    let bucket = Bucket::new(cluster.s3()?);
    bucket.put(&format!("models/{}", product::SMOLLM2), &product::smollm2()?)?;
    bucket.put("datasets/conversations.json", &repository().join("manifests/samples/data/conversations.json"))
}

pub fn indent(text: &str) -> String {
    text.trim_end().lines().map(|line| format!("           {line}")).collect::<Vec<_>>().join("\n")
}

/// The queries behind the dashboard's panels, asked of the real Prometheus.
pub fn ask_prometheus(stage: &Stage, report: &mut Report) -> Result<()> {
    report.phase("prometheus", "What Prometheus has seen (the dashboard's queries)");
    let prometheus = Prometheus { url: stage.cluster.prometheus()? };
    let queries = [
        ("progress_steps", "max_over_time(max(vicuna_operator_training_step)[20m:5s])"),
        ("last_loss", "last_over_time(vicuna_operator_training_loss[20m])"),
        ("reclaims", "sum(max_over_time(vicuna_operator_reclaims_total[20m]))"),
        (
            "recovery_seconds_mean",
            "sum(max_over_time(vicuna_operator_recovery_seconds_sum[20m])) / sum(max_over_time(vicuna_operator_recovery_seconds_count[20m]))",
        ),
        ("replicas_most", "max(max_over_time(vicuna_operator_serving_replicas{state=\"ready\",name=\"tuned\"}[20m]))"),
        ("training_tokens_per_second_peak", "max(max_over_time(vicuna_training_tokens_per_second[20m]))"),
        ("served_tokens", "sum(max_over_time(vicuna_gateway_tokens_total[20m]))"),
        ("resumed_streams", "sum(max_over_time(vicuna_gateway_resumes_total[20m]))"),
    ];
    let mut answers = serde_json::Map::new();
    for (name, query) in queries {
        let value = wait_for(&format!("Prometheus: {query}"), Duration::from_secs(30), || prometheus.value(query))?;
        report.say(&format!("{name:<32} {value:.3}"));
        answers.insert(name.to_owned(), json!(value));
    }
    report.note("prometheus", answers);
    Ok(())
}
