//! `vicuna-worker`: see the library.

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let options = vicuna_worker::Options::parse();
    match vicuna_worker::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        // Logged, and left as the pod's termination message.
        Err(_) => ExitCode::FAILURE,
    }
}
