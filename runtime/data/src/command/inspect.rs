//! `vicuna-data inspect`, `stats` and `encode`.

use super::input::{Datasets, Encoding, PrepareArguments, TemplateArguments, read_tokenizer};
use super::output::write_report;
use anyhow::Result;
use std::io::Write;
use std::path::PathBuf;
use tokenizers::Tokenizer;
use vicuna_data::held_out::is_held_out;
use vicuna_data::prepare::{Prepared, Source, prepare};
use vicuna_data::{Cleaner, Cleaning, Encoder, Example, Report, template};

#[derive(Debug, clap::Args)]
pub struct Inspect {
    #[command(flatten)]
    datasets: Datasets,
    #[command(flatten)]
    encoding: Encoding,
    /// Tokens in a sequence, at most.
    #[arg(long, default_value_t = 2048)]
    max_length: usize,
    /// How many conversations to show.
    #[arg(long, default_value_t = 3)]
    count: usize,
}

impl Inspect {
    pub fn run(self, out: &mut impl Write) -> Result<()> {
        let tokenizer = self.encoding.tokenizer()?;
        let encoder = self.encoding.encoder()?;
        let files = self.datasets.files()?;
        let mut cleaner = Cleaner::new(&Cleaning::necessary());
        let mut shown = 0;
        for conversation in files.conversations() {
            let Some(clean) = cleaner.clean_read(conversation)? else { continue };
            if shown == self.count {
                break;
            }
            shown += 1;
            let mut example = encoder.example(&clean.turns)?;
            let cut = if example.truncate(self.max_length) { ", cut" } else { "" };
            let (tokens, learned) = (example.ids.len(), example.trained_tokens());
            writeln!(out, "── {} · {tokens} tokens, {learned} learned{cut}", clean.id)?;
            show(&tokenizer, &example, out)?;
        }
        Ok(())
    }
}

/// The tokens' text, dim where it is only read and underlined where it is learned.
fn show(tokenizer: &Tokenizer, example: &Example, out: &mut impl Write) -> Result<()> {
    let mut before = None;
    for (id, label) in example.ids.iter().zip(example.labels()) {
        let learned = label != template::IGNORED;
        if before.replace(learned) != Some(learned) {
            write!(out, "\x1b[0m{}", if learned { "\x1b[4;32m" } else { "\x1b[2m" })?;
        }
        let text = tokenizer.id_to_token(*id).unwrap_or_else(|| format!("[{id}]"));
        let text = text.replace(['Ġ', '▁'], " ");
        write!(out, "{}", text.replace('Ċ', "↵\n").replace("<0x0A>", "↵\n"))?;
    }
    Ok(writeln!(out, "\x1b[0m")?)
}

#[derive(Debug, clap::Args)]
pub struct Stats {
    #[command(flatten)]
    datasets: Datasets,
    /// A Hugging Face tokenizer.json: then lengths are counted in tokens, too.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    #[command(flatten)]
    template: TemplateArguments,
    #[command(flatten)]
    prepare: PrepareArguments,
    /// Write the report as JSON, too.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

impl Stats {
    pub fn run(self, out: &mut impl Write) -> Result<()> {
        let report = match &self.tokenizer {
            Some(path) => {
                let encoder = self.template.encoder(&read_tokenizer(path)?)?;
                prepared(&self.datasets, &self.prepare, &encoder)?.report
            }
            None => self.counted()?,
        };
        if let Some(path) = &self.report {
            write_report(path, &report)?;
        }
        Ok(write!(out, "{report}")?)
    }

    /// What can be told without a tokenizer.
    fn counted(&self) -> Result<Report> {
        let settings = self.prepare.settings()?;
        let mut cleaner = Cleaner::new(&settings.cleaning());
        let mut held_out = 0;
        let files = self.datasets.files()?;
        for conversation in files.conversations() {
            let clean = cleaner.clean_read(conversation)?;
            held_out += clean.is_some_and(|clean| is_held_out(&clean, settings.hold_out)) as u64;
        }
        Ok(Report { held_out, skipped_files: files.skipped, ..cleaner.report() })
    }
}

#[derive(Debug, clap::Args)]
pub struct Encode {
    #[command(flatten)]
    datasets: Datasets,
    #[command(flatten)]
    encoding: Encoding,
    #[command(flatten)]
    prepare: PrepareArguments,
}

impl Encode {
    pub fn run(self, out: &mut impl Write) -> Result<()> {
        let prepared = prepared(&self.datasets, &self.prepare, &self.encoding.encoder()?)?;
        for example in prepared.examples.iter() {
            let example = example?;
            let mut line = serde_json::json!({ "ids": example.ids, "labels": example.labels() });
            if self.prepare.packing {
                line["lengths"] = example.lengths().collect::<Vec<_>>().into();
            }
            writeln!(out, "{line}")?;
        }
        eprint!("{}", prepared.report);
        Ok(())
    }
}

fn prepared(datasets: &Datasets, arguments: &PrepareArguments, encoder: &Encoder) -> Result<Prepared> {
    let files = datasets.files()?;
    let source = Source { name: "given".to_owned(), files: files.paths.clone(), skipped: Vec::new(), weight: 1.0 };
    let mut prepared = prepare(&[source], &[], &arguments.settings()?, encoder, &std::env::temp_dir())?;
    prepared.report.skipped_files = files.skipped;
    Ok(prepared)
}
