//! What has arrived and nobody has asked for yet.

use super::{CollectiveError, Kind, Tag};
use parking_lot::{Condvar, Mutex};
use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// A peer that is due to send and does not for this long is given up.
const SILENCE_LIMIT: Duration = Duration::from_secs(600);
const CANCEL_CHECK: Duration = Duration::from_millis(100);

/// Readers of all connections put frames in; the training and the upload take them out. Never makes
/// a reader wait, so that no two ranks can wait for each other's reading: what is unread is bounded
/// by the protocol (a peer is at most one step ahead), and `limit_bytes` enforces it.
#[derive(Debug)]
pub(super) struct Mailbox {
    state: Mutex<State>,
    changed: Condvar,
    limit_bytes: usize,
}

#[derive(Debug, Default)]
struct State {
    frames: HashMap<(usize, Tag), Vec<u8>>,
    bytes: usize,
    /// The first thing that went wrong; everyone who waits gets it.
    fault: Option<CollectiveError>,
    /// Ranks that said goodbye.
    left: BTreeSet<usize>,
}

impl Mailbox {
    pub fn new(limit_bytes: usize) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), limit_bytes }
    }

    /// Takes a frame in; an error is the sender's breach of protocol.
    pub fn deliver(&self, from: usize, tag: Tag, payload: Vec<u8>) -> Result<(), &'static str> {
        let mut state = self.state.lock();
        if tag.kind == Kind::Bye {
            state.left.insert(from);
        } else {
            state.bytes += payload.len();
            if state.bytes > self.limit_bytes {
                return Err("it sends more than a step holds");
            }
            if state.frames.insert((from, tag), payload).is_some() {
                return Err("it sends the same message twice");
            }
        }
        self.changed.notify_all();
        Ok(())
    }

    pub fn has_left(&self, rank: usize) -> bool {
        self.state.lock().left.contains(&rank)
    }

    /// Ends every present and future wait with `fault`, unless one is there already.
    pub fn fail(&self, fault: CollectiveError) {
        self.state.lock().fault.get_or_insert(fault);
        self.changed.notify_all();
    }

    pub fn fault(&self) -> Option<CollectiveError> {
        self.state.lock().fault.clone()
    }

    pub fn take(
        &self,
        from: usize,
        tag: Tag,
        peer: &str,
        cancel: &CancellationToken,
    ) -> Result<Vec<u8>, CollectiveError> {
        let deadline = Instant::now() + SILENCE_LIMIT;
        let mut state = self.state.lock();
        loop {
            if let Some(payload) = state.frames.remove(&(from, tag)) {
                state.bytes -= payload.len();
                return Ok(payload);
            }
            if let Some(fault) = &state.fault {
                return Err(fault.clone());
            }
            if cancel.is_cancelled() {
                return Err(CollectiveError::Aborted);
            }
            if state.left.contains(&from) {
                let detail = "it left before it sent what was due".to_owned();
                return Err(CollectiveError::Lost { peer: peer.to_owned(), detail });
            }
            if Instant::now() > deadline {
                let seconds = SILENCE_LIMIT.as_secs();
                return Err(CollectiveError::Silent { peer: peer.to_owned(), seconds });
            }
            self.changed.wait_for(&mut state, CANCEL_CHECK);
        }
    }
}
