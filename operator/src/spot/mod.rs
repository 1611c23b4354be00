//! Nodes that come and go: who says so, which pools have none, which nodes are bad, and what a pod
//! takes of one.

pub mod capacity;
pub mod faults;
pub mod notices;
mod source;
pub mod stock_outs;

pub use source::{Carrier, Source};
