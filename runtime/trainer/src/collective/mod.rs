//! How the ranks of one generation exchange bytes.
//!
//! The trait moves tagged messages; arithmetic never happens here, so that no transport can change
//! a bit. A tag is used once per sender: receiving is a look-up, and order does not matter.

pub mod frame;
mod handshake;
mod mailbox;
pub mod tcp;

pub use tcp::{Mesh, Network};

use tokio_util::sync::CancellationToken;

/// What a message is about. Its parts are public numbers that sender and receiver both know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag {
    pub kind: Kind,
    /// Part of a group's gradient: tied weights have two.
    pub part: u8,
    /// Position in the sender's list of tree nodes.
    pub node: u16,
    pub block: u32,
    pub step: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Partial gradient sum of a block, to its owner.
    Partial = 1,
    /// Norms, losses and wishes of a rank, to all: having all of them is the commit.
    Commit = 2,
    /// A block's weights, to those who compute with them.
    Weights = 3,
    /// A rank's blocks of a checkpoint are in the store, to rank 0.
    Stored = 4,
    /// The checkpoint's manifest is written, or cannot be, from rank 0 to all.
    Manifest = 5,
    /// The sender leaves in peace.
    Bye = 6,
    /// The finished gradient of a block, from its owner to its twin.
    Gradient = 7,
    /// A block's masters and moments, to a rank that is to keep it.
    State = 8,
    /// Losses of held-out micro-batches and wishes of a rank, to all.
    Evaluation = 9,
    /// Digests of what a rank has read, to all.
    Inputs = 10,
    /// Lines of the log, to a newcomer.
    Log = 11,
    /// What a rank has memory for, to all.
    Memory = 12,
}

impl Tag {
    pub fn new(kind: Kind, step: u64) -> Self {
        Self { kind, part: 0, node: 0, block: 0, step }
    }

    pub fn block(self, block: usize) -> Self {
        Self { block: block as u32, ..self }
    }

    pub fn node(self, part: u8, node: usize) -> Self {
        Self { part, node: node as u16, ..self }
    }
}

/// Why the generation cannot go on. The rank keeps its state and waits for the coordinator's word.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum CollectiveError {
    #[error("lost peer {peer} ({detail})")]
    Lost { peer: String, detail: String },
    #[error("{peer} sent a frame that is not authentic: something on the path changes or injects bytes")]
    Forged { peer: String },
    #[error("cannot connect to peer {peer} ({detail})")]
    Connect { peer: String, detail: String },
    #[error("{peer} did not send what was due for {seconds} s")]
    Silent { peer: String, seconds: u64 },
    #[error("{peer} breaks the protocol: {detail}")]
    Protocol { peer: String, detail: String },
    #[error("the coordinator ended the generation")]
    Aborted,
}

impl CollectiveError {
    /// The peer that is out of reach, if that is what is wrong.
    pub fn lost_peer(&self) -> Option<&str> {
        match self {
            Self::Lost { peer, .. } | Self::Connect { peer, .. } | Self::Silent { peer, .. } => Some(peer),
            Self::Forged { .. } | Self::Protocol { .. } | Self::Aborted => None,
        }
    }
}

/// Ranks `0..world` of one generation.
pub trait Collective: Send + Sync {
    fn rank(&self) -> usize;
    fn world(&self) -> usize;

    /// Sends to another rank; returns when the bytes are on their way.
    fn send(&self, to: usize, tag: Tag, payload: &[u8]) -> Result<(), CollectiveError>;

    /// Waits for a message; ends early with [`CollectiveError::Aborted`] when `cancel` is called.
    fn receive(&self, from: usize, tag: Tag, cancel: &CancellationToken) -> Result<Vec<u8>, CollectiveError>;

    /// Sends to every other rank.
    fn broadcast(&self, tag: Tag, payload: &[u8]) -> Result<(), CollectiveError> {
        let others = (0..self.world()).filter(|rank| *rank != self.rank());
        others.into_iter().try_for_each(|rank| self.send(rank, tag, payload))
    }
}

#[cfg(test)]
mod tests;
