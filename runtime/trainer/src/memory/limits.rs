//! How much memory this process may have.

use tch::Device;

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
    let reserved = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| cgroup(&text));
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text));
    let device =
        if device.is_cuda() { vicuna_model::device::memory_bytes().ok().map(|(_, total)| total) } else { None };
    Limits { host: reserved.or(machine), reserved, device }
}

/// memory.max of cgroup v2; `None` for "max".
fn cgroup(text: &str) -> Option<u64> {
    text.trim().parse().ok()
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
        assert_eq!(cgroup("25769803776\n"), Some(25_769_803_776));
        assert_eq!(cgroup("max\n"), None);
        assert_eq!(total("MemTotal:       24735064 kB\nMemFree: 1 kB\n"), Some(24_735_064 * 1024));
        assert_eq!(total("MemFree: 1 kB\n"), None);
    }
}
