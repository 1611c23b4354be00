//! The object store: manifests, and times at which nobody reaches it.

use super::Random;
use super::watchdog::Watchdog;
use crate::coordinator::manifest::Manifest;

#[derive(Default)]
pub struct Bucket {
    manifests: Vec<Manifest>,
    away_until: u64,
}

impl Bucket {
    pub fn is_reached(&self, now: u64) -> bool {
        now >= self.away_until
    }

    pub fn goes_away(&mut self, until: u64) {
        self.away_until = until;
    }

    pub fn comes_back(&mut self) {
        self.away_until = 0;
    }

    /// The newest checkpoint is lost, or turns out to be broken.
    pub fn rots(&mut self) -> Option<Manifest> {
        self.manifests.sort();
        self.manifests.pop()
    }

    /// Written last, once all blocks are there; create-only.
    pub fn put(&mut self, generation: u64, step: u64, watchdog: &Watchdog, random: &mut Random) -> Manifest {
        let key = format!("{generation}-{step}-{}", random.between(0, u64::MAX));
        let manifest = Manifest { step, generation, digest: key.clone(), key, numerics_class: String::new() };
        watchdog.manifest_written(manifest.clone());
        self.manifests.push(manifest.clone());
        manifest
    }

    pub fn has(&self, manifest: &Manifest) -> bool {
        self.manifests.contains(manifest)
    }

    /// As ranks list them.
    pub fn newest_first(&self) -> Vec<Manifest> {
        let mut all = self.manifests.clone();
        all.sort();
        all.into_iter().rev().take(16).collect()
    }
}
