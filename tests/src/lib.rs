//! The local cluster, and the suites that run on it.

pub mod cluster;
#[cfg(test)]
mod dashboards;
pub mod product;
