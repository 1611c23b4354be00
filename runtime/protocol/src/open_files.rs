//! How many files a process may have open, connections among them. Container runtimes commonly start processes with a soft
//! limit of 1,024 and a far higher hard one (systemd's default): a server has to ask for it.

use std::sync::LazyLock;

/// For what is not a caller's connection: calls to the API server or between the parts, certificates, logs.
const RESERVED: usize = 256;

/// Connections that a server may hold at a time and still open what else it needs. The first call raises the limit of
/// the process as far as it may go.
pub fn connections() -> usize {
    static LIMIT: LazyLock<usize> = LazyLock::new(raised);
    LIMIT.saturating_sub(RESERVED).max(1)
}

fn raised() -> usize {
    match rlimit::increase_nofile_limit(u64::MAX) {
        Ok(limit) => usize::try_from(limit).unwrap_or(usize::MAX),
        Err(error) => {
            tracing::warn!(%error, "the limit of open files is not known; some thousand connections are served at a time");
            4096
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn all_that_may_be_opened_is_used_but_for_a_reserve() {
        let connections = super::connections();
        let (soft, hard) = rlimit::getrlimit(rlimit::Resource::NOFILE).unwrap();
        assert_eq!(soft, hard);
        assert_eq!(connections, soft as usize - super::RESERVED);
    }
}
