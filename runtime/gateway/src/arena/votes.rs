//! Votes as JSON lines: in a folder, one file a replica, which is only ever added to; without one in memory, where
//! the oldest make room and a restart loses all. Field names and the words for the winner are those of FastChat's
//! arena logs, so that what rates models from those reads these.

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{HashSet, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Bytes of votes that are kept in memory.
const MAX_MEMORY_BYTES: usize = 8 << 20;
/// Pairs of which it is known that they have their vote; an older one's second is seen by whoever counts.
const MAX_VOTED: usize = 1 << 14;
const PREFIX: &str = "votes-";
const SUFFIX: &str = ".jsonl";

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Vote {
    /// The pair's: of two lines with one id the first counts.
    pub id: String,
    pub model_a: String,
    pub model_b: String,
    pub winner: Winner,
    /// The name of the voter's API key; nothing where none is asked for.
    pub judge: String,
    /// Questions that were asked.
    pub turn: u32,
    /// The names were not known: always so.
    pub anony: bool,
    /// Unix time in seconds.
    pub tstamp: u64,
    /// As the voter's browser had them; absent unless the voter wanted them stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conversation_a: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conversation_b: Option<Value>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Winner {
    #[serde(rename = "model_a")]
    A,
    #[serde(rename = "model_b")]
    B,
    #[serde(rename = "tie")]
    Tie,
    #[serde(rename = "tie (bothbad)")]
    BothBad,
}

impl Winner {
    /// As a request and a metric have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
            Self::Tie => "tie",
            Self::BothBad => "both-bad",
        }
    }

    pub fn named(name: &str) -> Option<Self> {
        [Self::A, Self::B, Self::Tie, Self::BothBad].into_iter().find(|winner| winner.name() == name)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum VoteError {
    #[error("the pair has its vote")]
    Twice,
    #[error("{} is full ({limit} bytes); keep a copy of it and remove it", path.display())]
    Full { path: PathBuf, limit: u64 },
    #[error("cannot write to {}: {source}", path.display())]
    Unwritable { path: PathBuf, source: io::Error },
}

/// The folder that was given cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot keep votes in {}: {source}; give a folder that this process may write to", path.display())]
pub struct Unusable {
    path: PathBuf,
    source: io::Error,
}

pub struct Votes {
    kept: Kept,
    voted: Mutex<Voted>,
}

enum Kept {
    File { folder: PathBuf, path: PathBuf, limit: u64, writing: Mutex<()> },
    Memory(Mutex<Lines>),
}

#[derive(Default)]
struct Voted {
    order: VecDeque<String>,
    ids: HashSet<String>,
}

#[derive(Default)]
struct Lines {
    lines: VecDeque<String>,
    bytes: usize,
}

impl Votes {
    pub fn in_memory() -> Self {
        Self { kept: Kept::Memory(Mutex::default()), voted: Mutex::default() }
    }

    /// `limit`: bytes of this replica's file.
    pub fn in_folder(folder: &Path, replica: &str, limit: u64) -> Result<Self, Unusable> {
        let path = folder.join(format!("{PREFIX}{}{SUFFIX}", replica.replace('/', "-")));
        let opened = std::fs::create_dir_all(folder).and_then(|()| append(&path)).and_then(end_line);
        opened.map_err(|source| Unusable { path: path.clone(), source })?;
        let kept = Kept::File { folder: folder.to_owned(), path, limit, writing: Mutex::default() };
        Ok(Self { kept, voted: Mutex::default() })
    }

    pub fn stored_in(&self) -> &'static str {
        match self.kept {
            Kept::File { .. } => "file",
            Kept::Memory(_) => "memory",
        }
    }

    /// Writes to a disk, where there is a folder.
    pub fn add(&self, vote: &Vote) -> Result<(), VoteError> {
        if !self.voted.lock().enter(&vote.id) {
            return Err(VoteError::Twice);
        }
        // Nothing in it can fail: no map has keys that are not text.
        let mut line = serde_json::to_string(vote).unwrap_or_default();
        line.push('\n');
        let kept = self.keep(line);
        if kept.is_err() {
            self.voted.lock().forget(&vote.id);
        }
        kept
    }

    fn keep(&self, line: String) -> Result<(), VoteError> {
        match &self.kept {
            Kept::Memory(lines) => lines.lock().push(line),
            Kept::File { path, limit, writing, .. } => {
                let _one = writing.lock();
                let failed = |source| VoteError::Unwritable { path: path.clone(), source };
                let mut file = append(path).map_err(failed)?;
                if file.metadata().map_err(failed)?.len() + line.len() as u64 > *limit {
                    return Err(VoteError::Full { path: path.clone(), limit: *limit });
                }
                file.write_all(line.as_bytes()).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// All votes there are, of all replicas that write to the folder. Reads from a disk, line by line.
    pub fn read(&self) -> Box<dyn Iterator<Item = String> + Send> {
        match &self.kept {
            Kept::Memory(lines) => Box::new(lines.lock().lines.clone().into_iter()),
            Kept::File { folder, .. } => Box::new(files(folder).into_iter().flat_map(lines)),
        }
    }
}

impl Voted {
    fn enter(&mut self, id: &str) -> bool {
        if !self.ids.insert(id.to_owned()) {
            return false;
        }
        self.order.push_back(id.to_owned());
        if self.order.len() > MAX_VOTED
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
        true
    }

    fn forget(&mut self, id: &str) {
        self.ids.remove(id);
        self.order.retain(|other| other != id);
    }
}

impl Lines {
    fn push(&mut self, line: String) {
        self.bytes += line.len();
        self.lines.push_back(line);
        while self.bytes > MAX_MEMORY_BYTES {
            let Some(oldest) = self.lines.pop_front() else {
                return;
            };
            self.bytes -= oldest.len();
        }
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).read(true).open(path)
}

/// A process that was killed may have left half a line; what comes next begins a new one.
fn end_line(mut file: File) -> io::Result<()> {
    if file.metadata()?.len() == 0 {
        return Ok(());
    }
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    if last == *b"\n" { Ok(()) } else { file.write_all(b"\n") }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let is_ours = |name: &str| name.starts_with(PREFIX) && name.ends_with(SUFFIX);
    let ours = entries.filter_map(|entry| {
        let entry = entry.ok()?;
        is_ours(entry.file_name().to_str()?).then(|| entry.path())
    });
    let mut files: Vec<_> = ours.collect();
    files.sort();
    files
}

/// The whole lines of a file.
fn lines(path: PathBuf) -> impl Iterator<Item = String> {
    let reader = File::open(path).ok().map(BufReader::new);
    let lines = reader.into_iter().flat_map(BufRead::lines).map_while(Result::ok);
    lines.filter(|line| serde_json::from_str::<Vote>(line).is_ok()).map(|line| line + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn vote(id: &str) -> Vote {
        Vote {
            id: id.into(),
            model_a: "team/x".into(),
            model_b: "team/y".into(),
            winner: Winner::BothBad,
            judge: "team".into(),
            turn: 1,
            anony: true,
            tstamp: 7,
            conversation_a: None,
            conversation_b: None,
        }
    }

    fn ids(votes: &Votes) -> Vec<String> {
        votes.read().map(|line| serde_json::from_str::<Vote>(&line).unwrap().id).collect()
    }

    #[test]
    fn votes_of_all_replicas_survive_a_restart_and_half_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let open = |replica| Votes::in_folder(folder.path(), replica, 1 << 20).unwrap();
        open("g-0").add(&vote("1")).unwrap();
        open("g-1").add(&vote("2")).unwrap();
        append(&folder.path().join("votes-g-0.jsonl")).unwrap().write_all(b"{\"id\":\"half").unwrap();
        let again = open("g-0");
        again.add(&vote("3")).unwrap();
        assert_eq!(ids(&again), ["1", "3", "2"]);
    }

    #[test]
    fn a_line_reads_as_the_logs_of_arenas_do() {
        let line = serde_json::to_value(vote("1")).unwrap();
        let expected = json!({
            "id": "1", "model_a": "team/x", "model_b": "team/y", "winner": "tie (bothbad)", "judge": "team",
            "turn": 1, "anony": true, "tstamp": 7,
        });
        assert_eq!(line, expected);
    }

    #[test]
    fn a_pair_is_voted_on_once_and_again_only_if_it_was_not_stored() {
        let folder = tempfile::tempdir().unwrap();
        let line = serde_json::to_string(&vote("1")).unwrap().len() as u64 + 1;
        let votes = Votes::in_folder(folder.path(), "g", line).unwrap();
        votes.add(&vote("1")).unwrap();
        assert!(matches!(votes.add(&vote("1")), Err(VoteError::Twice)));
        for _ in 0..2 {
            let error = votes.add(&vote("2")).unwrap_err();
            assert!(matches!(error, VoteError::Full { .. }), "{error}");
        }
        assert_eq!(ids(&votes), ["1"]);
    }

    #[test]
    fn memory_keeps_the_newest_within_its_bound() {
        let votes = Votes::in_memory();
        let long = Value::String("x".repeat(1 << 20));
        for number in 0..10 {
            votes.add(&Vote { conversation_a: Some(long.clone()), ..vote(&number.to_string()) }).unwrap();
        }
        assert_eq!(ids(&votes), ["3", "4", "5", "6", "7", "8", "9"]);
    }

    #[test]
    fn a_folder_that_cannot_be_used_is_named_at_the_start() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = Votes::in_folder(&file, "g", 1).err().unwrap().to_string();
        assert!(error.contains("file") && error.contains("may write to"), "{error}");
    }
}
