//! Weights on the node's disk, for all pods that share the folder.
//!
//! An entry is what a URI named at one time: its key is a digest of the listing (names, sizes, versions), so that what
//! changes in the bucket is another entry. It is made in a folder of its own, with a digest of each file, and gets its
//! name in one rename: it is whole or absent. Every use reads it through and compares, since disks and half-written
//! files lie. Of each key one file is locked while an entry is made or removed (alone) or read (shared); locks go with
//! their process. What was used longest ago goes when there is no room.

mod files;

use crate::store::{StoreError, fetch, listing};
use files::{Manifest, manifest, verify};
use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

const LOOK_EVERY: Duration = Duration::from_millis(200);
const MANIFEST: &str = "manifest.json";
/// Of what is being made: the bytes that it will take.
const RESERVED: &str = "reserved";

#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
    limit_bytes: u64,
}

/// What somebody who waits for an entry is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Another process fetches the same.
    Waits,
    /// Bytes done and in all.
    Fetched(u64, u64),
    Compared(u64, u64),
}

/// Weights in the cache, not removed as long as this lives.
#[derive(Debug)]
pub struct Entry {
    /// A file, or a folder.
    pub path: PathBuf,
    folder: PathBuf,
    /// Shared.
    lock: File,
}

impl Entry {
    /// It is of no use: whoever asks next fetches it again.
    pub fn discard(self) {
        // Readers of the same have what they opened; the lock is for those who come.
        if let Err(error) = std::fs::remove_dir_all(&self.folder) {
            tracing::warn!(%error, folder = %self.folder.display(), "cannot remove an entry of the cache");
        }
        drop(self.lock);
    }
}

impl Cache {
    pub fn new(folder: PathBuf, limit_bytes: u64) -> Self {
        Self { folder, limit_bytes }
    }

    /// What is at `uri`, from the disk if it is there whole. `None`: there is no room for it, whatever is removed.
    pub async fn get(&self, uri: &str, mut told: impl FnMut(Progress) + Send) -> Result<Option<Entry>, StoreError> {
        let listed = listing(uri).await?;
        if listed.bytes > self.limit_bytes {
            return Ok(None);
        }
        std::fs::create_dir_all(&self.folder).map_err(|error| StoreError::disk(&self.folder, error))?;
        let folder = self.folder.join(&listed.key);
        let is_there = || folder.join(MANIFEST).is_file();
        let (mut fresh, mut broken) = (false, false);
        loop {
            if let Some(lock) = self.try_lock(&listed.key, File::try_lock_shared)?
                && is_there()
            {
                if fresh || self.is_whole(&folder, &mut told).await {
                    touch(&folder.join(MANIFEST));
                    return Ok(Some(Entry { path: listed.path(&folder.join("files")), folder, lock }));
                }
                broken = true;
            }
            match self.try_lock(&listed.key, File::try_lock)? {
                // Another process has made it meanwhile.
                Some(_alone) if is_there() && !broken => continue,
                Some(_alone) => {
                    remove(&folder);
                    if !self.fetch(uri, &listed.key, listed.bytes, &mut told).await? {
                        return Ok(None);
                    }
                    (fresh, broken) = (true, false);
                    continue;
                }
                None => told(Progress::Waits),
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn is_whole(&self, folder: &Path, told: &mut (impl FnMut(Progress) + Send)) -> bool {
        let Some(manifest) = Manifest::read(&folder.join(MANIFEST)) else {
            return false;
        };
        let compared = verify(&folder.join("files"), &manifest, |done, all| told(Progress::Compared(done, all))).await;
        if let Err(reason) = &compared {
            tracing::warn!(folder = %folder.display(), reason, "an entry of the cache is not what was fetched");
        }
        compared.is_ok()
    }

    /// Makes the entry, whose key this process has locked; `false` if there is no room.
    async fn fetch(
        &self,
        uri: &str,
        key: &str,
        bytes: u64,
        told: &mut (impl FnMut(Progress) + Send),
    ) -> Result<bool, StoreError> {
        let partial = self.folder.join(format!("{key}.partial"));
        if !self.reserve(&partial, bytes).await? {
            return Ok(false);
        }
        let made = self.fill(uri, key, &partial, told).await;
        if made.is_err() {
            remove(&partial);
        }
        made.map(|()| true)
    }

    async fn fill(
        &self,
        uri: &str,
        key: &str,
        partial: &Path,
        told: &mut (impl FnMut(Progress) + Send),
    ) -> Result<(), StoreError> {
        let files = partial.join("files");
        fetch(uri, &files, |done, all| told(Progress::Fetched(done, all))).await?;
        if listing(uri).await?.key != key {
            let detail = "it changed while it was being fetched; it will be fetched again".to_owned();
            return Err(StoreError::Other { uri: uri.to_owned(), detail });
        }
        let failed = |error| StoreError::disk(partial, error);
        let manifest = manifest(uri, &files).await.map_err(failed)?;
        manifest.write(&partial.join(MANIFEST)).map_err(failed)?;
        std::fs::rename(partial, self.folder.join(key)).map_err(failed)
    }

    /// Makes room and takes it, one process at a time.
    async fn reserve(&self, partial: &Path, bytes: u64) -> Result<bool, StoreError> {
        let _room = self.lock_room().await?;
        remove(partial);
        let mut entries = self.entries();
        entries.sort_by_key(|entry| entry.used);
        let mut taken: u64 = entries.iter().map(|entry| entry.bytes).sum();
        for entry in entries {
            if taken + bytes <= self.limit_bytes {
                break;
            }
            if self.remove_unused(&entry) {
                taken -= entry.bytes;
            }
        }
        if taken + bytes > self.limit_bytes {
            return Ok(false);
        }
        let failed = |error| StoreError::disk(partial, error);
        std::fs::create_dir_all(partial).map_err(failed)?;
        std::fs::write(partial.join(RESERVED), bytes.to_string()).map_err(failed)?;
        Ok(true)
    }

    fn entries(&self) -> Vec<Found> {
        let found = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        found.filter_map(|entry| Found::at(entry.path())).collect()
    }

    /// Unless somebody makes or reads it.
    fn remove_unused(&self, entry: &Found) -> bool {
        let Ok(Some(_alone)) = self.try_lock(&entry.key, File::try_lock) else {
            return false;
        };
        tracing::info!(folder = %entry.path.display(), bytes = entry.bytes, "the cache makes room");
        let gone = remove(&entry.path);
        // Who holds a lock on a file without a name looks for the one that has it.
        drop(std::fs::remove_file(self.lock_path(&entry.key)));
        gone
    }

    /// The lock under which room is made.
    async fn lock_room(&self) -> Result<File, StoreError> {
        loop {
            if let Some(lock) = self.try_lock("room", File::try_lock)? {
                return Ok(lock);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// None while others hold it.
    fn try_lock(&self, name: &str, lock: fn(&File) -> Result<(), TryLockError>) -> Result<Option<File>, StoreError> {
        let path = self.lock_path(name);
        let failed = |error| StoreError::disk(&path, error);
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        match lock(&file) {
            // It may have been removed with its entry between the two.
            Ok(()) => Ok((file.metadata().map_err(failed)?.nlink() > 0).then_some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(failed(error)),
        }
    }

    fn lock_path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.lock"))
    }
}

/// An entry on the disk, or what was begun of one.
struct Found {
    path: PathBuf,
    key: String,
    bytes: u64,
    used: SystemTime,
}

impl Found {
    fn at(path: PathBuf) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let (key, bytes, dated) = match name.strip_suffix(".partial") {
            Some(key) => {
                let reserved = path.join(RESERVED);
                (key.to_owned(), std::fs::read_to_string(&reserved).ok()?.parse().ok()?, reserved)
            }
            None => (name.to_owned(), Manifest::read(&path.join(MANIFEST))?.bytes(), path.join(MANIFEST)),
        };
        let used = std::fs::metadata(dated).and_then(|metadata| metadata.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        Some(Self { path, key, bytes, used })
    }
}

fn touch(path: &Path) {
    let touched = File::options().write(true).open(path).and_then(|file| file.set_modified(SystemTime::now()));
    if let Err(error) = touched {
        tracing::warn!(%error, path = %path.display(), "cannot note that an entry of the cache is used");
    }
}

fn remove(folder: &Path) -> bool {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, folder = %folder.display(), "cannot remove a folder of the cache");
            false
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests;
