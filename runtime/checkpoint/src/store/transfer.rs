//! Whole folders between a store and the disk, in bounded memory.

use super::{Object, Store, StoreError};
use object_store::ObjectStoreExt;
use object_store::buffered::BufWriter;
use std::path::{Component, Path, PathBuf};
use tokio::fs::File;
use tokio::io::{AsyncWriteExt, BufReader};

/// Bytes of one request; also the memory that a transfer needs.
const CHUNK_BYTES: u64 = 8 << 20;

/// Parts of one upload, at most, as S3 has it.
const PARTS_LIMIT: u64 = 10_000;
/// Parts are whole multiples of this.
const PART_STEP_BYTES: u64 = 1 << 20;

/// Copies the object at `uri`, or every object below it, to `dest_dir`, which is made. Returns the
/// local path of what `uri` names: a file below `dest_dir`, or `dest_dir` itself. Files that are
/// there in full size are kept: `dest_dir` must belong to this URI alone. `progress` is told
/// (bytes done, bytes in all).
pub async fn fetch(
    uri: &str,
    dest_dir: &Path,
    mut progress: impl FnMut(u64, u64) + Send,
) -> Result<PathBuf, StoreError> {
    let store = Store::open(uri)?;
    let (objects, result) = find(&store, dest_dir).await?;
    let total = objects.iter().map(|object| object.bytes).sum();
    let mut done = 0;
    for object in &objects {
        let target = local_path(&store, dest_dir, &object.key)?;
        download(&store, object, &target, |bytes| {
            done += bytes;
            progress(done, total);
        })
        .await?;
    }
    Ok(result)
}

/// Name and bytes of every object that [`fetch`] would copy.
pub async fn sizes(uri: &str) -> Result<Vec<(String, u64)>, StoreError> {
    let store = Store::open(uri)?;
    let (objects, path) = find(&store, Path::new("")).await?;
    let name = |key: String| if key.is_empty() { path.display().to_string() } else { key };
    Ok(objects.into_iter().map(|object| (name(object.key), object.bytes)).collect())
}

/// What a URI names at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// A digest of the URI and of the names, sizes and versions of all objects.
    pub key: String,
    pub bytes: u64,
    /// The name of the one file, if it is one.
    file: Option<String>,
}

impl Listing {
    /// What the URI names, below the folder that it was fetched to.
    pub fn path(&self, folder: &Path) -> PathBuf {
        self.file.as_ref().map_or_else(|| folder.to_owned(), |name| folder.join(name))
    }
}

pub async fn listing(uri: &str) -> Result<Listing, StoreError> {
    let store = Store::open(uri)?;
    let (objects, path) = find(&store, Path::new("")).await?;
    let mut hasher = blake3::Hasher::new();
    for part in std::iter::once(store.uri()).chain(objects.iter().flat_map(|object| [&*object.key, &*object.version])) {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    for object in &objects {
        hasher.update(&object.bytes.to_le_bytes());
    }
    let file = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let bytes = objects.iter().map(|object| object.bytes).sum();
    Ok(Listing { key: hasher.finalize().to_hex().to_string(), bytes, file })
}

/// Writes every file below `dir` under the same relative name below `store`; returns the bytes.
pub async fn upload_dir(store: &Store, dir: &Path) -> Result<u64, StoreError> {
    let mut pending = vec![dir.to_owned()];
    let mut bytes = 0;
    while let Some(folder) = pending.pop() {
        let failed = |source| StoreError::disk(&folder, source);
        let mut entries = tokio::fs::read_dir(&folder).await.map_err(failed)?;
        while let Some(entry) = entries.next_entry().await.map_err(failed)? {
            if entry.file_type().await.map_err(failed)?.is_dir() {
                pending.push(entry.path());
            } else {
                bytes += upload(store, dir, &entry.path()).await?;
            }
        }
    }
    Ok(bytes)
}

/// A URI names one object, or a folder of them; a file on disk lists itself under no key.
async fn find(store: &Store, dest_dir: &Path) -> Result<(Vec<Object>, PathBuf), StoreError> {
    let name = store.uri().rsplit('/').next().unwrap_or_default();
    let single = if store.base.as_ref().is_empty() { None } else { store.stat("").await? };
    if let Some(object) = single {
        return Ok((vec![object], dest_dir.join(name)));
    }
    let objects: Vec<Object> = store.list("").await?;
    let objects: Vec<Object> = objects.into_iter().filter(|o| !o.key.is_empty()).collect();
    if objects.is_empty() {
        return Err(StoreError::NotFound { uri: store.uri().to_owned() });
    }
    Ok((objects, dest_dir.to_owned()))
}

/// Where an object goes; keys that would leave the folder are refused.
fn local_path(store: &Store, dest_dir: &Path, key: &str) -> Result<PathBuf, StoreError> {
    let name = if key.is_empty() { store.uri().rsplit('/').next().unwrap_or_default() } else { key };
    let relative = Path::new(name);
    let plain = |part| matches!(part, Component::Normal(_));
    if !relative.components().all(plain) {
        return Err(StoreError::BadUri {
            uri: store.uri_of(key),
            detail: "its name is no plain relative path".to_owned(),
        });
    }
    Ok(dest_dir.join(relative))
}

async fn download(
    store: &Store,
    object: &Object,
    target: &Path,
    mut advanced: impl FnMut(u64) + Send,
) -> Result<(), StoreError> {
    let failed = |source| StoreError::disk(target, source);
    if let Some(folder) = target.parent() {
        tokio::fs::create_dir_all(folder).await.map_err(failed)?;
    }
    if let Ok(there) = tokio::fs::metadata(target).await
        && there.len() == object.bytes
    {
        advanced(object.bytes);
        return Ok(());
    }
    let mut name = target.as_os_str().to_owned();
    name.push(".partial");
    let partial = PathBuf::from(name);
    let mut file = File::create(&partial).await.map_err(failed)?;
    let path = store.path(&object.key);
    let mut offset = 0;
    while offset < object.bytes {
        let end = object.bytes.min(offset + CHUNK_BYTES);
        let read = store.inner.get_range(&path, offset..end);
        let bytes = read.await.map_err(|e| store.error(&object.key, &e))?;
        file.write_all(&bytes).await.map_err(failed)?;
        advanced(end - offset);
        offset = end;
    }
    file.flush().await.map_err(failed)?;
    drop(file);
    tokio::fs::rename(&partial, target).await.map_err(failed)
}

async fn upload(store: &Store, dir: &Path, file: &Path) -> Result<u64, StoreError> {
    let relative = file.strip_prefix(dir).unwrap_or(file);
    let key: Vec<_> = relative.iter().map(|part| part.to_string_lossy()).collect();
    let key = key.join("/");
    let opened = File::open(file).await;
    let source = opened.map_err(|source| StoreError::disk(file, source))?;
    let length = source.metadata().await.map_err(|source| StoreError::disk(file, source))?.len();
    let mut reader = BufReader::with_capacity(1 << 20, source);
    let mut writer = BufWriter::with_capacity(store.inner.clone(), store.path(&key), part_bytes(length) as usize);
    let copied = match tokio::io::copy_buf(&mut reader, &mut writer).await {
        Ok(bytes) => writer.shutdown().await.map(|()| bytes),
        Err(error) => Err(error),
    };
    match copied {
        Ok(bytes) => Ok(bytes),
        Err(error) => {
            // The upload's remains are worth a try only; the error that matters is the first.
            drop(writer.abort().await);
            Err(from_io(store, &key, error))
        }
    }
}

/// Bytes of an upload's part, so that no file needs more parts than the store takes.
fn part_bytes(length: u64) -> u64 {
    CHUNK_BYTES.max(length.div_ceil(PARTS_LIMIT).next_multiple_of(PART_STEP_BYTES))
}

/// `BufWriter` wraps the store's error into an `io::Error`.
fn from_io(store: &Store, key: &str, error: std::io::Error) -> StoreError {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<object_store::Error>());
    match inner {
        Some(inner) => store.error(key, inner),
        None => StoreError::Other { uri: store.uri_of(key), detail: error.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_grow_with_the_file_and_are_never_too_many() {
        assert_eq!(part_bytes(0), CHUNK_BYTES);
        // Where parts of 8 MiB are just enough.
        assert_eq!(part_bytes(CHUNK_BYTES * PARTS_LIMIT), CHUNK_BYTES);
        for length in [CHUNK_BYTES * PARTS_LIMIT + 1, 280_000_000_000, 5 << 40] {
            let part = part_bytes(length);
            assert!(part > CHUNK_BYTES && length.div_ceil(part) <= PARTS_LIMIT, "{length}: {part}");
        }
    }
}
