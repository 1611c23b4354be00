//! The local cluster, and the suites that run on it.

pub mod cluster;
pub mod product;
