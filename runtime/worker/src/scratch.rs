//! The folder for models' files: pods have one mounted, a machine of somebody's own has a user's cache.

use anyhow::{Context, Result, bail};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

/// Where the operator mounts a volume.
const OF_PODS: &str = "/scratch";
const LOCK: &str = ".lock";

/// Held for as long as the process lives: files of two workers in one folder would be mixed up.
#[derive(Debug)]
pub struct Scratch {
    pub folder: PathBuf,
    _lock: File,
}

impl Scratch {
    /// `asked`: the folder that it shall be.
    pub fn open(asked: Option<&Path>) -> Result<Self> {
        match asked {
            Some(folder) => Self::take(folder),
            None if File::create(Path::new(OF_PODS).join(LOCK)).is_ok() => Self::take(Path::new(OF_PODS)),
            None => Self::take(&cache(|name| std::env::var_os(name).map(PathBuf::from))),
        }
    }

    fn take(folder: &Path) -> Result<Self> {
        let path = folder.display();
        let unusable = || format!("{path} cannot be the folder for models' files; name another with --scratch");
        std::fs::create_dir_all(folder).with_context(unusable)?;
        let lock = File::create(folder.join(LOCK)).with_context(unusable)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { folder: folder.to_owned(), _lock: lock }),
            Err(TryLockError::WouldBlock) => {
                bail!("another worker has its files in {path}; give each a folder of its own with --scratch")
            }
            Err(TryLockError::Error(error)) => Err(error).with_context(unusable),
        }
    }
}

/// A folder in the user's cache, as the XDG base directory specification has it.
fn cache(variable: impl Fn(&str) -> Option<PathBuf>) -> PathBuf {
    let absolute = |name| variable(name).filter(|path| path.is_absolute());
    let user = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    user.unwrap_or_else(std::env::temp_dir).join("vicuna-worker")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_workers_do_not_share_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let asked = folder.path().join("a/b");
        let first = Scratch::open(Some(&asked)).unwrap();
        assert_eq!(first.folder, asked);
        let error = Scratch::open(Some(&asked)).unwrap_err().to_string();
        assert!(error.contains("--scratch") && error.contains("a/b"), "{error}");
        drop(first);
        Scratch::open(Some(&asked)).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Scratch::open(Some(&file.path().join("x"))).unwrap_err().to_string();
        assert!(error.contains("--scratch") && error.contains(&file.path().display().to_string()), "{error}");
    }

    #[test]
    fn without_one_it_is_in_the_users_cache() {
        let of = |xdg: Option<&str>, home: Option<&str>| {
            cache(|name| (if name == "HOME" { home } else { xdg }).map(PathBuf::from)).display().to_string()
        };
        assert_eq!(of(Some("/x"), Some("/home/u")), "/x/vicuna-worker");
        assert_eq!(of(None, Some("/home/u")), "/home/u/.cache/vicuna-worker");
        assert_eq!(of(Some("relative"), Some("/home/u")), "/home/u/.cache/vicuna-worker");
        assert!(of(None, None).ends_with("/vicuna-worker"));
    }
}
