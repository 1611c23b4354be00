//! Two models that answer without their names, and what people think of them.
//!
//! A gateway remembers nothing of a pair: the client carries it, sealed ([`ticket`]), so that any replica can go
//! on with it. What is kept are votes ([`votes`]), of each voter so many a minute ([`voters`]).

pub mod ticket;
pub mod voters;
pub mod votes;

use crate::api::error::ApiError;
use rand::seq::IndexedRandom;
use serde::{Deserialize, Serialize};
use ticket::Seal;
use voters::Voters;
use votes::Votes;

/// A pair is good for so long.
const MAX_AGE_SECONDS: u64 = 24 * 3600;

pub struct Arena {
    pub seal: Seal,
    pub votes: Votes,
    pub voters: Voters,
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    A,
    B,
}

impl Side {
    pub fn parse(name: &str) -> Option<Self> {
        [Side::A, Side::B].into_iter().find(|side| side.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Side::A => "a",
            Side::B => "b",
        }
    }
}

/// The pair, as its ticket holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Battle {
    pub id: String,
    pub a: String,
    pub b: String,
    /// Whose it is: the name of an API key, or nothing.
    pub key: String,
    /// Unix time in seconds.
    pub begun: u64,
}

impl Battle {
    /// Two of these models, in no order.
    pub fn draw(models: &[String], key: &str, now: u64) -> Option<Self> {
        let mut pair = models.choose_multiple(&mut rand::rng(), 2).cloned();
        let (a, b) = (pair.next()?, pair.next()?);
        // Which of two is drawn first is not said to be even.
        let (a, b) = if rand::random() { (a, b) } else { (b, a) };
        Some(Self { id: uuid::Uuid::new_v4().simple().to_string(), a, b, key: key.to_owned(), begun: now })
    }

    pub fn model(&self, side: Side) -> &str {
        match side {
            Side::A => &self.a,
            Side::B => &self.b,
        }
    }
}

impl Arena {
    /// The pair of a ticket that was given to this client, not too long ago.
    pub fn open(&self, ticket: &str, key: &str, now: u64) -> Result<Battle, ApiError> {
        let battle = self
            .seal
            .open(ticket)
            .filter(|battle| battle.key == key && now.saturating_sub(battle.begun) <= MAX_AGE_SECONDS);
        battle.ok_or_else(ApiError::unknown_battle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn every_model_meets_every_other_on_either_side() {
        let models = ["x", "y", "z"].map(str::to_owned);
        let mut drawn = HashMap::new();
        for _ in 0..600 {
            let battle = Battle::draw(&models, "", 0).unwrap();
            assert_ne!(battle.a, battle.b);
            *drawn.entry((battle.a, battle.b)).or_insert(0) += 1;
        }
        assert_eq!(drawn.len(), 6, "{drawn:?}");
        assert!(Battle::draw(&models[..1], "", 0).is_none());
    }
}
