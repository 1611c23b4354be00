//! Which checkpoint a generation starts from.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use vicuna_protocol::coordinator::ManifestRef;

/// Manifests remembered of one training, at most: the newest.
const MAX_KNOWN: usize = 64;
/// Bases remembered in a record, at most: the newest.
const MAX_HISTORY: usize = 256;

/// A complete checkpoint, as ranks see it in the bucket. Ordered by step, then by generation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    pub step: u64,
    pub generation: u64,
    pub key: String,
    pub digest: String,
    /// Of the ranks that wrote it; empty where they did not say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub numerics_class: String,
}

impl From<ManifestRef> for Manifest {
    fn from(reference: ManifestRef) -> Self {
        let ManifestRef { step, generation, key, digest, numerics_class } = reference;
        Self { step, generation, key, digest, numerics_class }
    }
}

impl From<Manifest> for ManifestRef {
    fn from(manifest: Manifest) -> Self {
        let Manifest { step, generation, key, digest, numerics_class } = manifest;
        Self { step, generation, key, digest, numerics_class }
    }
}

/// Where a generation started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Base {
    pub generation: u64,
    pub step: u64,
}

/// Whether a manifest lies on a branch that was given up: its generation is older than one that
/// started before its step (design.md, Checkpoints).
pub fn is_void(manifest: &Manifest, history: &[Base]) -> bool {
    history.iter().any(|base| base.generation > manifest.generation && base.step < manifest.step)
}

/// Adds a base and drops those that say nothing beyond it: an older generation with a later start
/// voids nothing that the new one does not.
pub fn extend_history(history: &mut Vec<Base>, base: Base) {
    history.retain(|older| older.step < base.step);
    history.push(base);
    let surplus = history.len().saturating_sub(MAX_HISTORY);
    history.drain(..surplus);
}

/// What ranks have said about the bucket.
#[derive(Clone, Debug, Default)]
pub struct Manifests {
    known: BTreeSet<Manifest>,
    /// Keys that could not be loaded.
    unusable: BTreeSet<String>,
}

impl Manifests {
    pub fn learn(&mut self, manifests: impl IntoIterator<Item = Manifest>) {
        self.known.extend(manifests);
        while self.known.len() > MAX_KNOWN {
            self.known.pop_first();
        }
    }

    /// Never chooses this one again. `false` when that was known.
    pub fn exclude(&mut self, manifest: &Manifest) -> bool {
        while self.unusable.len() >= MAX_KNOWN {
            self.unusable.pop_first();
        }
        self.unusable.insert(manifest.key.clone())
    }

    /// The newest generation that left one.
    pub fn generation(&self) -> u64 {
        self.known.iter().map(|manifest| manifest.generation).max().unwrap_or(0)
    }

    /// The newest manifest that is neither void, nor unusable, nor of a generation that the record
    /// has not issued. `None`: start from the base model.
    pub fn newest_valid(&self, generation: u64, history: &[Base]) -> Option<&Manifest> {
        self.known.iter().rev().find(|manifest| {
            manifest.generation <= generation && !self.unusable.contains(&manifest.key) && !is_void(manifest, history)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn manifest(generation: u64, step: u64) -> Manifest {
        let key = format!("manifests/{generation}-{step}");
        Manifest { step, generation, key, digest: "d".to_owned(), numerics_class: String::new() }
    }

    #[test]
    fn what_a_given_up_branch_wrote_is_void() {
        let history = [Base { generation: 2, step: 10 }, Base { generation: 3, step: 20 }];
        assert!(is_void(&manifest(1, 11), &history));
        assert!(!is_void(&manifest(1, 10), &history));
        assert!(!is_void(&manifest(2, 20), &history));
        assert!(is_void(&manifest(2, 21), &history));
        assert!(!is_void(&manifest(3, 99), &history));
    }

    #[test]
    fn the_newest_valid_manifest_is_the_base() {
        let mut manifests = Manifests::default();
        manifests.learn([manifest(1, 5), manifest(1, 12), manifest(2, 9)]);
        let history = [Base { generation: 2, step: 5 }];
        assert_eq!(manifests.newest_valid(2, &history), Some(&manifest(2, 9)));
        assert!(manifests.exclude(&manifest(2, 9)));
        assert_eq!(manifests.newest_valid(2, &history), Some(&manifest(1, 5)));
        manifests.exclude(&manifest(1, 5));
        assert_eq!(manifests.newest_valid(2, &history), None);
    }

    #[test]
    fn a_manifest_of_an_unissued_generation_is_not_ours() {
        let mut manifests = Manifests::default();
        manifests.learn([manifest(7, 100)]);
        assert_eq!(manifests.newest_valid(3, &[]), None);
    }

    #[test]
    fn pruned_history_voids_the_same() {
        let bases = [(1, 0), (2, 7), (3, 7), (4, 3), (5, 3), (6, 9)];
        let all: Vec<Base> = bases.map(|(generation, step)| Base { generation, step }).into();
        let mut pruned = Vec::new();
        for base in &all {
            extend_history(&mut pruned, *base);
        }
        assert!(pruned.len() < all.len());
        for generation in 0..8 {
            for step in 0..12 {
                let probe = manifest(generation, step);
                assert_eq!(is_void(&probe, &all), is_void(&probe, &pruned), "{probe:?}");
            }
        }
    }
}
