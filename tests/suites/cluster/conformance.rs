//! A real API server does what the simulated one does.

use crate::fixture::Fixture;
use anyhow::{Context, Result, bail};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use vicuna_tests::conformance;

pub fn the_api_server_does_what_the_operator_relies_on(fixture: &Fixture) -> Result<()> {
    // A second provider anywhere in the process is a programming error; the first one stays.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let results = runtime.block_on(async {
        let kubeconfig = Kubeconfig::read_from(fixture.cluster.kubeconfig_path())?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        let client = Client::try_from(config).context("no client for the cluster's kubeconfig")?;
        anyhow::Ok(conformance::run(client).await)
    })?;
    let told: Vec<String> =
        results.iter().filter_map(|(name, result)| Some(format!("{name}: {:#}", result.as_ref().err()?))).collect();
    if !told.is_empty() {
        bail!("{}", told.join("\n"));
    }
    Ok(())
}
