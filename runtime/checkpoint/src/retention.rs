//! Mark and sweep: which checkpoints stay, and which objects go.
//!
//! Never removed: the newest complete manifest, blocks that any remaining manifest names, blocks
//! younger than the grace period (someone may be about to name them), anything of another training.

use crate::manifest::{self, BLOCKS, Manifest, ManifestError, ManifestRef, check_present, manifest_keys};
use crate::store::{Object, Store, StoreError};
use chrono::{DateTime, Utc};
use std::collections::{HashMap, HashSet};
use std::time::Duration;

/// What to keep.
#[derive(Clone, Copy, Debug)]
pub struct Retention<'a> {
    pub training_uid: &'a str,
    /// Complete manifests that stay; at least one does, whatever this says.
    pub keep: u32,
    /// Unnamed blocks younger than this stay.
    pub grace: Duration,
    /// The newest manifest of the line that is being trained: later steps of older generations are
    /// void and go.
    pub newest: &'a ManifestRef,
}

/// What a sweep removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    pub manifests: usize,
    pub blocks: usize,
    pub bytes: u64,
}

struct Found {
    key: String,
    manifest: Manifest,
    complete: bool,
}

/// Removes manifests beyond `keep` and blocks that nothing names. An error leaves only litter: the
/// next sweep goes on.
pub async fn sweep(store: &Store, retention: &Retention<'_>, now: DateTime<Utc>) -> Result<Swept, StoreError> {
    let blocks = store.list(BLOCKS).await?;
    let found = read_manifests(store, &blocks).await?;
    let doomed = doomed(&found, retention);
    let mut swept = Swept::default();
    for key in &doomed {
        store.delete(key).await?;
        swept.manifests += 1;
    }
    let staying = found.iter().filter(|one| !doomed.contains(&one.key));
    let named: HashSet<&str> =
        staying.flat_map(|one| one.manifest.blocks.iter().map(|block| block.digest.as_str())).collect();
    for block in litter(&blocks, &named, retention.grace, now) {
        store.delete(&block.key).await?;
        swept.blocks += 1;
        swept.bytes += block.bytes;
    }
    Ok(swept)
}

/// Every readable manifest. Unreadable ones are left alone: they load nothing, so their blocks
/// need no keeping.
async fn read_manifests(store: &Store, blocks: &[Object]) -> Result<Vec<Found>, StoreError> {
    let prefix = format!("{BLOCKS}/");
    let present: HashMap<String, u64> =
        blocks.iter().filter_map(|object| Some((object.key.strip_prefix(&prefix)?.to_owned(), object.bytes))).collect();
    let mut found = Vec::new();
    for (_, _, key) in manifest_keys(store).await? {
        match manifest::open_key(store, &key).await {
            Ok((_, manifest)) => {
                found.push(Found { complete: check_present(store, &manifest, &present).is_ok(), key, manifest })
            }
            Err(ManifestError::Store(error)) if !error.is_not_found() => return Err(error),
            Err(error) => tracing::warn!(%error, "manifest left alone by the sweep"),
        }
    }
    Ok(found)
}

/// Keys of the manifests that go.
fn doomed(found: &[Found], retention: &Retention<'_>) -> HashSet<String> {
    let newest = retention.newest;
    let mut ours: Vec<&Found> = found
        .iter()
        .filter(|one| one.manifest.training_uid == retention.training_uid)
        // A newer generation's are not ours to judge.
        .filter(|one| one.manifest.generation <= newest.generation)
        .collect();
    ours.sort_by_key(|one| std::cmp::Reverse((one.manifest.step, one.manifest.generation)));
    let void = |one: &Found| {
        let manifest = &one.manifest;
        manifest.step > newest.step && manifest.generation < newest.generation
    };
    let keep = retention.keep.max(1) as usize;
    let kept: HashSet<&str> =
        ours.iter().filter(|one| one.complete && !void(one)).take(keep).map(|one| one.key.as_str()).collect();
    if kept.is_empty() {
        return HashSet::new();
    }
    let gone = ours.iter().filter(|one| !kept.contains(one.key.as_str()));
    gone.map(|one| one.key.clone()).collect()
}

fn litter<'a>(blocks: &'a [Object], named: &HashSet<&str>, grace: Duration, now: DateTime<Utc>) -> Vec<&'a Object> {
    let prefix = format!("{BLOCKS}/");
    let is_litter = |object: &&Object| {
        let digest = object.key.strip_prefix(&prefix).unwrap_or_default();
        let age = (now - object.modified).to_std().unwrap_or_default();
        !named.contains(digest) && age >= grace
    };
    blocks.iter().filter(is_litter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::tests::checkpoint;
    use crate::manifest::{block_key, list_manifests, load_block};
    use bytes::Bytes;

    fn rule(newest: &ManifestRef, keep: u32, grace: Duration) -> Retention<'_> {
        Retention { training_uid: "uid", keep, grace, newest }
    }

    #[tokio::test]
    async fn old_checkpoints_go_and_shared_blocks_stay() {
        let store = Store::in_memory();
        checkpoint(&store, 1, 1, &["shared", "old"]).await;
        checkpoint(&store, 2, 1, &["shared", "middle"]).await;
        let (newest, _) = checkpoint(&store, 3, 1, &["shared", "new"]).await;
        let swept = sweep(&store, &rule(&newest, 2, Duration::ZERO), Utc::now()).await;
        let expected = Swept { manifests: 1, blocks: 1, bytes: 3 };
        assert_eq!(swept.unwrap(), expected);
        for reference in list_manifests(&store, "uid", 9).await.unwrap() {
            for block in &manifest::open(&store, &reference).await.unwrap().blocks {
                load_block(&store, block).await.unwrap();
            }
        }
    }

    #[tokio::test]
    async fn young_blocks_are_someones_unfinished_upload() {
        let store = Store::in_memory();
        let (newest, _) = checkpoint(&store, 1, 1, &["a"]).await;
        let bytes = Bytes::from_static(b"unfinished");
        let hour = Duration::from_secs(3600);
        let put = manifest::put_block(&store, bytes, hour, Utc::now()).await.unwrap();
        sweep(&store, &rule(&newest, 1, hour), Utc::now()).await.unwrap();
        assert!(store.exists(&block_key(&put.digest)).await.unwrap());
        let later = Utc::now() + chrono::TimeDelta::hours(2);
        sweep(&store, &rule(&newest, 1, hour), later).await.unwrap();
        assert!(!store.exists(&block_key(&put.digest)).await.unwrap());
    }

    #[tokio::test]
    async fn the_only_complete_checkpoint_outlives_newer_broken_ones() {
        let store = Store::in_memory();
        checkpoint(&store, 1, 1, &["good"]).await;
        let (newest, manifest) = checkpoint(&store, 2, 1, &["lost"]).await;
        store.delete(&block_key(&manifest.blocks[0].digest)).await.unwrap();
        sweep(&store, &rule(&newest, 0, Duration::ZERO), Utc::now()).await.unwrap();
        let left = list_manifests(&store, "uid", 9).await.unwrap();
        assert_eq!(left.iter().map(|m| m.step).collect::<Vec<_>>(), [1]);
    }

    #[tokio::test]
    async fn void_manifests_of_an_abandoned_line_do_not_push_out_good_ones() {
        let store = Store::in_memory();
        checkpoint(&store, 9, 1, &["void"]).await;
        let (newest, _) = checkpoint(&store, 5, 2, &["good"]).await;
        sweep(&store, &rule(&newest, 1, Duration::ZERO), Utc::now()).await.unwrap();
        let left = list_manifests(&store, "uid", 9).await.unwrap();
        assert_eq!(left, [newest]);
    }

    #[tokio::test]
    async fn another_trainings_checkpoints_are_not_touched() {
        let store = Store::in_memory();
        let (newest, mut foreign) = checkpoint(&store, 1, 1, &["mine"]).await;
        let bytes = Bytes::from_static(b"theirs");
        let put = manifest::put_block(&store, bytes, Duration::ZERO, Utc::now()).await.unwrap();
        foreign.training_uid = "other".to_owned();
        foreign.step = 8;
        foreign.blocks[0].digest = put.digest;
        foreign.blocks[0].bytes = put.bytes;
        manifest::write(&store, &foreign).await.unwrap();
        sweep(&store, &rule(&newest, 1, Duration::ZERO), Utc::now()).await.unwrap();
        let theirs = list_manifests(&store, "other", 9).await.unwrap();
        load_block(&store, &manifest::open(&store, &theirs[0]).await.unwrap().blocks[0]).await.unwrap();
    }
}
