//! The coordinator: which ranks train together, and from which checkpoint.
//!
//! `membership` decides and knows neither Kubernetes nor gRPC. `session` runs one membership: it feeds
//! it what ranks say and what caches show, and carries out what it answers. `registry` holds the
//! sessions, `service` is their gRPC side, `store` the record in the API server.

pub mod feed;
pub mod job;
pub mod manifest;
pub mod membership;
pub mod record;
pub mod registry;
pub mod report;
pub mod service;
pub mod session;
pub mod store;
