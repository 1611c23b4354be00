//! Reading conversations, one after the other, in memory that does not grow with the file.
//!
//! ShareGPT's records (`conversations` of `from` and `value`) and OpenAI's (`messages` of `role` and
//! `content`), in a JSON array, as JSON lines, or in Parquet. A record that cannot be understood is
//! an error that says where it is and what to do. One whose bytes are in order but that is no conversation is such an
//! error too, and the records after it can be read all the same.

mod json;
mod parquet;
mod record;

use crate::conversation::Conversation;
use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

/// Bytes of one record, at most: what a file that is no list of conversations may cost.
pub const RECORD_LIMIT_BYTES: usize = 64 << 20;
/// Files in one dataset, at most.
pub const FILES_LIMIT: usize = 10_000;
/// Files that are named among those left out, at most.
const SKIPPED_LIMIT: usize = 100;

const EXTENSIONS: [&str; 3] = ["json", "jsonl", "parquet"];

/// Where in a file; both count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub record: usize,
    /// Where the record begins; Parquet has no lines.
    pub line: Option<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(out, "record {} (line {line})", self.record),
            None => write!(out, "record {}", self.record),
        }
    }
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    #[error("it cannot be read: {0}; check the path and its permissions")]
    Io(#[from] std::io::Error),
    #[error(
        "it is empty; it should hold {{\"id\", \"conversations\"}} or {{\"messages\"}} records, as a JSON array, as JSON lines or as Parquet"
    )]
    Empty,
    #[error("{at} is not JSON: {detail}; mend it there, or write one record a line")]
    Json { at: Place, detail: String },
    #[error("{at}: {detail}")]
    Array { at: Place, detail: &'static str },
    #[error("{at} is longer than {limit} bytes; is this a list of conversations? Split the record if it is", limit = RECORD_LIMIT_BYTES)]
    TooLong { at: Place },
    /// The record is no conversation.
    #[error(
        "{at}, field {field}: {detail}; `prepare.clean` and `vicuna-data clean` leave such records out, and count them"
    )]
    Field {
        at: Place,
        field: String,
        /// Why, in words that say nothing of the record: a report counts records by it.
        reason: &'static str,
        detail: String,
    },
    #[error("{at} is not readable Parquet: {detail}; write the file again, uncompressed or with Snappy, gzip or zstd")]
    Parquet { at: Place, detail: String },
    #[error("there is no .json, .jsonl or .parquet file in this folder; name a file, or put one there")]
    NoFiles,
    #[error("there are more than {FILES_LIMIT} files in this folder; join some of them")]
    TooManyFiles,
}

impl Problem {
    /// Of a record that is no conversation: where it is, and why in words that others of its kind share.
    pub(crate) fn malformed(&self) -> Option<(Place, String)> {
        let Self::Field { at, field, reason, .. } = self else { return None };
        let field: String = field.chars().filter(|letter| !letter.is_ascii_digit()).collect();
        Some((*at, format!("{field} {reason}")))
    }
}

/// A file that cannot be read, and why.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", file.display())]
pub struct ReadError {
    pub file: PathBuf,
    #[source]
    pub problem: Problem,
}

impl ReadError {
    fn new(file: &Path, problem: impl Into<Problem>) -> Self {
        Self { file: file.to_owned(), problem: problem.into() }
    }
}

/// Conversations of one file as they are written there, in order. Ends after the first error but for records that are no
/// conversations.
pub struct Reader {
    file: PathBuf,
    records: Box<dyn Iterator<Item = Result<Conversation, Problem>>>,
    any: bool,
    ended: bool,
}

impl fmt::Debug for Reader {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Reader").field("file", &self.file).finish_non_exhaustive()
    }
}

impl Reader {
    /// Opens a file; what it is, its first bytes tell.
    pub fn open(file: &Path) -> Result<Self, ReadError> {
        let failed = |problem| ReadError::new(file, problem);
        let opened = File::open(file).map_err(|error| failed(Problem::Io(error)))?;
        let records: Box<dyn Iterator<Item = _>> = match is_parquet(&opened).map_err(|error| failed(error.into()))? {
            true => Box::new(parquet::conversations(opened).map_err(failed)?),
            false => Box::new(json::conversations(BufReader::with_capacity(1 << 20, opened))),
        };
        Ok(Self { file: file.to_owned(), records, any: false, ended: false })
    }

    /// JSON that is in memory.
    pub fn of_json(bytes: Vec<u8>) -> Self {
        let records = Box::new(json::conversations(std::io::Cursor::new(bytes)));
        Self { file: PathBuf::from("the text"), records, any: false, ended: false }
    }
}

impl Iterator for Reader {
    type Item = Result<Conversation, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        match self.records.next() {
            Some(Ok(conversation)) => {
                self.any = true;
                return Some(Ok(conversation));
            }
            Some(Err(problem)) => {
                self.any = true;
                self.ended = problem.malformed().is_none();
                return Some(Err(ReadError::new(&self.file, problem)));
            }
            None => self.ended = true,
        }
        (!self.any).then(|| Err(ReadError::new(&self.file, Problem::Empty)))
    }
}

fn is_parquet(mut file: &File) -> std::io::Result<bool> {
    use std::io::Seek;
    let mut magic = Vec::with_capacity(4);
    file.take(4).read_to_end(&mut magic)?;
    file.rewind()?;
    Ok(magic == b"PAR1")
}

/// The files of a dataset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files {
    /// To be read, by name.
    pub paths: Vec<PathBuf>,
    /// Beside them, and left out because their names do not end like data; below the dataset's folder.
    pub skipped: Vec<String>,
}

/// The path itself, or every JSON and Parquet file below a folder.
pub fn files(path: &Path) -> Result<Files, ReadError> {
    if path.is_file() {
        return Ok(Files { paths: vec![path.to_owned()], skipped: Vec::new() });
    }
    let mut found = Files::default();
    let mut folders = vec![path.to_owned()];
    while let Some(folder) = folders.pop() {
        let failed = |error| ReadError::new(&folder, Problem::Io(error));
        for entry in std::fs::read_dir(&folder).map_err(failed)? {
            let entry = entry.map_err(failed)?.path();
            if entry.is_dir() {
                folders.push(entry);
            } else if is_data(&entry) {
                found.paths.push(entry);
            } else {
                found.skipped.push(entry.strip_prefix(path).unwrap_or(&entry).display().to_string());
            }
        }
        if found.paths.len() > FILES_LIMIT {
            return Err(ReadError::new(path, Problem::TooManyFiles));
        }
    }
    found.paths.sort();
    found.skipped.sort();
    if let Some(more) = found.skipped.len().checked_sub(SKIPPED_LIMIT).filter(|more| *more > 0) {
        found.skipped.truncate(SKIPPED_LIMIT);
        found.skipped.push(format!("and {more} more"));
    }
    if found.paths.is_empty() {
        return Err(ReadError::new(path, Problem::NoFiles));
    }
    Ok(found)
}

fn is_data(file: &Path) -> bool {
    let known = |end: &str| EXTENSIONS.iter().any(|known| end.eq_ignore_ascii_case(known));
    file.extension().and_then(|end| end.to_str()).is_some_and(known)
}

#[cfg(test)]
mod tests;
