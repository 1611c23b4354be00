//! Files that are replaced while the process runs: the kubelet swaps mounted Secrets and ConfigMaps.

use std::io;
use std::path::{Path, PathBuf};

/// A few files that belong together, and what they held when they were last read.
#[derive(Debug)]
pub struct Watched {
    paths: Vec<PathBuf>,
    contents: Option<Vec<Vec<u8>>>,
}

/// One of the files cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {}: {source}; is its Secret mounted?", path.display())]
pub struct Unreadable {
    path: PathBuf,
    source: io::Error,
}

impl Watched {
    pub fn new(paths: &[&Path]) -> Self {
        Self { paths: paths.iter().map(|path| path.to_path_buf()).collect(), contents: None }
    }

    /// What the files hold, in the order in which they were named, if it is not what they held before.
    pub fn changed(&mut self) -> Result<Option<Vec<Vec<u8>>>, Unreadable> {
        let read = |path: &PathBuf| std::fs::read(path).map_err(|source| Unreadable { path: path.clone(), source });
        let contents: Vec<_> = self.paths.iter().map(read).collect::<Result<_, _>>()?;
        if self.contents.as_ref() == Some(&contents) {
            return Ok(None);
        }
        self.contents = Some(contents.clone());
        Ok(Some(contents))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_told_once_until_they_change() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let mut watched = Watched::new(&[&path]);
        assert!(watched.changed().unwrap_err().to_string().contains("file"));
        for text in ["one", "two"] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(watched.changed().unwrap(), Some(vec![text.as_bytes().to_vec()]));
            assert_eq!(watched.changed().unwrap(), None);
        }
    }
}
