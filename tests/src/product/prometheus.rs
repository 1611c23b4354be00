//! Instant queries to a Prometheus server.

use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

#[derive(Debug, Clone)]
pub struct Prometheus {
    pub url: String,
}

impl Prometheus {
    /// The first value of a query; nothing when no series matches.
    pub fn value(&self, query: &str) -> Result<Option<f64>> {
        let output = Command::new("curl")
            .args(["--silent", "--show-error", "--fail-with-body", "--max-time", "10", "--get"])
            .args(["--data-urlencode", &format!("query={query}")])
            .arg(format!("{}/api/v1/query", self.url))
            .output()?;
        let told: Value =
            serde_json::from_slice(&output.stdout).with_context(|| format!("Prometheus did not answer {query}"))?;
        let first = told["data"]["result"].get(0).and_then(|series| series["value"][1].as_str());
        Ok(first.map(str::parse).transpose()?)
    }
}
