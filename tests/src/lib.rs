//! The local cluster, the simulated API server, and the suites that run on them.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod api_server;
pub mod cluster;
pub mod conformance;
#[cfg(test)]
mod dashboards;
pub mod product;
