//! What happens to processes in real life.

use std::fs;

use anyhow::{Result, bail};

/// What a process is told by the kernel, unasked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    Kill,
    /// It stays, keeps its connections, and does nothing.
    Stop,
    Continue,
}

impl Signal {
    fn number(self) -> libc::c_int {
        match self {
            Self::Kill => libc::SIGKILL,
            Self::Stop => libc::SIGSTOP,
            Self::Continue => libc::SIGCONT,
        }
    }
}

/// Signals every process of a pod's containers, by the pod's UID; the sandbox itself stays.
pub fn signal_pod(uid: &str, signal: Signal) -> Result<()> {
    let mark = format!("pod{uid}");
    let of_pod = |pid: &i32| {
        let text = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        text("cgroup").contains(&mark) && !text("comm").starts_with("pause")
    };
    let victims: Vec<i32> = all_pids()?.filter(of_pod).collect();
    if victims.is_empty() {
        bail!("no process of pod {uid} runs on this machine");
    }
    send(&victims, signal);
    Ok(())
}

fn all_pids() -> Result<impl Iterator<Item = i32>> {
    Ok(fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()))
}

fn send(pids: &[i32], signal: Signal) {
    for pid in pids {
        // Safety: a plain system call.
        unsafe { libc::kill(*pid, signal.number()) };
    }
}

/// Kills every worker of a model at once, as an out-of-memory killer does: no notice, no grace. The nodes' processes
/// are this machine's.
pub fn kill_workers(model: &str) -> Result<()> {
    let flag = format!("--model-name={model}");
    let of_model = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|word| word == flag.as_bytes())
    };
    let victims: Vec<i32> = all_pids()?.filter(of_model).collect();
    if victims.is_empty() {
        bail!("no worker of {model} runs on this machine");
    }
    send(&victims, Signal::Kill);
    Ok(())
}
