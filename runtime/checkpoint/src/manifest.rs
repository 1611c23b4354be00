//! Blocks by digest, and the manifest that makes them a checkpoint.
//!
//! ```text
//! <store>/blocks/<blake3 hex>                             bytes of a block
//! <store>/manifests/<step:010>-<generation:06>.json       written last, create-only
//! ```

use crate::store::{Put, Store, StoreError};
use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::time::Duration;

/// Raised when older code could misread what newer code writes.
pub const FORMAT_VERSION: u32 = 1;
/// Blocks in a manifest, at most: about 4 TB of state at 4 MiB each.
pub const BLOCKS_LIMIT: usize = 1 << 20;
pub(crate) const BLOCKS: &str = "blocks";
pub(crate) const MANIFESTS: &str = "manifests";

/// A complete checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    pub format_version: u32,
    /// UID of the VicunaTraining: state of a namesake is never taken for one's own.
    pub training_uid: String,
    /// Digest of everything that decides the weights.
    pub recipe_digest: String,
    /// Of the ranks that computed it, as they say it themselves; empty in manifests of earlier releases. State that goes on
    /// on another class would not be what an undisturbed run comes to.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub numerics_class: String,
    /// What the recipe names by URIs only.
    #[serde(default)]
    pub inputs: Inputs,
    pub generation: u64,
    /// The last step applied; 0 is the untrained model.
    pub step: u64,
    /// Steps that changed the weights: those without a trained token did not.
    pub updates: u64,
    /// Where the next step's samples start.
    pub cursor: Cursor,
    /// In block order.
    pub blocks: Vec<BlockEntry>,
}

/// Digests of what was read, hex: the same URI may hold something else later. Absent where it is unknown, as in
/// manifests of earlier releases, or where nothing depends on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Inputs {
    /// Of all sequences as they are trained on and held out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// Of the frozen base's weights, where adapters are trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    pub epoch: u64,
    /// Sequences of the epoch already seen.
    pub offset: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockEntry {
    pub name: String,
    /// BLAKE3 of the bytes, hex.
    pub digest: String,
    pub bytes: u64,
}

/// Names one manifest and its exact content.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ManifestRef {
    pub step: u64,
    pub generation: u64,
    /// Object key below the store's URI.
    pub key: String,
    /// BLAKE3 of the manifest's bytes, hex.
    pub digest: String,
    /// As the manifest has it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub numerics_class: String,
}

impl Manifest {
    fn reference(&self, key: String, digest: String) -> ManifestRef {
        let Self { step, generation, numerics_class, .. } = self;
        ManifestRef { step: *step, generation: *generation, key, digest, numerics_class: numerics_class.clone() }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the manifest {uri} cannot be used ({detail}): an older one must serve")]
    Manifest { uri: String, detail: String },
    #[error("block {name:?} of the checkpoint, {uri}, is damaged ({detail}): an older one must serve")]
    Block { name: String, uri: String, detail: String },
    #[error("{uri} was written by someone else with other content: this rank's generation is over")]
    Conflict { uri: String },
}

impl ManifestError {
    /// Whether the same checkpoint may load later, as when the store is away.
    pub fn is_transient(&self) -> bool {
        match self {
            // Credentials and buckets come back by someone's hand; the checkpoint is not to blame.
            Self::Store(error) => !error.is_not_found(),
            _ => false,
        }
    }
}

/// BLAKE3 of some bytes, hex.
pub fn digest(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

pub(crate) fn block_key(digest: &str) -> String {
    format!("{BLOCKS}/{digest}")
}

fn manifest_key(step: u64, generation: u64) -> String {
    format!("{MANIFESTS}/{step:010}-{generation:06}.json")
}

/// Reads step and generation from a manifest's key.
pub(crate) fn parse_key(key: &str) -> Option<(u64, u64)> {
    let name = key.strip_prefix(MANIFESTS)?.strip_prefix('/')?;
    let (step, generation) = name.strip_suffix(".json")?.split_once('-')?;
    Some((step.parse().ok()?, generation.parse().ok()?))
}

/// A block that was or is now in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub digest: String,
    pub bytes: u64,
    /// False if it was there already.
    pub written: bool,
}

/// Uploads a block unless the store has it. One that is there but older than `refresh` is written
/// again, so that a sweep which takes it for litter cannot remove it under a new manifest.
pub async fn put_block(
    store: &Store,
    bytes: Bytes,
    refresh: Duration,
    now: DateTime<Utc>,
) -> Result<Stored, StoreError> {
    let digest = digest(&bytes);
    let key = block_key(&digest);
    let size = bytes.len() as u64;
    let there = store.stat(&key).await?;
    let fresh = there.is_some_and(|object| {
        let age = (now - object.modified).to_std().unwrap_or_default();
        object.bytes == size && age < refresh
    });
    if !fresh {
        store.put(&key, bytes).await?;
    }
    Ok(Stored { digest, bytes: size, written: !fresh })
}

/// Writes the manifest after making sure that every block is there in full size. Writing the same
/// manifest again succeeds; another one of the same step and generation is a conflict.
pub async fn write(store: &Store, manifest: &Manifest) -> Result<ManifestRef, ManifestError> {
    let key = manifest_key(manifest.step, manifest.generation);
    let uri = store.uri_of(&key);
    check_present(store, manifest, &present_blocks(store).await?)?;
    let text = serde_json::to_vec(manifest)
        .map_err(|error| ManifestError::Manifest { uri: uri.clone(), detail: error.to_string() })?;
    let bytes = Bytes::from(text);
    let digest = digest(&bytes);
    if store.put_if_absent(&key, bytes.clone()).await? == Put::Exists && store.get(&key).await? != bytes {
        return Err(ManifestError::Conflict { uri });
    }
    Ok(manifest.reference(key, digest))
}

/// Digest → bytes of every block in the store.
pub(crate) async fn present_blocks(store: &Store) -> Result<HashMap<String, u64>, StoreError> {
    let listed = store.list(BLOCKS).await?;
    let prefix = format!("{BLOCKS}/");
    let named = listed.into_iter().filter_map(|object| {
        let digest = object.key.strip_prefix(&prefix)?.to_owned();
        Some((digest, object.bytes))
    });
    Ok(named.collect())
}

/// Fails with the first block that is missing or of the wrong size.
pub(crate) fn check_present(
    store: &Store,
    manifest: &Manifest,
    present: &HashMap<String, u64>,
) -> Result<(), ManifestError> {
    for block in &manifest.blocks {
        let detail = match present.get(&block.digest) {
            Some(bytes) if *bytes == block.bytes => continue,
            Some(bytes) => format!("it has {bytes} bytes, not {}", block.bytes),
            None => "it does not exist".to_owned(),
        };
        return Err(damaged(store, block, detail));
    }
    Ok(())
}

fn damaged(store: &Store, block: &BlockEntry, detail: String) -> ManifestError {
    ManifestError::Block { name: block.name.clone(), uri: store.uri_of(&block_key(&block.digest)), detail }
}

/// The complete manifests of a training, newest step first and of one step the newest generation,
/// at most `limit`. One that is unreadable or lacks a block is passed over with a warning.
pub async fn list_manifests(store: &Store, training_uid: &str, limit: usize) -> Result<Vec<ManifestRef>, StoreError> {
    let mut keys = manifest_keys(store).await?;
    keys.sort_unstable_by(|a, b| b.cmp(a));
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    let present = present_blocks(store).await?;
    let mut found = Vec::new();
    for (_, _, key) in keys {
        if found.len() == limit {
            break;
        }
        match open_key(store, &key).await {
            Ok((_, manifest)) if manifest.training_uid != training_uid => {}
            Ok((reference, manifest)) => match check_present(store, &manifest, &present) {
                Ok(()) => found.push(reference),
                Err(error) => tracing::warn!(%error, "checkpoint passed over"),
            },
            Err(ManifestError::Store(error)) if !error.is_not_found() => return Err(error),
            Err(error) => tracing::warn!(%error, "checkpoint passed over"),
        }
    }
    Ok(found)
}

/// (step, generation, key) of everything that is named like a manifest.
pub(crate) async fn manifest_keys(store: &Store) -> Result<Vec<(u64, u64, String)>, StoreError> {
    let listed = store.list(MANIFESTS).await?;
    let parsed = listed.into_iter().filter_map(|object| {
        let (step, generation) = parse_key(&object.key)?;
        Some((step, generation, object.key))
    });
    Ok(parsed.collect())
}

/// Reads a manifest and checks that it is what its name says.
pub(crate) async fn open_key(store: &Store, key: &str) -> Result<(ManifestRef, Manifest), ManifestError> {
    let bytes = store.get(key).await?;
    let unusable = |detail: String| ManifestError::Manifest { uri: store.uri_of(key), detail };
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|error| unusable(error.to_string()))?;
    if manifest.format_version != FORMAT_VERSION {
        let version = manifest.format_version;
        return Err(unusable(format!("format version {version}, this program reads {FORMAT_VERSION}")));
    }
    if parse_key(key) != Some((manifest.step, manifest.generation)) {
        return Err(unusable("its content and its name differ".to_owned()));
    }
    if manifest.blocks.len() > BLOCKS_LIMIT {
        return Err(unusable(format!("more than {BLOCKS_LIMIT} blocks")));
    }
    Ok((manifest.reference(key.to_owned(), digest(&bytes)), manifest))
}

/// Reads the manifest that `reference` names, and no other content under its key.
pub async fn open(store: &Store, reference: &ManifestRef) -> Result<Manifest, ManifestError> {
    let opened = open_key(store, &reference.key).await;
    let (found, manifest) = opened.map_err(|error| match error {
        ManifestError::Store(StoreError::NotFound { uri }) => {
            ManifestError::Manifest { uri, detail: "it does not exist".to_owned() }
        }
        other => other,
    })?;
    if found.digest != reference.digest {
        return Err(ManifestError::Manifest {
            uri: store.uri_of(&reference.key),
            detail: format!("digest {}, not {}", found.digest, reference.digest),
        });
    }
    Ok(manifest)
}

/// A block's bytes, verified.
pub async fn load_block(store: &Store, block: &BlockEntry) -> Result<Bytes, ManifestError> {
    let bytes = match store.get(&block_key(&block.digest)).await {
        Err(StoreError::NotFound { .. }) => {
            return Err(damaged(store, block, "it does not exist".to_owned()));
        }
        other => other?,
    };
    if bytes.len() as u64 != block.bytes {
        let detail = format!("it has {} bytes, not {}", bytes.len(), block.bytes);
        return Err(damaged(store, block, detail));
    }
    if digest(&bytes) != block.digest {
        return Err(damaged(store, block, "its bytes do not match its name".to_owned()));
    }
    Ok(bytes)
}

#[cfg(test)]
pub(crate) mod tests;
