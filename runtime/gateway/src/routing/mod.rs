//! Which worker takes a request: one policy a file.

pub mod least_loaded;

/// A worker that could take the request: it offers the model, is not draining and may continue it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub worker: u64,
    /// Sequences that this gateway has on it.
    pub assigned: u32,
    /// Sequences that it says it has, running or waiting, also from other gateways.
    pub reported: u32,
    /// Sequences that it runs at the same time.
    pub slots: u32,
}

pub trait Policy: Send + Sync {
    /// The worker to use, or none: then the request waits in the gateway's queue.
    fn pick(&self, candidates: &[Candidate]) -> Option<u64>;
}
