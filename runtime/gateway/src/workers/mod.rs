//! Workers dial in: who is attached, what they offer, and what waits for them.

pub mod connection;
pub mod happenings;
pub mod inquiry;
mod queue;
pub mod registry;
pub mod relay;
pub mod service;
pub mod trust;
pub mod view;

pub use registry::{QueueFull, Registry, Seat};
