//! The rank that writes the log's parts.

use super::{Line, Reach, What, events};
use crate::checkpoint::{CheckpointError, retry};
use bytes::Bytes;
use parking_lot::Mutex;
use std::sync::Arc;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use vicuna_checkpoint::{Store, StoreError};

/// Parts of all trainings, below the checkpoint URI.
pub const LOGS: &str = "logs";
/// The newest parts tell how far the log reaches: a former scribe may have written a few while this rank kept lines.
const LOOK_BACK: usize = 4;

/// Writes a generation's lines; from several threads, one at a time.
#[derive(Debug)]
pub struct Scribe {
    store: Store,
    /// The generation starts from this step in the store: what is there of later ones is void.
    base: Option<u64>,
    reach: tokio::sync::Mutex<Option<Reach>>,
    known: Mutex<Option<Reach>>,
}

impl Scribe {
    /// `store` is that of the checkpoints.
    pub fn new(store: &Store, training_uid: &str, base: Option<u64>) -> Self {
        let store = store.below(&format!("{LOGS}/{training_uid}"));
        Self { store, base, reach: tokio::sync::Mutex::new(None), known: Mutex::new(None) }
    }

    /// How far the log reaches, as far as it is known here.
    pub fn reach(&self) -> Option<Reach> {
        *self.known.lock()
    }

    /// Writes those of the lines that the log lacks, as one part.
    pub async fn write(&self, lines: &[Line]) -> Result<(), StoreError> {
        let mut reach = self.reach.lock().await;
        let known = match *reach {
            Some(known) => known,
            None => self.open().await?,
        };
        let new: Vec<Line> = lines.iter().filter(|line| !known.covers(line)).cloned().collect();
        if let Some(last) = new.iter().map(|line| line.step).max() {
            let name = name(last, Reach::of(&new).step == last);
            self.store.put(&format!("events.out.tfevents.{name}"), events::file(&new).into()).await?;
            // Last: it tells how far the log reaches.
            self.store.put(&format!("{name}.jsonl"), json_lines(&new)).await?;
        }
        *reach = Some(known.max(Reach::of(&new)));
        *self.known.lock() = *reach;
        Ok(())
    }

    /// How far the log reaches, after what is void in it is gone.
    async fn open(&self) -> Result<Reach, StoreError> {
        let mut parts = Vec::new();
        for object in self.store.list("").await? {
            match (self.base, step_of(&object.key)) {
                (Some(base), Some(step)) if step > base => self.store.delete(&object.key).await?,
                _ if object.key.ends_with(".jsonl") => parts.push(object.key),
                _ => {}
            }
        }
        let mut reach = Reach::default();
        for part in parts.iter().rev().take(LOOK_BACK) {
            reach = reach.max(Reach::of(&parse(&self.store.get(part).await?)));
        }
        Ok(reach)
    }
}

/// What a scribe is to write, in another thread.
#[derive(Debug)]
pub struct Part {
    pub scribe: Arc<Scribe>,
    pub lines: Vec<Line>,
}

impl Part {
    /// Tries until it works or `cancel` is called; trouble is told to `trouble`.
    pub fn write(
        &self,
        runtime: &Handle,
        cancel: &CancellationToken,
        trouble: &dyn Fn(&StoreError),
    ) -> Result<(), CheckpointError> {
        retry(runtime, cancel, trouble, || self.scribe.write(&self.lines))
    }
}

/// The whole log of a training, in order.
pub async fn read(store: &Store, training_uid: &str) -> Result<Vec<Line>, StoreError> {
    let store = store.below(&format!("{LOGS}/{training_uid}"));
    let mut lines = Vec::new();
    for object in store.list("").await?.iter().filter(|object| object.key.ends_with(".jsonl")) {
        lines.extend(parse(&store.get(&object.key).await?));
    }
    lines.sort_by_key(|line| (line.step, matches!(line.what, What::Evaluation(_))));
    Ok(lines)
}

/// Names sort as the parts were written.
fn name(last: u64, ends_with_step: bool) -> String {
    let suffix = if ends_with_step { "" } else { "-evaluation" };
    format!("{last:012}{suffix}")
}

/// The last step in a part, by its name.
fn step_of(key: &str) -> Option<u64> {
    let name = key.trim_start_matches("events.out.tfevents.");
    name.split(['.', '-']).next()?.parse().ok()
}

fn json_lines(lines: &[Line]) -> Bytes {
    let mut text = String::new();
    for line in lines {
        // Plain structs always serialise.
        text.push_str(&serde_json::to_string(line).unwrap_or_default());
        text.push('\n');
    }
    text.into()
}

/// A line that cannot be read is passed over: the log decides nothing.
fn parse(bytes: &[u8]) -> Vec<Line> {
    String::from_utf8_lossy(bytes).lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{evaluation, step};
    use super::*;

    async fn written(store: &Store) -> Vec<(u64, bool)> {
        let lines = read(store, "uid").await.unwrap();
        lines.iter().map(|line| (line.step, matches!(line.what, What::Step(_)))).collect()
    }

    #[tokio::test]
    async fn another_scribe_goes_on_where_the_log_ends() {
        let store = Store::in_memory();
        let first = Scribe::new(&store, "uid", Some(0));
        first.write(&[step(1, 2.0, 1, &[]), step(2, 2.0, 1, &[])]).await.unwrap();
        first.write(&[evaluation(2, 1.0)]).await.unwrap();
        let second = Scribe::new(&store, "uid", None);
        let kept = [step(2, 2.0, 1, &[]), evaluation(2, 1.0), step(3, 2.0, 1, &[])];
        second.write(&kept).await.unwrap();
        second.write(&kept).await.unwrap();
        assert_eq!(written(&store).await, [(1, true), (2, true), (2, false), (3, true)]);
        assert_eq!(second.reach(), Some(Reach { step: 3, evaluation: 2 }));
    }

    #[tokio::test]
    async fn steps_that_are_made_again_from_a_checkpoint_replace_the_old_ones() {
        let store = Store::in_memory();
        let first = Scribe::new(&store, "uid", Some(0));
        for at in 1..=3 {
            first.write(&[step(at, 2.0, 1, &[])]).await.unwrap();
        }
        Scribe::new(&store, "other", Some(0)).write(&[step(9, 1.0, 1, &[])]).await.unwrap();
        let again = Scribe::new(&store, "uid", Some(1));
        again.write(&[step(2, 2.0, 1, &[])]).await.unwrap();
        assert_eq!(written(&store).await, [(1, true), (2, true)]);
        assert_eq!(read(&store, "other").await.unwrap().len(), 1);
    }
}
