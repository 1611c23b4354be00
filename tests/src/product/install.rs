//! Images on the nodes, charts by Helm, and the Secret that names the store's key.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::cluster::{Cluster, repository};

pub const SYSTEM_NAMESPACE: &str = "vicuna-system";

/// The images, as `tests/images/build.sh` makes them.
#[derive(Debug, Clone)]
pub struct Images {
    pub operator: Image,
    pub runtime: Image,
}

#[derive(Debug, Clone)]
pub struct Image {
    /// As `vicuna.dev/operator:TAG`.
    pub reference: String,
    pub archive: PathBuf,
}

impl Images {
    /// Builds what has changed since the last time.
    pub fn build() -> Result<Self> {
        let script = repository().join("tests/images/build.sh");
        let output = Command::new(&script).stderr(std::process::Stdio::inherit()).output()?;
        if !output.status.success() {
            bail!("{} failed", script.display());
        }
        let told = String::from_utf8(output.stdout)?;
        Ok(Self { operator: image(&told, "OPERATOR")?, runtime: image(&told, "RUNTIME")? })
    }

    /// Sizes of the archives in MB, operator's and runtime's.
    pub fn sizes_mb(&self) -> Result<[f64; 2]> {
        let size = |image: &Image| -> Result<f64> { Ok(fs::metadata(&image.archive)?.len() as f64 / 1e6) };
        Ok([size(&self.operator)?, size(&self.runtime)?])
    }
}

fn image(told: &str, name: &str) -> Result<Image> {
    let value = |key: &str| {
        let prefix = format!("{name}_{key}=");
        told.lines()
            .find_map(|line| line.strip_prefix(&prefix))
            .with_context(|| format!("build.sh did not print {prefix}"))
    };
    Ok(Image { reference: value("IMAGE")?.to_owned(), archive: value("TAR")?.into() })
}

/// Loads the images on every node and installs both charts.
pub fn install(cluster: &Cluster, images: &Images) -> Result<()> {
    install_with(cluster, images, &[])
}

/// The same with values of the chart, each as `key=value`.
pub fn install_with(cluster: &Cluster, images: &Images, values: &[&str]) -> Result<()> {
    cluster.load_image(&images.operator.archive, None)?;
    cluster.load_image(&images.runtime.archive, None)?;
    let charts = repository().join("charts");
    helm(cluster, "vicuna-operator-crds", &charts.join("vicuna-operator-crds"), &[])?;
    upgrade(cluster, &images.operator.reference, &images.runtime.reference, values)
}

/// Installs operator and gateway, or upgrades them to these images.
pub fn install_operator(cluster: &Cluster, operator: &str, runtime: &str) -> Result<()> {
    upgrade(cluster, operator, runtime, &[])
}

fn upgrade(cluster: &Cluster, operator: &str, runtime: &str, values: &[&str]) -> Result<()> {
    let mut values: Vec<String> = values.iter().map(ToString::to_string).collect();
    values.extend([format!("image.operator={operator}"), format!("image.runtime={runtime}")]);
    helm(cluster, "vicuna-operator", &repository().join("charts/vicuna-operator"), &values)
}

fn helm(cluster: &Cluster, release: &str, chart: &Path, values: &[String]) -> Result<()> {
    let mut command = Command::new("helm");
    command.env("KUBECONFIG", cluster.kubeconfig_path()).args(["upgrade", "--install", release]).arg(chart);
    command.args(["--namespace", SYSTEM_NAMESPACE, "--create-namespace", "--wait", "--timeout", "180s"]);
    for value in values {
        command.args(["--set", value]);
    }
    let output = command.output().context("cannot start helm")?;
    if !output.status.success() {
        bail!("helm could not install {release}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The Secret that the samples name.
pub const STORAGE_SECRET: &str = "vicuna-storage";

/// A Secret with what reaches the cluster's bucket.
pub fn storage_secret(cluster: &Cluster, namespace: &str, name: &str) -> Result<()> {
    let s3 = cluster.s3()?;
    let secret = json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace},
        "stringData": {
            "AWS_ACCESS_KEY_ID": s3.access_key,
            "AWS_SECRET_ACCESS_KEY": s3.secret_key,
            "AWS_ENDPOINT_URL": s3.pod_endpoint,
            "AWS_REGION": s3.region,
        },
    });
    cluster.kubectl().apply(&secret.to_string())
}

/// Where the host reaches the gateway's HTTP port.
pub fn gateway(cluster: &Cluster) -> Result<SocketAddr> {
    let words = ["get", "service", "vicuna-gateway", "--namespace", SYSTEM_NAMESPACE, "--output", "json"];
    let service: Value = serde_json::from_str(&cluster.kubectl().text(&words)?)?;
    let address = service["spec"]["clusterIP"].as_str().context("Service vicuna-gateway has no cluster IP")?;
    cluster.forward(format!("{address}:8080").parse()?)
}
