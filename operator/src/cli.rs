//! The command line; the chart sets these as environment variables.

use crate::config::Config;
use crate::spot::Source;
use clap::Parser;
use std::net::SocketAddr;

/// Trains and serves chat models on nodes that may be taken away.
#[derive(Parser, Clone, Debug)]
#[command(name = "vicuna-operator", version)]
pub struct Cli {
    /// Namespace of operator and gateway.
    #[arg(long, env = "POD_NAMESPACE", default_value = "vicuna-system")]
    pub namespace: String,
    /// Name of this pod: the identity in the lease.
    #[arg(long, env = "POD_NAME")]
    pub pod_name: String,
    /// UID of this pod, with which it knows its own lease again after it was killed.
    #[arg(long, env = "POD_UID")]
    pub pod_uid: Option<String>,
    /// Image of trainers and workers, with its digest where it has one.
    #[arg(long, env = "VICUNA_RUNTIME_IMAGE")]
    pub runtime_image: String,
    /// When the kubelet pulls that image: Always, IfNotPresent or Never.
    #[arg(long, env = "VICUNA_IMAGE_PULL_POLICY", default_value = "IfNotPresent")]
    pub image_pull_policy: String,
    /// Service of the coordinator, and name in its certificate.
    #[arg(long, env = "VICUNA_COORDINATOR_SERVICE", default_value = "vicuna-operator")]
    pub coordinator_service: String,
    /// Service of the gateway's HTTP API, and name in the gateway's certificate.
    #[arg(long, env = "VICUNA_GATEWAY_SERVICE", default_value = "vicuna-gateway")]
    pub gateway_service: String,
    /// Headless service that workers dial to reach every gateway.
    #[arg(long, env = "VICUNA_GATEWAY_WORKERS_SERVICE", default_value = "vicuna-gateway-workers")]
    pub gateway_workers_service: String,
    /// Service account of the gateway: the only one whose load reports count.
    #[arg(long, env = "VICUNA_GATEWAY_SERVICE_ACCOUNT", default_value = "vicuna-gateway")]
    pub gateway_service_account: String,
    /// ConfigMap with the CA certificate and the cluster's token keys, in every namespace that needs it.
    #[arg(long, env = "VICUNA_TRUST_CONFIG_MAP", default_value = "vicuna-trust")]
    pub trust_config_map: String,
    /// Secret with the CA's key.
    #[arg(long, env = "VICUNA_CA_SECRET", default_value = "vicuna-ca")]
    pub ca_secret: String,
    /// Secret with the gateway's certificate.
    #[arg(long, env = "VICUNA_GATEWAY_TLS_SECRET", default_value = "vicuna-gateway-tls")]
    pub gateway_tls_secret: String,
    /// Lease of the leader.
    #[arg(long, env = "VICUNA_LEASE", default_value = "vicuna-operator")]
    pub lease: String,
    /// Where ranks and gateways call (gRPC over TLS).
    #[arg(long, env = "VICUNA_COORDINATOR_LISTEN", default_value = "0.0.0.0:9443")]
    pub coordinator_listen: SocketAddr,
    /// Marks on nodes that announce their end, besides those that are known: CARRIER:NAME=URGENCY, where
    /// CARRIER is taint, condition, annotation or label and URGENCY is now, hurry, calm or advice.
    #[arg(long, env = "VICUNA_NOTICE_SOURCES", value_delimiter = ',')]
    pub notice_sources: Vec<Source>,
    /// Health, readiness and metrics.
    #[arg(long, env = "VICUNA_METRICS_LISTEN", default_value = "0.0.0.0:9090")]
    pub metrics: SocketAddr,
}

impl From<Cli> for Config {
    fn from(cli: Cli) -> Self {
        let Cli {
            namespace,
            pod_name,
            pod_uid,
            runtime_image,
            image_pull_policy,
            coordinator_service,
            gateway_service,
            gateway_workers_service,
            gateway_service_account,
            trust_config_map,
            ca_secret,
            gateway_tls_secret,
            lease,
            coordinator_listen,
            notice_sources,
            metrics,
        } = cli;
        Self {
            namespace,
            pod_name,
            pod_uid,
            runtime_image,
            image_pull_policy,
            coordinator_service,
            gateway_service,
            gateway_workers_service,
            gateway_service_account,
            trust_config_map,
            ca_secret,
            gateway_tls_secret,
            lease,
            coordinator_listen,
            notice_sources,
            metrics_listen: metrics,
        }
    }
}
