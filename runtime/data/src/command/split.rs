//! `vicuna-data split`.

use super::input::{Datasets, Encoding, share};
use super::output::{Output, Writer, write_report};
use anyhow::Result;
use std::io::Write;
use std::path::PathBuf;
use vicuna_data::held_out::is_held_out;
use vicuna_data::{Cleaner, Cleaning, Encoder, Turn, report, split};

#[derive(Debug, clap::Args)]
pub struct Split {
    #[command(flatten)]
    datasets: Datasets,
    #[command(flatten)]
    encoding: Encoding,
    /// Tokens of a piece, at most.
    #[arg(long, default_value_t = 2048)]
    at: usize,
    /// Share of the conversations that is put aside, by a digest of what is said in them.
    #[arg(long, default_value_t = 0.0, value_parser = share, requires = "held_out")]
    hold_out: f64,
    /// Where those are written.
    #[arg(long, value_name = "FILE")]
    held_out: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
    /// Write the report as JSON, too.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

impl Split {
    pub fn run(self, out: &mut impl Write) -> Result<()> {
        let files = self.datasets.files()?;
        let encoder = self.encoding.encoder()?;
        let mut cleaner = Cleaner::new(&Cleaning::necessary());
        let mut done = report::Split { at: self.at, ..report::Split::default() };
        let mut writer = self.output.create()?;
        let mut aside = self.held_out.as_ref().map(|path| Writer::create(path, self.output.format)).transpose()?;
        let mut held_out = 0;
        for conversation in files.conversations() {
            let Some(clean) = cleaner.clean_read(conversation)? else { continue };
            let is_aside = is_held_out(&clean, self.hold_out);
            held_out += u64::from(is_aside);
            let to = aside.as_mut().filter(|_| is_aside).unwrap_or(&mut writer);
            for piece in split::split(clean, self.at, |turns| tokens(&encoder, turns), &mut done)? {
                to.write(&piece)?;
            }
        }
        writer.finish()?;
        aside.map_or(Ok(()), Writer::finish)?;
        let report =
            report::Report { split: Some(done), held_out, skipped_files: files.skipped.clone(), ..cleaner.report() };
        if let Some(path) = &self.report {
            write_report(path, &report)?;
        }
        match self.output.is_standard() {
            true => eprint!("{report}"),
            false => write!(out, "{report}")?,
        }
        Ok(())
    }
}

fn tokens(encoder: &Encoder, turns: &[Turn]) -> Result<usize> {
    Ok(encoder.example(turns)?.ids.len())
}
