//! What happens to workers and their streams, for those who watch: the newest are kept, and whoever reads too
//! slowly misses some.

use parking_lot::Mutex;
use serde::Serialize;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::broadcast;

/// Kept for those who come later.
const KEPT: usize = 64;
/// Between a reader and what it has not read.
const AHEAD: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    Attached,
    /// It takes nothing new, and is about to leave.
    Draining,
    /// It is gone; so many streams were on it.
    Gone,
    /// It failed again and again and is left out for a while.
    LeftOut,
    /// A stream that lost its worker goes on here.
    Resumed,
}

#[derive(Clone, Debug, Serialize)]
pub struct Happening {
    /// Counts up, so that nobody sees one twice.
    pub number: u64,
    /// Unix time in milliseconds.
    pub at_ms: u64,
    pub what: What,
    pub worker: String,
    /// Those concerned.
    pub models: Vec<String>,
    pub streams: u32,
}

pub struct Happenings {
    kept: Mutex<VecDeque<Arc<Happening>>>,
    sender: broadcast::Sender<Arc<Happening>>,
}

impl Default for Happenings {
    fn default() -> Self {
        Self { kept: Mutex::default(), sender: broadcast::Sender::new(AHEAD) }
    }
}

impl Happenings {
    pub fn tell(&self, what: What, worker: &str, models: Vec<String>, streams: u32) {
        let mut kept = self.kept.lock();
        let number = kept.back().map_or(1, |last| last.number + 1);
        let happening =
            Arc::new(Happening { number, at_ms: now_ms(), what, worker: worker.to_owned(), models, streams });
        kept.push_back(happening.clone());
        if kept.len() > KEPT {
            kept.pop_front();
        }
        // Nobody may be watching.
        let _ = self.sender.send(happening);
    }

    /// The newest, and all that come from now on.
    pub fn watch(&self) -> (Vec<Arc<Happening>>, broadcast::Receiver<Arc<Happening>>) {
        let kept = self.kept.lock();
        (kept.iter().cloned().collect(), self.sender.subscribe())
    }
}

/// Unix time in milliseconds.
pub fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_later_hears_the_newest_and_then_all_once() {
        let happenings = Happenings::default();

        let tell = || happenings.tell(What::Attached, "w", Vec::new(), 0);
        (0..KEPT + 3).for_each(|_| tell());
        let (kept, mut next) = happenings.watch();
        let numbers: Vec<_> = kept.iter().map(|happening| happening.number).collect();
        assert_eq!(numbers, (4..=KEPT as u64 + 3).collect::<Vec<_>>());
        tell();
        assert_eq!(next.try_recv().unwrap().number, KEPT as u64 + 4);
        assert!(next.try_recv().is_err());
    }
}
