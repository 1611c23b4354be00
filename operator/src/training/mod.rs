//! Reconciles VicunaTraining: pods for its ranks, where and as long as they are of use. Which of them
//! train together is the coordinator's matter.
//!
//! `observe` (reads) → `plan` (pure) → `apply` (writes) → `status` (pure, written once at the end).

pub mod accounts;
pub mod apply;
pub mod build;
pub mod controller;
pub mod known;
pub mod memory;
pub mod observe;
pub mod plan;
pub mod status;
#[cfg(test)]
pub(crate) mod tests;
mod time;

pub use controller::run;
