//! `vicuna-worker`: see the library.

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let options = vicuna_worker::Options::parse();
    match vicuna_worker::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vicuna-worker: {error:#}");
            ExitCode::FAILURE
        }
    }
}
