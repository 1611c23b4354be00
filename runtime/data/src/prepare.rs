//! The whole way from files to what a training sees: read, clean, put aside, split, encode.
//!
//! A pure function of the files' bytes, the settings and the encoder: every rank computes the same.

use crate::clean::{Cleaner, Cleaning};
use crate::conversation::Conversation;
use crate::held_out::is_held_out;
use crate::language::Language;
use crate::order::Mixture;
use crate::read::{ReadError, Reader};
use crate::report::{Encoding, Report, Split};
use crate::sequences::{Sequences, SequencesWriter};
use crate::split::split;
use crate::template::{Encoder, Example, TemplateError};
use std::path::{Path, PathBuf};

/// What is done to the data.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// All published steps of cleaning; else only those without which nothing can be trained.
    pub clean: bool,
    /// Conversations in other languages are dropped.
    pub language: Option<Language>,
    /// Longer conversations are cut between pairs, in tokens.
    pub split_at: Option<usize>,
    /// Share of the conversations that is put aside for evaluation, 0 to 1.
    pub hold_out: f64,
    /// Tokens of a sequence, at most; what is beyond is cut off.
    pub max_length: usize,
    /// Several sequences to train on share a row of `max_length` tokens.
    pub pack: bool,
}

impl Settings {
    /// The steps of cleaning.
    pub fn cleaning(&self) -> Cleaning {
        let cleaning = if self.clean { Cleaning::published() } else { Cleaning::necessary() };
        Cleaning { language: self.language, ..cleaning }
    }
}

/// Files that belong together.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// What the user calls it.
    pub name: String,
    pub files: Vec<PathBuf>,
    /// Files beside them that are no data by their names, for the report.
    pub skipped: Vec<String>,
    /// How often its sequences are seen in an epoch.
    pub weight: f64,
}

/// What a training sees.
#[derive(Debug)]
pub struct Prepared {
    /// Sequences of all sources, or the rows that they are packed into, in order.
    pub examples: Sequences,
    /// How many of them are of each source, and how often they are seen.
    pub mixtures: Vec<Mixture>,
    /// Sequences to evaluate on.
    pub held_out: Sequences,
    /// The largest token id in any of them.
    pub largest_id: u32,
    /// BLAKE3 of all sequences, what is learned of them and which are held out, hex.
    pub digest: String,
    pub report: Report,
}

#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    #[error("the prepared sequences cannot be kept in the scratch folder: {0}; give it room and let it be written to")]
    Scratch(#[from] std::io::Error),
    #[error("the dataset {name}: {source}")]
    Read { name: String, source: Box<ReadError> },
    #[error("the dataset {name}, conversation {id}: {source}")]
    Encode { name: String, id: String, source: TemplateError },
    #[error(
        "of the dataset {name}, no conversation is left to train on: {summary}; {held_out} sequences were put aside for evaluation (holdOut), and {without_reply} have no token of a reply to learn within {max_length} tokens (maxLength); loosen prepare, raise maxLength, or give other data"
    )]
    NothingLeft { name: String, summary: String, held_out: u64, without_reply: u64, max_length: usize },
}

/// Prepares all sources. Duplicates are looked for across them. `added` (who the model is) is neither cleaned nor
/// split nor put aside, and is seen once an epoch. Sequences are kept in files without a name in `scratch`.
pub fn prepare(
    sources: &[Source],
    added: &[Conversation],
    settings: &Settings,
    encoder: &Encoder,
    scratch: &Path,
) -> Result<Prepared, PrepareError> {
    let mut work = Work::new(settings, encoder, scratch)?;
    for source in sources {
        work.source(source)?;
    }
    if !added.is_empty() {
        for conversation in added {
            work.encode("prepare.identity", conversation, false)?;
        }
        work.mix(1.0);
    }
    work.finish()
}

struct Work<'a> {
    settings: &'a Settings,
    encoder: &'a Encoder,
    cleaner: Cleaner,
    examples: SequencesWriter,
    mixtures: Vec<Mixture>,
    held_out: SequencesWriter,
    largest_id: u32,
    hasher: blake3::Hasher,
    skipped: Vec<String>,
    conversations_held_out: u64,
    split: Split,
    encoding: Encoding,
}

impl<'a> Work<'a> {
    fn new(settings: &'a Settings, encoder: &'a Encoder, scratch: &Path) -> Result<Self, PrepareError> {
        Ok(Self {
            settings,
            encoder,
            cleaner: Cleaner::new(&settings.cleaning()),
            examples: SequencesWriter::create(scratch)?,
            mixtures: Vec::new(),
            held_out: SequencesWriter::create(scratch)?,
            largest_id: 0,
            hasher: blake3::Hasher::new_derive_key("vicuna-operator 2026 sequences of a training"),
            skipped: Vec::new(),
            conversations_held_out: 0,
            split: Split { at: settings.split_at.unwrap_or(0), ..Split::default() },
            encoding: Encoding::default(),
        })
    }

    fn source(&mut self, source: &Source) -> Result<(), PrepareError> {
        let failed = |error| PrepareError::Read { name: source.name.clone(), source: Box::new(error) };
        let Encoding { sequences, held_out, without_reply, .. } = self.encoding;
        self.skipped.extend(source.skipped.iter().map(|file| format!("{}: {file}", source.name)));
        for file in &source.files {
            for conversation in Reader::open(file).map_err(failed)? {
                if let Some(clean) = self.cleaner.clean_read(conversation).map_err(failed)? {
                    self.cleaned(&source.name, clean)?;
                }
            }
        }
        if self.encoding.sequences == sequences {
            return Err(PrepareError::NothingLeft {
                name: source.name.clone(),
                summary: self.cleaner.report().summary(),
                held_out: self.encoding.held_out - held_out,
                without_reply: self.encoding.without_reply - without_reply,
                max_length: self.settings.max_length,
            });
        }
        self.mix(source.weight);
        Ok(())
    }

    fn cleaned(&mut self, name: &str, conversation: Conversation) -> Result<(), PrepareError> {
        // Before splitting: pieces of one conversation must not be on both sides.
        let aside = is_held_out(&conversation, self.settings.hold_out);
        self.conversations_held_out += u64::from(aside);
        let Some(limit) = self.settings.split_at else {
            return self.encode(name, &conversation, aside);
        };
        let id = conversation.id.clone();
        let encoder = self.encoder;
        let length = |turns: &[crate::Turn]| encoder.example(turns).map(|example| example.ids.len());
        let pieces = split(conversation, limit, length, &mut self.split);
        let pieces = pieces.map_err(|source| PrepareError::Encode { name: name.to_owned(), id, source })?;
        pieces.iter().try_for_each(|piece| self.encode(name, piece, aside))
    }

    fn encode(&mut self, name: &str, conversation: &Conversation, aside: bool) -> Result<(), PrepareError> {
        let failed = |source| PrepareError::Encode { name: name.to_owned(), id: conversation.id.clone(), source };
        let mut example = self.encoder.example(&conversation.turns).map_err(failed)?;
        self.encoding.cut += u64::from(example.truncate(self.settings.max_length));
        if example.trained_tokens() == 0 {
            self.encoding.without_reply += 1;
            return Ok(());
        }
        digest(&mut self.hasher, &example, aside);
        self.largest_id = example.ids.iter().fold(self.largest_id, |largest, id| largest.max(*id));
        if aside {
            self.encoding.held_out += 1;
            self.held_out.push(&example)?;
        } else {
            self.encoding.sequences += 1;
            self.encoding.tokens += example.ids.len() as u64;
            self.encoding.trained_tokens += example.trained_tokens() as u64;
            self.encoding.lengths.add(example.ids.len());
            self.examples.push(&example)?;
        }
        Ok(())
    }

    /// What came since the last time belongs together.
    fn mix(&mut self, weight: f64) {
        let before: u32 = self.mixtures.iter().map(|mixture| mixture.sequences).sum();
        if self.settings.pack {
            self.examples.pack(self.settings.max_length);
            self.encoding.rows = self.examples.rows() as u64;
        }
        self.mixtures.push(Mixture { sequences: self.examples.rows() as u32 - before, weight });
    }

    fn finish(self) -> Result<Prepared, PrepareError> {
        let mut report = self.cleaner.report();
        report.split = self.settings.split_at.map(|_| self.split);
        report.held_out = self.conversations_held_out;
        report.encoded = Some(self.encoding);
        report.skipped_files = self.skipped;
        let mut hasher = self.hasher;
        for mixture in &self.mixtures {
            hasher.update(&mixture.sequences.to_le_bytes());
        }
        let digest = hasher.finalize().to_hex().to_string();
        let (examples, held_out) = (self.examples.finish()?, self.held_out.finish()?);
        Ok(Prepared { examples, mixtures: self.mixtures, held_out, largest_id: self.largest_id, digest, report })
    }
}

/// Adds a sequence to the digest; lengths go first, so that no sequence can pose as two.
fn digest(hasher: &mut blake3::Hasher, example: &Example, aside: bool) {
    let learned = example.learned.iter().flat_map(|learned| [learned.start, learned.end]);
    let lengths = [u32::from(aside), example.ids.len() as u32, example.learned.len() as u32];
    let numbers = lengths.into_iter().chain(example.ids.iter().copied()).chain(learned);
    hasher.update(&numbers.flat_map(u32::to_le_bytes).collect::<Vec<u8>>());
}

#[cfg(test)]
mod tests;
