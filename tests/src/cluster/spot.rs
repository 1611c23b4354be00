//! The spot market's side of a node: the notice that it will be taken back.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;

use super::kubectl::Kubectl;

/// The taint with which the AWS node termination handler announces an interruption.
pub const RECLAIM_TAINT: &str = "aws-node-termination-handler/spot-itn";

/// Taints the node; the taint's value is the deadline in seconds since the epoch.
pub fn announce(kubectl: &Kubectl, node: &str, notice: Duration) -> Result<Instant> {
    let deadline = Instant::now() + notice;
    let told = (SystemTime::now() + notice).duration_since(UNIX_EPOCH)?.as_secs();
    kubectl.text(&["taint", "node", node, "--overwrite", &format!("{RECLAIM_TAINT}={told}:NoSchedule")])?;
    Ok(deadline)
}

pub fn withdraw(kubectl: &Kubectl, node: &str) -> Result<()> {
    kubectl.text(&["taint", "node", node, &format!("{RECLAIM_TAINT}-")]).map(drop)
}
