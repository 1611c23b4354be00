//! The files of an entry and their digests.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

const PIECE_BYTES: usize = 4 << 20;

/// What an entry holds, by relative path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Where it came from, for people who look.
    uri: String,
    files: BTreeMap<String, Held>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    bytes: u64,
    blake3: String,
}

impl Manifest {
    /// None where there is none that can be read.
    pub fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    pub fn write(&self, path: &Path) -> io::Result<()> {
        std::fs::write(path, serde_json::to_vec_pretty(self)?)
    }

    pub fn bytes(&self) -> u64 {
        self.files.values().map(|file| file.bytes).sum()
    }
}

/// Of all files below `folder`, as they are.
pub async fn manifest(uri: &str, folder: &Path) -> io::Result<Manifest> {
    let (uri, folder) = (uri.to_owned(), folder.to_owned());
    let made = tokio::task::spawn_blocking(move || {
        let mut manifest = Manifest { uri, files: BTreeMap::new() };
        for path in below(&folder)? {
            let held = held(&path, |_| ())?;
            let name = path.strip_prefix(&folder).unwrap_or(&path).to_string_lossy().into_owned();
            manifest.files.insert(name, held);
        }
        Ok(manifest)
    });
    made.await?
}

/// Compares the files with what the manifest says; the error is what differs. `told`: bytes done, bytes in all.
pub async fn verify(folder: &Path, manifest: &Manifest, mut told: impl FnMut(u64, u64) + Send) -> Result<(), String> {
    let (folder, manifest, all) = (folder.to_owned(), manifest.clone(), manifest.bytes());
    let (done, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let comparing = tokio::task::spawn_blocking(move || {
        manifest.files.iter().try_for_each(|(name, expected)| {
            let path = folder.join(name);
            let told = |bytes| {
                // Whoever does not listen any more does not want to know.
                let _ = done.send(bytes);
            };
            let found = held(&path, told).map_err(|error| format!("{name}: {error}"))?;
            if found == *expected { Ok(()) } else { Err(format!("{name} differs")) }
        })
    });
    let mut sum = 0;
    while let Some(bytes) = heard.recv().await {
        sum += bytes;
        told(sum, all);
    }
    comparing.await.map_err(|error| error.to_string())?
}

fn below(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            match entry.file_type()?.is_dir() {
                true => folders.push(entry.path()),
                false => found.push(entry.path()),
            }
        }
    }
    Ok(found)
}

fn held(path: &Path, mut read: impl FnMut(u64)) -> io::Result<Held> {
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut piece = vec![0; PIECE_BYTES];
    let mut bytes = 0;
    loop {
        let count = file.read(&mut piece)?;
        if count == 0 {
            return Ok(Held { bytes, blake3: hasher.finalize().to_hex().to_string() });
        }
        hasher.update(&piece[..count]);
        bytes += count as u64;
        read(count as u64);
    }
}
