//! `vicuna-data`: looks at what a training would see.

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use std::io::Write;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;
use vicuna_data::{Conversation, Encoder, Example, Template, identity, load_conversations, template};

/// Looks at conversations as a training would see them.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Shows conversations as tokens, the learned ones in colour (underlined without colour).
    Inspect {
        #[command(flatten)]
        input: Input,
        /// How many conversations to show.
        #[arg(long, default_value_t = 3)]
        count: usize,
    },
    /// Counts what reading, cleaning and encoding do to a dataset.
    Stats {
        #[command(flatten)]
        input: Input,
    },
    /// Writes the ids and labels of a dataset as JSON lines.
    Encode {
        #[command(flatten)]
        input: Input,
    },
    /// Writes conversations that teach a model who it is, as ShareGPT JSON.
    Identity {
        #[arg(long)]
        name: String,
        #[arg(long)]
        organization: String,
        #[arg(long, default_value_t = 200)]
        count: usize,
        #[arg(long, default_value_t = 0)]
        seed: u64,
    },
}

#[derive(clap::Args)]
struct Input {
    /// ShareGPT JSON or OpenAI messages, an array or one record a line.
    dataset: PathBuf,
    /// A Hugging Face tokenizer.json.
    #[arg(long)]
    tokenizer: PathBuf,
    /// vicuna_v1.1 or chatml.
    #[arg(long, default_value = template::VICUNA_V1_1)]
    template: String,
    /// Tokens in a sequence, at most.
    #[arg(long, default_value_t = 2048)]
    max_length: usize,
}

fn main() -> Result<()> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let done = run(Arguments::parse().command, &mut out).and_then(|()| Ok(out.flush()?));
    match done {
        Err(error) if is_closed_pipe(&error) => Ok(()),
        done => done,
    }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

fn run(command: Command, out: &mut impl Write) -> Result<()> {
    match command {
        Command::Inspect { input, count } => inspect(&input, count, out),
        Command::Stats { input } => stats(&input, out),
        Command::Encode { input } => encode(&input, out),
        Command::Identity { name, organization, count, seed } => {
            let set = identity::conversations(&name, &organization, seed, count);
            let records: Vec<_> = set.iter().map(Conversation::to_sharegpt).collect();
            serde_json::to_writer_pretty(&mut *out, &records)?;
            Ok(writeln!(out)?)
        }
    }
}

fn inspect(input: &Input, count: usize, out: &mut impl Write) -> Result<()> {
    let tokenizer = read_tokenizer(&input.tokenizer)?;
    let encoder = Template::named(&input.template)?.bind(&tokenizer)?;
    for conversation in read(&input.dataset)?.iter().take(count) {
        let mut example = encoder.example(&conversation.turns)?;
        let cut = example.truncate(input.max_length);
        let (tokens, learned) = (example.ids.len(), example.trained_tokens());
        writeln!(out, "── {} · {tokens} tokens, {learned} learned{}", conversation.id, if cut { ", cut" } else { "" })?;
        show(&tokenizer, &example, out)?;
    }
    Ok(())
}

/// The tokens' text, dim where it is only read and underlined where it is learned.
fn show(tokenizer: &Tokenizer, example: &Example, out: &mut impl Write) -> Result<()> {
    let mut before = None;
    for (id, label) in example.ids.iter().zip(&example.labels) {
        let learned = *label != template::IGNORED;
        if before.replace(learned) != Some(learned) {
            write!(out, "\x1b[0m{}", if learned { "\x1b[4;32m" } else { "\x1b[2m" })?;
        }
        let text = tokenizer.id_to_token(*id).unwrap_or_else(|| format!("[{id}]"));
        let text = text.replace(['Ġ', '▁'], " ");
        write!(out, "{}", text.replace('Ċ', "↵\n").replace("<0x0A>", "↵\n"))?;
    }
    Ok(writeln!(out, "\x1b[0m")?)
}

fn stats(input: &Input, out: &mut impl Write) -> Result<()> {
    let (conversations, report) = load(&input.dataset)?;
    writeln!(out, "{report}")?;
    let encoded = encoder(input)?.encode(&conversations, input.max_length)?;
    writeln!(out, "{encoded}")?;
    let mut lengths: Vec<_> = encoded.examples.iter().map(|example| example.ids.len()).collect();
    lengths.sort_unstable();
    if let (Some(least), Some(most)) = (lengths.first(), lengths.last()) {
        let median = lengths[lengths.len() / 2];
        writeln!(out, "tokens in a sequence: {least} to {most}, median {median}")?;
    }
    Ok(())
}

fn encode(input: &Input, out: &mut impl Write) -> Result<()> {
    let encoded = encoder(input)?.encode(&read(&input.dataset)?, input.max_length)?;
    for Example { ids, labels } in &encoded.examples {
        writeln!(out, "{}", serde_json::json!({ "ids": ids, "labels": labels }))?;
    }
    eprintln!("{encoded}");
    Ok(())
}

fn encoder(input: &Input) -> Result<Encoder> {
    Ok(Template::named(&input.template)?.bind(&read_tokenizer(&input.tokenizer)?)?)
}

fn read_tokenizer(path: &Path) -> Result<Tokenizer> {
    Tokenizer::from_file(path).map_err(|error| anyhow::anyhow!("cannot read the tokenizer {}: {error}", path.display()))
}

fn read(path: &Path) -> Result<Vec<Conversation>> {
    let (conversations, report) = load(path)?;
    eprintln!("{report}");
    Ok(conversations)
}

fn load(path: &Path) -> Result<(Vec<Conversation>, vicuna_data::Report)> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    load_conversations(&bytes).with_context(|| format!("in {}", path.display()))
}
