//! What the ranks of a generation do alike for want of memory on any of them.

use crate::collective::{CollectiveError, Kind, Tag};
use crate::prepare::Session;
use crate::step::{Peers, Room};
use serde::{Deserialize, Serialize};

/// The same on every rank, but for the room where weights are replicated: that changes nothing for the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// Each rank has the weights of its blocks alone.
    pub sharded: bool,
    /// For layers that are kept whole.
    pub room: Room,
}

/// What one rank has memory for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Wish {
    sharded: bool,
    /// Bytes that sharded weights leave for layers.
    room: u64,
}

/// Weights are sharded for all as soon as one rank has no memory for replicated ones.
pub fn agree(session: &Session, step: u64, peers: Peers<'_>) -> Result<Agreement, CollectiveError> {
    let Peers { collective, abort } = peers;
    let ranks = collective.world() as u32;
    let own = Wish { sharded: session.shards(ranks), room: session.room(ranks, true).bytes };
    let tag = Tag::new(Kind::Memory, step);
    // A plain struct of numbers always serialises.
    collective.broadcast(tag, &serde_json::to_vec(&own).unwrap_or_default())?;
    let mut all = own;
    for rank in (0..collective.world()).filter(|rank| *rank != collective.rank()) {
        all = all.and(decode(rank, &collective.receive(rank, tag, abort)?)?);
    }
    let room = session.room(ranks, all.sharded);
    let bytes = if all.sharded { all.room } else { room.bytes };
    Ok(Agreement { sharded: all.sharded, room: Room { bytes, ..room } })
}

impl Wish {
    fn and(self, other: Self) -> Self {
        Self { sharded: self.sharded || other.sharded, room: self.room.min(other.room) }
    }
}

fn decode(rank: usize, payload: &[u8]) -> Result<Wish, CollectiveError> {
    let peer = || format!("rank {rank}");
    serde_json::from_slice(payload)
        .map_err(|error| CollectiveError::Protocol { peer: peer(), detail: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rank_without_the_memory_is_enough_and_the_least_room_counts() {
        let (roomy, narrow) = (Wish { sharded: false, room: 9 }, Wish { sharded: true, room: 4 });
        assert_eq!(roomy.and(narrow), Wish { sharded: true, room: 4 });
        assert_eq!(narrow.and(roomy), roomy.and(narrow));
        assert!(!roomy.and(roomy).sharded);
    }
}
