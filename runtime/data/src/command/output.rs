//! Where conversations go.

use anyhow::{Context, Result};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use vicuna_data::Conversation;

/// How conversations are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Records of `conversations` with `from` and `value`.
    Sharegpt,
    /// Records of `messages` with `role` and `content`.
    Openai,
}

#[derive(Debug, clap::Args)]
pub struct Output {
    /// Where to write: a .jsonl file of one record a line, or any other as one JSON array; - writes lines to the
    /// standard output.
    #[arg(long, short, default_value = "-")]
    pub out: PathBuf,
    /// How records are written.
    #[arg(long, value_enum, default_value_t = Format::Sharegpt)]
    pub format: Format,
}

impl Output {
    pub fn create(&self) -> Result<Writer> {
        Writer::create(&self.out, self.format)
    }

    /// Whether the standard output is taken by conversations.
    pub fn is_standard(&self) -> bool {
        self.out.as_os_str() == "-"
    }
}

/// Conversations on their way into a file, which appears under its name when it is complete.
pub struct Writer {
    format: Format,
    lines: bool,
    written: usize,
    to: Target,
}

enum Target {
    Standard(BufWriter<std::io::Stdout>),
    File { file: BufWriter<File>, partial: PathBuf, path: PathBuf },
}

impl Writer {
    pub fn create(path: &Path, format: Format) -> Result<Self> {
        let standard = path.as_os_str() == "-";
        let lines = standard || path.extension().is_some_and(|end| end == "jsonl");
        let to = match standard {
            true => Target::Standard(BufWriter::new(std::io::stdout())),
            false => {
                let mut partial = path.as_os_str().to_owned();
                partial.push(".partial");
                let partial = PathBuf::from(partial);
                let file = File::create(&partial).with_context(|| {
                    format!("cannot write {}: is its folder there, and may you write to it?", partial.display())
                })?;
                Target::File { file: BufWriter::with_capacity(1 << 20, file), partial, path: path.to_owned() }
            }
        };
        Ok(Self { format, lines, written: 0, to })
    }

    pub fn write(&mut self, conversation: &Conversation) -> Result<()> {
        let record = match self.format {
            Format::Sharegpt => conversation.to_sharegpt(),
            Format::Openai => conversation.to_messages(),
        };
        let before: &[u8] = match (self.lines, self.written) {
            (true, _) => b"",
            (false, 0) => b"[\n",
            (false, _) => b",\n",
        };
        self.written += 1;
        let (lines, to) = (self.lines, self.target());
        to.write_all(before)?;
        serde_json::to_writer(&mut *to, &record)?;
        Ok(to.write_all(if lines { b"\n" } else { b"" })?)
    }

    pub fn finish(mut self) -> Result<()> {
        let end: &[u8] = match (self.lines, self.written) {
            (true, _) => b"",
            (false, 0) => b"[]\n",
            (false, _) => b"\n]\n",
        };
        self.target().write_all(end)?;
        self.target().flush()?;
        if let Target::File { partial, path, .. } = self.to {
            std::fs::rename(&partial, &path).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    fn target(&mut self) -> &mut dyn Write {
        match &mut self.to {
            Target::Standard(out) => out,
            Target::File { file, .. } => file,
        }
    }
}

/// Writes a report as JSON.
pub fn write_report(path: &Path, report: &vicuna_data::Report) -> Result<()> {
    let text = serde_json::to_vec_pretty(report)?;
    std::fs::write(path, text).with_context(|| format!("cannot write the report {}", path.display()))
}
