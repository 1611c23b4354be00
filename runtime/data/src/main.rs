//! `vicuna-data`: cleans conversations, and shows what a training would see of them.

mod command;

use clap::Parser;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let done = command::run(command::Arguments::parse(), &mut out).and_then(|()| Ok(out.flush()?));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vicuna-data: {}", said(&error));
            ExitCode::FAILURE
        }
    }
}

/// Our own messages hold their source's already.
fn said(error: &anyhow::Error) -> String {
    let mut said = String::new();
    for part in error.chain().map(ToString::to_string) {
        if !said.contains(&part) {
            said = if said.is_empty() { part } else { format!("{said}: {part}") };
        }
    }
    said
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
