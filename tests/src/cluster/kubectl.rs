//! kubectl as the administrator of the cluster, from the host.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::layout::{Layout, program};
use super::process::{checked, run};

#[derive(Debug, Clone)]
pub struct Kubectl {
    kubeconfig: PathBuf,
}

impl Kubectl {
    pub fn of(layout: &Layout) -> Self {
        Self { kubeconfig: layout.kubeconfig() }
    }

    /// A command to add words to.
    pub fn command(&self) -> Result<Command> {
        let mut command = Command::new(program("kubectl")?);
        command.arg("--kubeconfig").arg(&self.kubeconfig).arg("--request-timeout=20s");
        Ok(command)
    }

    pub fn text(&self, words: &[&str]) -> Result<String> {
        run(self.command()?.args(words))
    }

    /// Applies a manifest in YAML or JSON by server-side apply.
    pub fn apply(&self, manifest: &str) -> Result<()> {
        let mut command = self.command()?;
        command.args(["apply", "--server-side", "--force-conflicts", "-f", "-"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start kubectl")?;
        child.stdin.take().context("kubectl has no standard input")?.write_all(manifest.as_bytes())?;
        checked(&command, child.wait_with_output()?).map(drop)
    }
}
