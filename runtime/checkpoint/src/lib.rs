//! Object storage, content-addressed blocks and manifests. No torch, no Kubernetes.
//!
//! A checkpoint is a set of *blocks*, objects named by the BLAKE3 of their bytes, and a *manifest*
//! that lists them and is written last, create-only. So a checkpoint is either complete or does
//! not exist, unchanged blocks are written once, and anything read back proves itself.
//!
//! - [`store`]: one API over S3 and local folders, with errors that a user can act on;
//! - [`manifest`]: writing, listing and verified loading of checkpoints;
//! - [`retention`]: mark and sweep;
//! - [`cache`]: weights on a node's disk, verified and bounded, for all pods that share the folder.

pub mod cache;
pub mod manifest;
pub mod retention;
pub mod store;

pub use cache::Cache;
pub use manifest::{BlockEntry, Cursor, Inputs, Manifest, ManifestError, ManifestRef};
pub use store::{Store, StoreError, fetch, sizes, upload_dir};

/// The clock against which ages of objects are measured.
pub fn now() -> chrono::DateTime<chrono::Utc> {
    chrono::Utc::now()
}
