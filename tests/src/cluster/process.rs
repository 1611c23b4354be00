//! Long-lived processes: started detached with a log and a pid file, found again, and ended for certain.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::layout::Layout;
use super::network;

const POLL: Duration = Duration::from_millis(50);

/// Waits until `ready` gives a value; `what` names it in the error.
pub fn wait_for<T>(what: &str, limit: Duration, mut ready: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let started = Instant::now();
    let mut last_error = None;
    while started.elapsed() < limit {
        match ready() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => last_error = None,
            Err(error) => last_error = Some(error),
        }
        std::thread::sleep(POLL);
    }
    match last_error {
        Some(error) => Err(error.context(format!("{what}: not there after {limit:?}"))),
        None => bail!("{what}: not there after {limit:?}"),
    }
}

/// Runs a short command to its end and gives its standard output.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {}", show(command)))?;
    checked(command, output)
}

pub fn checked(command: &Command, output: Output) -> Result<String> {
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stderr);
        bail!("{} failed ({}): {}", show(command), output.status, told.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// A process of the cluster, known by its pid file.
#[derive(Debug, Clone)]
pub struct Process {
    pid_file: PathBuf,
    log: PathBuf,
}

impl Process {
    pub fn new(layout: &Layout, name: &str) -> Self {
        Self { pid_file: layout.processes().join(name), log: layout.logs().join(format!("{name}.log")) }
    }

    pub fn all(layout: &Layout) -> Vec<Self> {
        let Ok(entries) = fs::read_dir(layout.processes()) else { return Vec::new() };
        entries.flatten().map(|entry| Self::new(layout, &entry.file_name().to_string_lossy())).collect()
    }

    /// Starts the command in a session of its own, in `namespace` where one is given.
    pub fn start(&self, command: &mut Command, namespace: Option<&str>) -> Result<()> {
        let log = File::options().create(true).append(true).open(&self.log)?;
        let network = namespace.map(network::open_namespace).transpose()?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // Safety: between fork and exec only async-signal-safe system calls are made.
        unsafe {
            command.pre_exec(move || {
                if libc::setsid() < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                match &network {
                    Some(file) if libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) < 0 => {
                        Err(std::io::Error::last_os_error())
                    }
                    _ => Ok(()),
                }
            });
        }
        let child = command.spawn().with_context(|| format!("cannot start {}", show(command)))?;
        let pid = child.id();
        let born =
            birth(pid).with_context(|| format!("{} ended at once: see {}", show(command), self.log.display()))?;
        fs::write(&self.pid_file, format!("{pid} {born}"))?;
        // A long-lived caller would otherwise keep a zombie of every process that ends.
        std::thread::spawn(move || {
            let mut child = child;
            child.wait()
        });
        Ok(())
    }

    /// The pid while the process lives. The time of birth tells it from a later process with the same pid.
    pub fn pid(&self) -> Option<u32> {
        let record = fs::read_to_string(&self.pid_file).ok()?;
        let (pid, born) = record.split_once(' ')?;
        let pid = pid.parse().ok()?;
        (birth(pid)?.to_string() == born).then_some(pid)
    }

    /// Kills at once, children first: the child of a node's process is the first of its pid namespace, and its
    /// parent can be gone only when everything in that namespace is.
    pub fn kill(&self) -> Result<()> {
        if let Some(pid) = self.pid() {
            for victim in children(pid).into_iter().chain([pid]) {
                // Safety: a plain system call.
                unsafe { libc::kill(victim as libc::pid_t, libc::SIGKILL) };
            }
            wait_for("the end of a killed process", Duration::from_secs(20), || {
                Ok(self.pid().is_none().then_some(()))
            })?;
        }
        let _ = fs::remove_file(&self.pid_file);
        Ok(())
    }

    /// The last lines of the log, for an error message.
    pub fn told(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(8)..].join("\n");
        format!("last lines of {}:\n{tail}", self.log.display())
    }
}

/// The start time of a live process, in clock ticks since boot; nothing for a dead one or a zombie.
fn birth(pid: u32) -> Option<u64> {
    let fields = stat(pid)?;
    (fields[0] != "Z" && fields[0] != "X").then(|| fields[19].parse().ok())?
}

fn parent(pid: u32) -> Option<u32> {
    stat(pid)?[1].parse().ok()
}

/// The fields of /proc/PID/stat from the state on.
fn stat(pid: u32) -> Option<Vec<String>> {
    let line = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<String> = line.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect();
    (fields.len() > 20).then_some(fields)
}

fn children(pid: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|candidate| parent(*candidate) == Some(pid))
        .collect()
}
