//! Another process of this program: its orders go to standard input, what it says last is kept.

use super::Size;
use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;

pub struct Process {
    child: Child,
    orders: ChildStdin,
    said: watch::Receiver<Value>,
}

/// What a process has used so far.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Cost {
    pub cpu_seconds: f64,
    pub peak_rss_mib: u64,
}

impl Process {
    /// Killed when it is dropped.
    pub fn start(size: &Size, arguments: &[&str]) -> Result<Self> {
        let Size { trainings, ranks, step_seconds, start_seconds, port } = size;
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--trainings", &trainings.to_string(), "--ranks", &ranks.to_string()])
            .args(["--step-seconds", &step_seconds.to_string(), "--start-seconds", &start_seconds.to_string()])
            .args(["--port", &port.to_string()])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let (orders, output) = (child.stdin.take().context("no input")?, child.stdout.take().context("no output")?);
        let (say, said) = watch::channel(Value::Null);
        tokio::spawn(async move {
            let mut lines = BufReader::new(output).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                match serde_json::from_str(&line) {
                    Ok(line) => drop(say.send(line)),
                    Err(_) => eprintln!("{line}"),
                }
            }
        });
        Ok(Self { child, orders, said })
    }

    /// The last line.
    pub fn said(&self) -> Value {
        self.said.borrow().clone()
    }

    pub async fn until(&mut self, what: &str, patience: Duration, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
        let said =
            tokio::time::timeout(patience, self.said.wait_for(is_it)).await.map(|said| said.map(|it| it.clone()));
        match said {
            Ok(Ok(said)) => Ok(said),
            Ok(Err(_)) => bail!("a process ended before it said: {what}"),
            Err(_) => bail!("a process did not say in time: {what}; its last words: {}", self.said()),
        }
    }

    pub async fn order(&mut self, order: &str) -> Result<()> {
        Ok(self.orders.write_all(format!("{order}\n").as_bytes()).await?)
    }

    pub async fn kill(&mut self) -> Result<()> {
        Ok(self.child.kill().await?)
    }

    pub fn cost(&self) -> Result<Cost> {
        let pid = self.child.id().context("the process is over")?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // After the name, which may hold anything: utime and stime are the 14th and 15th of all.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        let ticks: u64 = [11, 12].iter().filter_map(|field| fields.get(*field)?.parse::<u64>().ok()).sum();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok());
        let peak_kib: u64 = peak.context("no VmHWM")?;
        // USER_HZ is 100 on Linux.
        Ok(Cost { cpu_seconds: ticks as f64 / 100.0, peak_rss_mib: peak_kib / 1024 })
    }
}
