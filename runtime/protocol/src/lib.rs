//! What the parts say to each other: the coordinator and inference services, the training job,
//! bearer tokens, TLS, and how models call tools. No torch, no Kubernetes client.

pub mod auth;
pub mod batches;
pub mod holding;
pub mod job;
pub mod numerics;
pub mod open_files;
pub mod redial;
pub mod tls;
pub mod tools;

/// Ranks and gateways to the operator's leader (`proto/coordinator.proto`).
pub mod coordinator {
    tonic::include_proto!("vicuna.coordinator.v1");
}

/// Workers to gateways (`proto/inference.proto`).
pub mod inference {
    tonic::include_proto!("vicuna.inference.v1");

    /// The reason of a failure: the prompt leaves no room for an answer.
    pub const CONTEXT_LENGTH_EXCEEDED: &str = "context_length_exceeded";
}

/// Token audience of ranks and gateways that call the operator.
pub const COORDINATOR_AUDIENCE: &str = "vicuna-coordinator";
/// Token audience of workers that call a gateway.
pub const GATEWAY_AUDIENCE: &str = "vicuna-gateway";

/// Bytes as people write them.
pub fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}
