//! What requests hold in memory, about: one bound for all of them, checked before a body is read.
//!
//! Numbers of requests are bounded too, but a request may be a hundred bytes or a million.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A body is there as it came, as it was read, and as it goes to a worker.
const COPIES: usize = 3;
/// Of a request, whatever it asks.
const REQUEST_BYTES: usize = 4 << 10;

/// The bound and what is used of it.
#[derive(Debug)]
pub struct Memory {
    limit: usize,
    used: AtomicUsize,
}

/// One request's part, given back when this is dropped.
#[derive(Debug)]
pub struct Held {
    memory: Arc<Memory>,
    /// Bytes of the body as it came.
    length: usize,
    body: usize,
    bytes: usize,
}

impl Memory {
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicUsize::new(0) })
    }

    /// Room for a request with a body of so many bytes, if there is any.
    pub fn hold(self: &Arc<Self>, body: usize) -> Option<Held> {
        let mut held = self.take(of_body(body))?;
        held.length = body;
        Some(held)
    }

    /// Room for so many bytes, if there is any.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Option<Held> {
        let fits = |used: usize| used.checked_add(bytes).filter(|used| *used <= self.limit);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).ok()?;
        Some(Held { memory: self.clone(), length: 0, body: bytes, bytes })
    }

    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

impl Held {
    /// The body is so long.
    pub fn has_body(&mut self, bytes: usize) {
        self.length = bytes;
        self.body = of_body(bytes);
        self.set(self.body);
    }

    /// So many choices of each prompt take it to a worker; tells whether there is room for that.
    pub fn has_choices(&mut self, count: usize) -> bool {
        let more = self.length * count.saturating_sub(1);
        let fits = |used: usize| used.checked_add(more).filter(|used| *used <= self.memory.limit);
        let room = more == 0 || self.memory.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok();
        if room {
            self.body += more;
            self.bytes += more;
        }
        room
    }

    /// So much there is of its answers. What runs goes on over the bound, too, and holds up new requests.
    pub fn has_answers(&mut self, bytes: usize) {
        self.set(self.body + bytes);
    }

    fn set(&mut self, bytes: usize) {
        if bytes == self.bytes {
            return;
        }
        // Wraps around where it shrinks, as the counter does.
        self.memory.used.fetch_add(bytes.wrapping_sub(self.bytes), Ordering::Relaxed);
        self.bytes = bytes;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.memory.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

fn of_body(bytes: usize) -> usize {
    REQUEST_BYTES + COPIES * bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_grows_shrinks_and_is_given_back() {
        let memory = Memory::new(of_body(1000) + of_body(100));
        let mut first = memory.hold(1000).unwrap();
        assert!(memory.hold(101).is_none(), "it would be too much");
        first.has_body(100);
        let second = memory.hold(1000).unwrap();
        first.has_answers(10_000);
        assert!(memory.used() > memory.limit, "what runs goes on");
        assert!(memory.hold(0).is_none());
        drop(first);
        assert_eq!(memory.used(), of_body(1000));
        drop(second);
        assert_eq!(memory.used(), 0);
    }

    #[test]
    fn every_choice_takes_its_prompt_along() {
        let memory = Memory::new(of_body(1000) + 5000);
        let mut held = memory.hold(1000).unwrap();
        assert!(!held.has_choices(7), "six more are too many");
        assert!(held.has_choices(6));
        held.has_answers(500);
        assert_eq!(memory.used(), of_body(1000) + 5500);
        assert!(held.has_choices(1), "it is in already");
        drop(held);
        assert_eq!(memory.used(), 0);
    }
}
