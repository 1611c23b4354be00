//! Reconciles VicunaServing: worker pods for one model, as many as demand asks for, where nodes stay.
//!
//! `observe` (reads) → `plan` (pure) → `apply` (writes) → `status` (pure, written once at the end).

pub mod apply;
pub mod build;
pub mod controller;
pub mod drain;
pub mod memory;
mod names;
pub mod observe;
pub mod plan;
pub mod status;

pub use controller::run;
