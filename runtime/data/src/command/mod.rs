//! The command line.

mod clean;
mod input;
mod inspect;
mod output;
mod split;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::io::Write;
use vicuna_data::identity;

/// Cleans conversations, and shows what a training would see of them.
///
/// A dataset is a file, or a folder of .json, .jsonl and .parquet files, on disk or at an s3:// or
/// file:// address: ShareGPT's records or OpenAI's messages.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows conversations as tokens, the learned ones in colour (underlined without colour).
    Inspect(inspect::Inspect),
    /// Cleans a dataset as published for Vicuna, and tells what was dropped and why.
    Clean(clean::Clean),
    /// Cuts long conversations between pairs, and puts some aside for evaluation.
    Split(split::Split),
    /// Tells what cleaning, splitting and encoding would do, and writes nothing.
    Stats(inspect::Stats),
    /// Writes the ids and labels of a dataset as JSON lines.
    Encode(inspect::Encode),
    /// Writes conversations that teach a model who it is.
    Identity(Identity),
}

#[derive(Debug, clap::Args)]
struct Identity {
    /// What the model calls itself.
    #[arg(long)]
    name: String,
    /// Who it says made it.
    #[arg(long)]
    organization: String,
    /// How many conversations.
    #[arg(long, default_value_t = 200)]
    count: usize,
    /// Another seed, other answers.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    output: output::Output,
}

pub fn run(arguments: Arguments, out: &mut impl Write) -> Result<()> {
    match arguments.command {
        Command::Inspect(inspect) => inspect.run(out),
        Command::Clean(clean) => clean.run(out),
        Command::Split(split) => split.run(out),
        Command::Stats(stats) => stats.run(out),
        Command::Encode(encode) => encode.run(out),
        Command::Identity(Identity { name, organization, count, seed, output }) => {
            let mut writer = output.create()?;
            for conversation in identity::conversations(&name, &organization, seed, count) {
                writer.write(&conversation)?;
            }
            writer.finish()
        }
    }
}
