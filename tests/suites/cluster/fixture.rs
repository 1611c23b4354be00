//! One cluster with the product on it and a tiny model in its bucket.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use vicuna_tests::cluster::{Cluster, ClusterOptions, NodeOptions, repository};
use vicuna_tests::product::{self, Bucket, Images, Objects};

const NAME: &str = "suite";
pub const NAMESPACE: &str = "default";
/// Everything that should happen at once happens within this, on a machine with two busy cores.
pub const SOON: Duration = Duration::from_secs(120);
pub const TRAINED: Duration = Duration::from_secs(420);

pub struct Fixture {
    pub cluster: Cluster,
    pub images: Images,
    pub objects: Objects,
    pub bucket: Bucket,
    pub gateway: SocketAddr,
}

impl Fixture {
    pub fn up() -> Result<Self> {
        Self::up_with(&ClusterOptions::named(NAME), &[])
    }

    /// On nodes of these names, with values of the operator's chart.
    pub fn up_on(nodes: &[&str], values: &[&str]) -> Result<Self> {
        let nodes = nodes.iter().map(|node| NodeOptions::named(node)).collect();
        Self::up_with(&ClusterOptions { nodes, ..ClusterOptions::named(NAME) }, values)
    }

    fn up_with(options: &ClusterOptions, values: &[&str]) -> Result<Self> {
        Self::remove();
        let images = Images::build()?;
        let cluster = Cluster::up(&ClusterOptions { prometheus: false, ..options.clone() })?;
        product::install_with(&cluster, &images, values)?;
        product::storage_secret(&cluster, NAMESPACE, product::STORAGE_SECRET)?;
        let bucket = Bucket::new(cluster.s3()?);
        upload_model(&bucket)?;
        bucket.put("datasets/conversations.json", &repository().join("manifests/samples/data/conversations.json"))?;
        let gateway = product::gateway(&cluster)?;
        let objects = Objects::new(cluster.kubectl(), NAMESPACE);
        Ok(Self { cluster, images, objects, bucket, gateway })
    }

    pub fn down(self, failed: bool) {
        if failed && std::env::var_os("KEEP_CLUSTER").is_some() {
            println!("the cluster stays up: export KUBECONFIG={}", self.cluster.kubeconfig_path().display());
            return;
        }
        Self::remove();
    }

    pub fn remove() {
        if let Err(error) = Cluster::down(NAME, None) {
            println!("the cluster could not be taken down: {error:#}");
        }
    }

    /// What a person would look at first.
    pub fn evidence(&self) -> String {
        let mut told = String::new();
        let looks: [&[&str]; 4] = [
            &["get", "vt,vs,pods", "--output", "wide"],
            &["get", "pods", "--namespace", product::SYSTEM_NAMESPACE, "--output", "wide"],
            &["get", "events", "--sort-by=.lastTimestamp"],
            &["logs", "--namespace", product::SYSTEM_NAMESPACE, "deployment/vicuna-operator", "--tail=40"],
        ];
        for words in looks {
            told += &format!("$ kubectl {}\n", words.join(" "));
            told += &self.cluster.kubectl().text(words).unwrap_or_else(|error| format!("{error:#}"));
        }
        told
    }

    /// Applies an object as a user does; the error is what kubectl prints.
    pub fn apply(&self, object: &Value) -> Result<()> {
        self.cluster.kubectl().apply(&object.to_string())
    }

    pub fn delete(&self, kind: &str, name: &str) -> Result<()> {
        let words = ["delete", kind, name, "--namespace", NAMESPACE, "--ignore-not-found", "--timeout=60s"];
        let mut command = self.cluster.kubectl().command()?;
        command.arg("--request-timeout=90s").args(words);
        let output = command.output()?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    /// Whether an Event about the object with that reason has been written.
    pub fn wait_for_event(&self, name: &str, reason: &str) -> Result<()> {
        let selector = format!("involvedObject.name={name},reason={reason}");
        vicuna_tests::cluster::wait_for(&format!("an Event {reason} about {name}"), SOON, || {
            let words = ["get", "events", "--namespace", NAMESPACE, "--field-selector", &selector, "--output", "name"];
            Ok((!self.cluster.kubectl().text(&words)?.trim().is_empty()).then_some(()))
        })
    }
}

/// Where [`upload_model`] leaves the tiny model on the host.
pub fn tiny_model() -> PathBuf {
    repository().join("target/tiny-model")
}

fn upload_model(bucket: &Bucket) -> Result<()> {
    let folder = tiny_model();
    make_tiny(&folder, &[])?;
    put_folder(bucket, &folder, "models/tiny")
}

/// Writes the tiny model, or what `arguments` say, into a folder of the host.
pub fn make_tiny(folder: &Path, arguments: &[&str]) -> Result<()> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), PathBuf::from);
    let mut command = Command::new(target.join("release/vicuna-tiny-model"));
    let status = command.arg("--out").arg(folder).args(arguments).status();
    if !status.context("cannot start vicuna-tiny-model: cargo build --release --workspace --bins")?.success() {
        bail!("tiny-model failed");
    }
    Ok(())
}

/// Every file of a folder under a prefix of the bucket.
pub fn put_folder(bucket: &Bucket, folder: &Path, prefix: &str) -> Result<()> {
    for file in std::fs::read_dir(folder)?.flatten() {
        bucket.put(&format!("{prefix}/{}", file.file_name().to_string_lossy()), &file.path())?;
    }
    Ok(())
}

/// A training of the tiny model that lasts about a minute on one busy core.
pub fn training(name: &str, steps: u64) -> Value {
    json!({
        "apiVersion": "vicuna.dev/v1alpha1",
        "kind": "VicunaTraining",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "model": {"from": "s3://vicuna/models/tiny"},
            "dataset": [{"from": "s3://vicuna/datasets/conversations.json"}],
            "prepare": {"identity": {"name": "Vicky", "organization": "the vicuna-operator project"}},
            "recipe": {"globalBatch": 16, "microBatch": 4, "steps": steps, "learningRate": 1e-3, "maxLength": 256, "seed": 7},
            "workers": {"min": 1, "max": 2, "resources": {"requests": {"cpu": "200m", "memory": "256Mi"}}},
            "pools": [
                {"name": "spot", "capacity": "Spot", "nodeSelector": {"vicuna.dev/capacity": "spot"}, "notice": "10s"},
                {"name": "on-prem", "capacity": "OnPrem", "nodeSelector": {"vicuna.dev/capacity": "on-prem"}},
            ],
            "placement": {"stockOutAfter": "5s"},
            "checkpoint": {
                "to": format!("s3://vicuna/trainings/{name}"),
                "credentials": {"name": "vicuna-storage"},
                "interval": "20s",
                "keep": 3,
            },
        },
    })
}

/// A serving of one worker of the model below `from`.
pub fn serving(name: &str, from: &str) -> Value {
    json!({
        "apiVersion": "vicuna.dev/v1alpha1",
        "kind": "VicunaServing",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "model": {"from": {"uri": from}, "credentials": {"name": product::STORAGE_SECRET}},
            "replicas": 1,
            "worker": {"slots": 2, "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}}},
        },
    })
}
