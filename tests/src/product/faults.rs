//! What happens to processes in real life.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

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

/// The workers of a model; the nodes' processes are this machine's.
#[derive(Debug)]
pub struct Workers(Vec<i32>);

impl Workers {
    pub fn of(model: &str) -> Result<Self> {
        let flag = format!("--model-name={model}");
        let of_model = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|word| word == flag.as_bytes())
        };
        let pids: Vec<i32> = all_pids()?.filter(of_model).collect();
        if pids.is_empty() {
            bail!("no worker of {model} runs on this machine");
        }
        Ok(Self(pids))
    }

    /// All at once, as an out-of-memory killer does: no notice, no grace.
    pub fn kill(&self) {
        send(&self.0, Signal::Kill);
    }

    /// Lets them work for moments only until `amid` is set, and kills them then: in the middle of what they do, however
    /// fast they are.
    pub fn kill_amid(&self, amid: &AtomicBool) {
        const WORK: Duration = Duration::from_millis(2);
        const REST: Duration = Duration::from_millis(10);
        while !amid.load(Ordering::Acquire) {
            send(&self.0, Signal::Continue);
            thread::sleep(WORK);
            send(&self.0, Signal::Stop);
            thread::sleep(REST);
        }
        self.kill();
    }
}
