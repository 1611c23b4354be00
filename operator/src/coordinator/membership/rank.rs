//! What is known of one rank.

use super::{Departure, Millis};
use crate::coordinator::report::{Blockage, MemoryNeed, Remedy};
use vicuna_protocol::coordinator::Holding;

#[derive(Clone, Debug)]
pub(super) struct Rank {
    pub pod_name: String,
    pub node: String,
    pub address: String,
    /// Place in the order in which ranks came.
    pub order: u64,
    pub connected: bool,
    /// When its stream broke.
    pub away_since: Option<Millis>,
    /// Model, data and store are in reach.
    pub prepared: bool,
    pub prepared_at: Millis,
    pub blocked: Option<Blockage>,
    /// What its checkpoint behind the training waits for.
    pub held_up: Option<Blockage>,
    /// What it needs, by number of ranks; empty until it says so.
    pub memory: Vec<MemoryNeed>,
    pub remedies: Vec<Remedy>,
    /// What it said itself: SIGTERM, or its node's metadata.
    pub own_notice: Option<Departure>,
    pub failed: bool,
    /// Was told to end.
    pub released: bool,
    /// It missed a stop: it may be dead, or still on its own branch.
    pub suspect_since: Option<Millis>,
    /// The last step that it reported in the present generation.
    pub step: Option<u64>,
    pub noticed: bool,
    /// What it keeps in memory of the record's generation, which it has left.
    pub holding: Option<Holding>,
    /// A peer's connection to it broke.
    pub reported_lost: bool,
    /// As it says itself.
    pub numerics_class: String,
    /// It computed other bits than the rest.
    pub mismatched: bool,
    /// It made a step in a generation that we led: it computes what the others do.
    pub proven: bool,
}

impl Rank {
    /// May become a member, as far as it goes by itself.
    pub fn is_fit(&self) -> bool {
        self.connected
            && self.prepared
            && self.blocked.is_none()
            && !self.failed
            && !self.released
            && self.suspect_since.is_none()
            && !self.mismatched
    }

    /// On its way to being fit.
    pub fn is_joining(&self) -> bool {
        self.connected && !self.prepared && self.blocked.is_none() && !self.failed && !self.released
    }
}
