//! Checkpoints of a generation: copied at a boundary between steps, uploaded behind the training.
//!
//! Every rank uploads the blocks that it owns and tells rank 0; rank 0 writes the manifest and tells
//! everyone. So all ranks know when a checkpoint is complete, and none starts another before that.

use crate::blocks::BlockTable;
use crate::collective::{Collective, CollectiveError, Kind, Tag};
use crate::layout::Layout;
use crate::state::BlockState;
use crate::step::Engine;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use vicuna_checkpoint::manifest::{self, FORMAT_VERSION};
use vicuna_checkpoint::now;
use vicuna_checkpoint::retention::{Retention, sweep};
use vicuna_checkpoint::{BlockEntry, Cursor, Inputs, Manifest, ManifestError, ManifestRef, Store, StoreError};

/// Blocks on their way at a time.
const TRANSFERS: usize = 4;
/// Unnamed blocks younger than this belong to an upload that may still be going on.
const GRACE: Duration = Duration::from_secs(300);
/// A block that is in the store is written again when it is older: half the grace, so that no sweep
/// takes it before the manifest names it.
const REFRESH: Duration = Duration::from_secs(150);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error("rank 0 could not write the manifest: {0}")]
    NotWritten(String),
    #[error("the checkpoint was given up for a newer one")]
    GivenUp,
}

/// What all checkpoints of a generation have in common.
#[derive(Clone)]
pub struct Publisher {
    pub store: Store,
    pub runtime: Handle,
    pub collective: Arc<dyn Collective>,
    pub table: Arc<BlockTable>,
    pub layout: Layout,
    pub training_uid: String,
    pub recipe_digest: String,
    pub numerics_class: String,
    pub inputs: Inputs,
    pub generation: u64,
    pub keep: u32,
}

/// A copy of the own blocks as they were after a step.
#[derive(Debug)]
pub struct Snapshot {
    pub step: u64,
    pub updates: u64,
    pub cursor: Cursor,
    blocks: Vec<(usize, Bytes)>,
    pub progress: Arc<Progress>,
    /// How long the copy held up the training.
    pub stall: Duration,
    /// The time to the next one, for people.
    pub interval: Duration,
}

/// How far this rank's part of an upload is.
#[derive(Debug)]
pub struct Progress {
    bytes: u64,
    written: AtomicU64,
    /// Nanoseconds that writing took. Those in which the store was away say nothing of its speed.
    busy: AtomicU64,
}

impl Progress {
    fn of(bytes: u64) -> Self {
        Self { bytes, written: AtomicU64::new(0), busy: AtomicU64::new(0) }
    }

    /// So much more is written, which took so long.
    fn wrote(&self, bytes: u64, took: Duration) {
        self.busy.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.written.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether what is left of it is done by `end`, and another upload as large that begins now would not be, both at the
    /// speed so far. Before anything is written there is none.
    pub fn is_worth_finishing(&self, now: Instant, end: Instant) -> bool {
        // Blocks of a round that was tried again are counted twice.
        let written = self.written.load(Ordering::Relaxed).min(self.bytes);
        let left = end.saturating_duration_since(now);
        let taken = Duration::from_nanos(self.busy.load(Ordering::Relaxed));
        let takes = |bytes: u64| taken.mul_f64(bytes as f64 / written as f64);
        written > 0 && takes(self.bytes - written) <= left && takes(self.bytes) > left
    }
}

/// A complete checkpoint.
#[derive(Clone, Debug)]
pub struct Published {
    pub manifest: ManifestRef,
    pub uri: String,
    /// By this rank.
    pub bytes_written: u64,
    pub stall: Duration,
    pub upload: Duration,
    pub interval: Duration,
}

/// One block in the store, as a rank reports it to rank 0.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct StoredBlock {
    block: usize,
    digest: String,
    bytes: u64,
}

/// Rank 0's word to the others.
type Verdict = Result<ManifestRef, String>;

impl Snapshot {
    pub fn take(engine: &Engine, rank: usize, cursor: Cursor) -> Self {
        let started = Instant::now();
        let copy = |index: usize| Some((index, Bytes::from(engine.blocks.get(&index)?.to_bytes())));
        let blocks: Vec<(usize, Bytes)> = engine.layout.owned(rank).filter_map(copy).collect();
        let bytes = blocks.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        Self {
            step: engine.step,
            updates: engine.updates,
            cursor,
            blocks,
            progress: Arc::new(Progress::of(bytes)),
            stall: started.elapsed(),
            interval: Duration::ZERO,
        }
    }
}

impl Publisher {
    /// Uploads the snapshot and waits until its manifest is written. Trouble with the store is told
    /// to `trouble` and tried again until it works or `cancel` is called.
    pub fn publish(
        &self,
        snapshot: Snapshot,
        cancel: &CancellationToken,
        trouble: &dyn Fn(&StoreError),
    ) -> Result<Published, CheckpointError> {
        let started = Instant::now();
        let (step, stall, interval) = (snapshot.step, snapshot.stall, snapshot.interval);
        let (stored, bytes_written) = self.upload(&snapshot, cancel, trouble)?;
        let manifest = if self.collective.rank() == 0 {
            self.write_manifest(&snapshot, stored, cancel, trouble)?
        } else {
            self.collective.send(0, Tag::new(Kind::Stored, step), &encode(&stored))?;
            let payload = self.collective.receive(0, Tag::new(Kind::Manifest, step), cancel)?;
            let verdict: Verdict = decode(&payload, "rank 0")?;
            verdict.map_err(CheckpointError::NotWritten)?
        };
        Ok(Published {
            uri: self.store.uri_of(&manifest.key),
            manifest,
            bytes_written,
            stall,
            upload: started.elapsed(),
            interval,
        })
    }

    fn upload(
        &self,
        snapshot: &Snapshot,
        cancel: &CancellationToken,
        trouble: &dyn Fn(&StoreError),
    ) -> Result<(Vec<StoredBlock>, u64), CheckpointError> {
        let mut stored = Vec::with_capacity(snapshot.blocks.len());
        let mut written = 0;
        // In rounds, so that trouble does not throw away what is done.
        for round in snapshot.blocks.chunks(8 * TRANSFERS) {
            let puts = retry(&self.runtime, cancel, trouble, || self.put_all(round, &snapshot.progress))?;
            for ((block, _), put) in round.iter().zip(puts) {
                written += if put.written { put.bytes } else { 0 };
                stored.push(StoredBlock { block: *block, digest: put.digest, bytes: put.bytes });
            }
        }
        Ok((stored, written))
    }

    async fn put_all(
        &self,
        blocks: &[(usize, Bytes)],
        progress: &Progress,
    ) -> Result<Vec<manifest::Stored>, StoreError> {
        let store = &self.store;
        // From one block that is written to the next, since several are under way at a time.
        let since = &Cell::new(Instant::now());
        let puts = blocks.iter().map(|(_, bytes)| async move {
            let stored = manifest::put_block(store, bytes.clone(), REFRESH, now()).await?;
            progress.wrote(stored.bytes, since.replace(Instant::now()).elapsed());
            Ok(stored)
        });
        futures::stream::iter(puts).buffered(TRANSFERS).try_collect().await
    }

    /// Rank 0's part: hears from all owners, writes, tells everyone, sweeps.
    fn write_manifest(
        &self,
        snapshot: &Snapshot,
        own: Vec<StoredBlock>,
        cancel: &CancellationToken,
        trouble: &dyn Fn(&StoreError),
    ) -> Result<ManifestRef, CheckpointError> {
        let manifest = self.manifest(snapshot, self.hear_all(snapshot.step, own, cancel)?);
        let written = retry_manifest(&self.runtime, cancel, trouble, || manifest::write(&self.store, &manifest));
        let verdict: Verdict = written.as_ref().map(Clone::clone).map_err(ToString::to_string);
        self.collective.broadcast(Tag::new(Kind::Manifest, snapshot.step), &encode(&verdict))?;
        let written = written?;
        self.sweep(&written);
        Ok(written)
    }

    fn hear_all(
        &self,
        step: u64,
        own: Vec<StoredBlock>,
        cancel: &CancellationToken,
    ) -> Result<BTreeMap<usize, StoredBlock>, CheckpointError> {
        let world = self.collective.world();
        let mut all: BTreeMap<usize, StoredBlock> = own.into_iter().map(|one| (one.block, one)).collect();
        for rank in 1..world {
            let payload = self.collective.receive(rank, Tag::new(Kind::Stored, step), cancel)?;
            let stored: Vec<StoredBlock> = decode(&payload, &format!("rank {rank}"))?;
            let known = |one: &StoredBlock| one.block < self.table.blocks.len();
            let owned = stored.into_iter().filter(|one| known(one) && self.layout.owner(one.block) == rank);
            all.extend(owned.map(|one| (one.block, one)));
        }
        if all.len() == self.table.blocks.len() {
            return Ok(all);
        }
        let detail = format!("{} of {} blocks were reported", all.len(), self.table.blocks.len());
        Err(CollectiveError::Protocol { peer: "a rank".to_owned(), detail }.into())
    }

    fn manifest(&self, snapshot: &Snapshot, stored: BTreeMap<usize, StoredBlock>) -> Manifest {
        let entries = self.table.blocks.iter().zip(stored.into_values());
        Manifest {
            format_version: FORMAT_VERSION,
            training_uid: self.training_uid.clone(),
            recipe_digest: self.recipe_digest.clone(),
            numerics_class: self.numerics_class.clone(),
            inputs: self.inputs.clone(),
            generation: self.generation,
            step: snapshot.step,
            updates: snapshot.updates,
            cursor: snapshot.cursor,
            blocks: entries
                .map(|(block, stored)| BlockEntry {
                    name: block.name.clone(),
                    digest: stored.digest,
                    bytes: stored.bytes,
                })
                .collect(),
        }
    }

    /// Litter is no reason to fail: the next sweep takes it.
    fn sweep(&self, newest: &ManifestRef) {
        let retention = Retention { training_uid: &self.training_uid, keep: self.keep, grace: GRACE, newest };
        match self.runtime.block_on(sweep(&self.store, &retention, now())) {
            Ok(swept) => tracing::debug!(?swept, "old checkpoints swept"),
            Err(error) => tracing::warn!(%error, "old checkpoints could not be swept"),
        }
    }
}

/// Reads a manifest, which must be of this model and recipe.
pub async fn open(
    store: &Store,
    reference: &ManifestRef,
    table: &BlockTable,
    recipe_digest: &str,
) -> Result<Manifest, ManifestError> {
    let manifest = manifest::open(store, reference).await?;
    check_fits(store, reference, &manifest, table, recipe_digest)?;
    Ok(manifest)
}

/// Reads and verifies some of its blocks, whatever world wrote them.
pub async fn load(
    store: &Store,
    reference: &ManifestRef,
    manifest: &Manifest,
    table: &BlockTable,
    blocks: &[usize],
) -> Result<BTreeMap<usize, BlockState>, ManifestError> {
    let fetch = |index: usize| {
        let (entry, elements) = (&manifest.blocks[index], table.blocks[index].elements);
        async move {
            let bytes = manifest::load_block(store, entry).await?;
            let block = BlockState::from_bytes(&bytes, elements);
            let block = block.ok_or_else(|| unusable(store, reference, "a block has another size"))?;
            Ok::<_, ManifestError>((index, block))
        }
    };
    let fetched = futures::stream::iter(blocks.iter().copied().map(fetch));
    fetched.buffered(TRANSFERS).try_collect().await
}

fn check_fits(
    store: &Store,
    reference: &ManifestRef,
    manifest: &Manifest,
    table: &BlockTable,
    recipe_digest: &str,
) -> Result<(), ManifestError> {
    let names = manifest.blocks.iter().map(|block| &block.name);
    if !names.eq(table.blocks.iter().map(|block| &block.name)) {
        return Err(unusable(store, reference, "it was cut for another model"));
    }
    if manifest.recipe_digest != recipe_digest {
        return Err(unusable(store, reference, "it belongs to another recipe"));
    }
    Ok(())
}

fn unusable(store: &Store, reference: &ManifestRef, detail: &str) -> ManifestError {
    ManifestError::Manifest { uri: store.uri_of(&reference.key), detail: detail.to_owned() }
}

/// Tries until it works, with growing pauses; whatever a store's trouble is, its end needs no help
/// from here.
pub fn retry<T, F: Future<Output = Result<T, StoreError>>>(
    runtime: &Handle,
    cancel: &CancellationToken,
    trouble: &dyn Fn(&StoreError),
    attempt: impl Fn() -> F,
) -> Result<T, CheckpointError> {
    let wrapped = || async { attempt().await.map_err(ManifestError::Store) };
    retry_manifest(runtime, cancel, trouble, wrapped)
}

/// The same for what may also fail because of a checkpoint's content, which is final.
pub fn retry_manifest<T, F: Future<Output = Result<T, ManifestError>>>(
    runtime: &Handle,
    cancel: &CancellationToken,
    trouble: &dyn Fn(&StoreError),
    attempt: impl Fn() -> F,
) -> Result<T, CheckpointError> {
    let mut pause = FIRST_PAUSE;
    loop {
        let done = runtime.block_on(async { cancel.run_until_cancelled(attempt()).await });
        match done.ok_or(CheckpointError::GivenUp)? {
            Ok(value) => return Ok(value),
            Err(ManifestError::Store(error)) => {
                tracing::warn!(%error, "the store is in the way; trying again");
                trouble(&error);
            }
            Err(error) => return Err(error.into()),
        }
        let waited = runtime.block_on(async { cancel.run_until_cancelled(tokio::time::sleep(pause)).await });
        waited.ok_or(CheckpointError::GivenUp)?;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    // Plain structs of strings and numbers always serialise.
    serde_json::to_vec(value).unwrap_or_default()
}

fn decode<T: for<'a> Deserialize<'a>>(payload: &[u8], peer: &str) -> Result<T, CollectiveError> {
    serde_json::from_slice(payload)
        .map_err(|error| CollectiveError::Protocol { peer: peer.to_owned(), detail: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upload_is_worth_finishing_where_its_rest_is_in_time_and_a_new_one_would_not_be() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        // 8 of 10 bytes in 8 s: the rest takes 2 s, a new one 10 s.
        let progress = Progress::of(10);
        (0..4).for_each(|_| progress.wrote(2, 2 * second));
        let worth = |seconds: u32| progress.is_worth_finishing(now, now + seconds * second);
        assert_eq!([1, 3, 9, 11].map(worth), [false, true, true, false]);
        let untouched = Progress { written: AtomicU64::new(0), ..progress };
        assert!(!untouched.is_worth_finishing(now, now + second), "its speed is not known");
    }
}
