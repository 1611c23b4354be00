//! `vicuna-data clean`.

use super::input::{CleaningArguments, Datasets};
use super::output::{Output, write_report};
use anyhow::Result;
use std::io::Write;
use std::path::PathBuf;
use vicuna_data::{Cleaner, report};

#[derive(Debug, clap::Args)]
pub struct Clean {
    #[command(flatten)]
    datasets: Datasets,
    #[command(flatten)]
    cleaning: CleaningArguments,
    #[command(flatten)]
    output: Output,
    /// Write the report as JSON, too.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

impl Clean {
    pub fn run(self, out: &mut impl Write) -> Result<()> {
        let files = self.datasets.files()?;
        let mut cleaner = Cleaner::new(&self.cleaning.cleaning()?);
        let mut writer = self.output.create()?;
        for conversation in files.conversations() {
            if let Some(clean) = cleaner.clean_read(conversation)? {
                writer.write(&clean)?;
            }
        }
        writer.finish()?;
        let report = report::Report { skipped_files: files.skipped.clone(), ..cleaner.report() };
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
