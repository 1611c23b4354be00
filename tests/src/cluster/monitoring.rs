//! Prometheus beside the control plane: scrapes the pods that ask for it by annotation.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::control_plane::start;
use super::discovery;
use super::layout::{CONTROL_PLANE_IP, Layout};

pub const PROMETHEUS_PORT: u16 = 9090;

pub fn start_prometheus(layout: &Layout, rules: &[PathBuf]) -> Result<()> {
    discovery::start(layout)?;
    let config = layout.root.join("prometheus.json");
    fs::write(&config, config_text(layout, rules)?)?;
    let flags = [
        format!("--config.file={}", config.display()),
        format!("--storage.tsdb.path={}", layout.root.join("prometheus").display()),
        format!("--web.listen-address={CONTROL_PLANE_IP}:{PROMETHEUS_PORT}"),
        "--web.enable-lifecycle".into(),
        "--log.level=warn".into(),
    ];
    start(layout, "prometheus", &flags)
}

fn config_text(layout: &Layout, rules: &[PathBuf]) -> Result<String> {
    let config = json!({
        "global": {"scrape_interval": "5s", "evaluation_interval": "5s"},
        "rule_files": rules,
        // The operator speaks of objects in other namespaces than its own: its labels win.
        "scrape_configs": [{"job_name": "pods", "honor_labels": true,
            "file_sd_configs": [{"files": [discovery::target_file(layout)]}]}],
    });
    Ok(serde_json::to_string_pretty(&config)?)
}
