//! The product on a cluster, driven as its users drive it: Helm, kubectl, curl, and a bucket.

mod bucket;
mod chat;
mod faults;
mod install;
mod objects;
mod prometheus;
mod teacher;
mod variants;

pub use bucket::{Bucket, SMOLLM2, smollm2};
pub use chat::{Answer, Chat, Chunk, Stream, StreamEvent, post};
pub use faults::{Signal, Workers, signal_pod};
pub use install::{
    Images, STORAGE_SECRET, SYSTEM_NAMESPACE, gateway, install, install_operator, install_with, storage_secret,
};
pub use objects::{Objects, field};
pub use prometheus::Prometheus;
pub use teacher::{Forced, force};
pub use variants::{Asked, ENDS, References, Reply, ReplyChoice, VARIANTS, Variant};

/// Runs a command with a text on its standard input.
fn with_input(command: &mut std::process::Command, input: &str) -> anyhow::Result<std::process::Output> {
    use anyhow::Context;
    use std::io::Write;
    use std::process::Stdio;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    child.stdin.take().context("no standard input")?.write_all(input.as_bytes())?;
    Ok(child.wait_with_output()?)
}
