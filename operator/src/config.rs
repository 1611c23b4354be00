//! What the operator is told at start and never changes.

use crate::spot::Source;
use std::net::SocketAddr;

/// Port of the coordinator and of the gateway's worker side, as their Services have it.
pub const GRPC_PORT: u16 = 9443;
/// Port of the gateway's HTTP API.
pub const GATEWAY_HTTP_PORT: u16 = 8080;
/// Port where every binary serves `/metrics`, `/healthz` and `/readyz`.
pub const METRICS_PORT: u16 = 9090;
/// Value of `app.kubernetes.io/managed-by` on all that we make, and the field manager of our applies.
pub const MANAGER: &str = "vicuna-operator";
pub const TRAINING_LABEL: &str = "vicuna.dev/training";
pub const SERVING_LABEL: &str = "vicuna.dev/serving";
pub const POOL_LABEL: &str = "vicuna.dev/pool";
/// On a training's pod that is to take over from another one: the other's UID.
pub const REPLACES_ANNOTATION: &str = "vicuna.dev/replaces";
/// On a training, an image that it is bound to and that cannot be pulled any more: it takes the operator's instead.
pub const GIVE_UP_IMAGE_ANNOTATION: &str = "vicuna.dev/give-up-image";
/// On the pod of the leader, for the coordinator's Service to select.
pub const LEADER_LABEL: &str = "vicuna.dev/leader";

/// See [`crate::cli::Cli`] for what the fields mean.
#[derive(Clone, Debug)]
pub struct Config {
    pub namespace: String,
    pub pod_name: String,
    pub pod_uid: Option<String>,
    pub runtime_image: String,
    pub image_pull_policy: String,
    pub coordinator_service: String,
    pub gateway_service: String,
    pub gateway_workers_service: String,
    pub gateway_service_account: String,
    pub trust_config_map: String,
    pub ca_secret: String,
    pub gateway_tls_secret: String,
    pub lease: String,
    pub coordinator_listen: SocketAddr,
    pub notice_sources: Vec<Source>,
    pub metrics_listen: SocketAddr,
}

impl Config {
    /// Where trainers call, from any namespace.
    pub fn coordinator_url(&self) -> String {
        let Self { coordinator_service, namespace, .. } = self;
        format!("https://{coordinator_service}.{namespace}.svc:{GRPC_PORT}")
    }

    /// Where workers call every gateway, from any namespace.
    pub fn gateway_workers_url(&self) -> String {
        let Self { gateway_workers_service, namespace, .. } = self;
        format!("https://{gateway_workers_service}.{namespace}.svc:{GRPC_PORT}")
    }

    /// Where clients find the OpenAI API inside the cluster.
    pub fn gateway_url(&self) -> String {
        let Self { gateway_service, namespace, .. } = self;
        format!("http://{gateway_service}.{namespace}.svc:{GATEWAY_HTTP_PORT}/v1")
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A configuration for tests.
    pub(crate) fn sample() -> Config {
        use clap::Parser;
        crate::cli::Cli::parse_from([
            "vicuna-operator",
            "--namespace=vicuna-system",
            "--pod-name=operator-0",
            "--runtime-image=runtime:test",
        ])
        .into()
    }

    #[test]
    fn addresses_name_the_operators_namespace() {
        let config = sample();
        assert_eq!(config.coordinator_url(), "https://vicuna-operator.vicuna-system.svc:9443");
        assert_eq!(config.gateway_workers_url(), "https://vicuna-gateway-workers.vicuna-system.svc:9443");
        assert_eq!(config.gateway_url(), "http://vicuna-gateway.vicuna-system.svc:8080/v1");
    }
}
