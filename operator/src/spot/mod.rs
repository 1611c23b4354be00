//! Nodes that come and go.

pub mod notices;
