//! What happens to processes in real life.

use std::fs;

use anyhow::{Result, bail};

/// Kills every worker of a model at once, as an out-of-memory killer does: no notice, no grace. The nodes' processes
/// are this machine's.
pub fn kill_workers(model: &str) -> Result<()> {
    let flag = format!("--model-name={model}");
    let of_model = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|word| word == flag.as_bytes())
    };
    let all = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let victims: Vec<i32> = all.filter(of_model).collect();
    if victims.is_empty() {
        bail!("no worker of {model} runs on this machine");
    }
    for pid in victims {
        // Safety: a plain system call.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    Ok(())
}
