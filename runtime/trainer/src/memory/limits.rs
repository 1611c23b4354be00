//! How much memory this process may have.

use std::path::{Path, PathBuf};
use tch::Device;

/// Where the kernel's control groups are, of either version.
const CGROUPS: &str = "/sys/fs/cgroup";
/// What version 1 writes where there is no limit is the largest number of whole pages; nobody has half of that.
const NO_LIMIT: u64 = 1 << 62;

/// Bytes; `None` where nobody says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Of the container, or of the machine where it has none.
    pub host: Option<u64>,
    /// Of the container alone: what it does not use is nobody else's.
    pub reserved: Option<u64>,
    /// Of the GPU, whole.
    pub device: Option<u64>,
}

/// Of this process.
pub fn limits(device: Device) -> Limits {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let reserved = cgroup(Path::new(CGROUPS), &own);
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text));
    let device =
        if device.is_cuda() { vicuna_model::device::memory_bytes().ok().map(|(_, total)| total) } else { None };
    Limits { host: reserved.or(machine), reserved, device }
}

/// The least that the process's control groups allow, each within the one around it; `own` is `/proc/self/cgroup`. In
/// a container the outermost is usually its own, and the path that `own` tells is not there.
fn cgroup(root: &Path, own: &str) -> Option<u64> {
    let groups = own.lines().filter_map(|line| group(root, line));
    let outermost = [(root.to_owned(), "memory.max"), (root.join("memory"), "memory.limit_in_bytes")];
    let around = groups.flat_map(|(group, file)| {
        let inside = |folder: &&Path| folder.starts_with(root);
        group.ancestors().take_while(inside).map(|folder| (folder.to_owned(), file)).collect::<Vec<_>>()
    });
    let read = |(folder, file): (PathBuf, &str)| limit(&std::fs::read_to_string(folder.join(file)).ok()?);
    around.chain(outermost).filter_map(read).min()
}

/// Where the group of a line is and what its limit is called: `0::/path` of version 2, `9:memory:/path` of version 1.
fn group(root: &Path, line: &str) -> Option<(PathBuf, &'static str)> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
    match controllers {
        "" => Some((root.join(path), "memory.max")),
        of if of.split(',').any(|one| one == "memory") => {
            Some((root.join("memory").join(path), "memory.limit_in_bytes"))
        }
        _ => None,
    }
}

/// `None` for "max" and for what means it.
fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|bytes| *bytes < NO_LIMIT)
}

/// MemTotal of /proc/meminfo.
fn total(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_the_kernel_writes_them() {
        assert_eq!(limit("25769803776\n"), Some(25_769_803_776));
        assert_eq!(limit("max\n"), None);
        assert_eq!(limit("9223372036854771712\n"), None);
        assert_eq!(total("MemTotal:       24735064 kB\nMemFree: 1 kB\n"), Some(24_735_064 * 1024));
        assert_eq!(total("MemFree: 1 kB\n"), None);
    }
    fn written(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let path = root.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn a_limit_is_found_in_either_version_of_control_groups() {
        let second = written(&[("memory.max", "1000\n")]);
        assert_eq!(cgroup(second.path(), "0::/\n"), Some(1000));
        // The container's own group is mounted as the outermost, and its path is the machine's.
        let first = written(&[("memory/memory.limit_in_bytes", "2000\n")]);
        let own = "11:cpu,cpuacct:/kubepods/pod1/c\n9:memory:/kubepods/pod1/c\n1:name=systemd:/\n0::/\n";
        assert_eq!(cgroup(first.path(), own), Some(2000));
        let none = written(&[("memory/memory.limit_in_bytes", "9223372036854771712\n"), ("memory.max", "max\n")]);
        assert_eq!(cgroup(none.path(), own), None);
        assert_eq!(cgroup(none.path(), ""), None);
    }

    #[test]
    fn the_groups_around_limit_too() {
        let root = written(&[("a/b/memory.max", "max\n"), ("a/memory.max", "3000\n"), ("memory.max", "max\n")]);
        assert_eq!(cgroup(root.path(), "0::/a/b\n"), Some(3000));
        let root = written(&[
            ("memory/a/b/memory.limit_in_bytes", "500\n"),
            ("memory/a/memory.limit_in_bytes", "3000\n"),
            ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ]);
        assert_eq!(cgroup(root.path(), "9:memory,hugetlb:/a/b\n"), Some(500));
    }
}
