//! Reconciles VicunaTraining and VicunaServing and coordinates the ranks of a training.
//!
//! `run` wires it: one process leads (`leader`), watches (`watches`), and reconciles (`training`,
//! `serving`). Ranks and gateways call `coordinator::service`.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod cli;
pub mod config;
pub mod context;
pub mod coordinator;
mod cpu;
pub mod events;
pub mod http;
pub mod leader;
pub mod loads;
pub mod metrics;
pub mod pki;
pub mod run;
pub mod serving;
#[cfg(test)]
mod simulation;
pub mod spot;
mod status;
#[cfg(test)]
pub(crate) mod testing;
pub mod training;
pub mod watches;
