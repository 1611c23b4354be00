//! The command line. Every flag can come from the environment.

use clap::{Parser, ValueEnum};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tch::Kind;

/// Serves one model to every gateway that it can reach.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Options {
    /// Public name of the model, "namespace/name".
    #[arg(long, env = "VICUNA_MODEL_NAME")]
    pub model_name: String,
    /// Hugging Face directory or GGUF file: s3://…, file://…
    #[arg(long, env = "VICUNA_MODEL_URI")]
    pub model_uri: String,
    /// Chat template, vicuna_v1.1 or chatml; the model's own if absent.
    #[arg(long, env = "VICUNA_TEMPLATE")]
    pub template: Option<String>,
    /// Type of weights and key-value cache.
    #[arg(long, env = "VICUNA_DTYPE", value_enum, default_value = "fp32")]
    pub dtype: Dtype,
    /// Tokens in a sequence at most, prompt and completion together; the model's limit if absent.
    #[arg(long, env = "VICUNA_MAX_LENGTH", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_length: Option<u32>,
    /// URL of the gateways' gRPC service; every address of its host name is dialled.
    #[arg(long, env = "VICUNA_GATEWAY")]
    pub gateway: String,
    /// Name in the gateways' certificate.
    #[arg(long, env = "VICUNA_GATEWAY_SERVER_NAME", default_value = "vicuna-gateway")]
    pub gateway_server_name: String,
    /// Certificate of the CA that signed the gateways' certificates.
    #[arg(long, env = "VICUNA_CA", default_value = "/etc/vicuna/trust/ca.crt")]
    pub ca: PathBuf,
    /// Bearer token; read again for every call.
    #[arg(long, env = "VICUNA_TOKEN_FILE", default_value = "/var/run/secrets/vicuna/token")]
    pub token_file: PathBuf,
    /// Sequences that run at the same time.
    #[arg(long, env = "VICUNA_SLOTS", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub slots: u32,
    /// What the node is.
    #[arg(long, env = "VICUNA_CAPACITY", value_enum, default_value = "External")]
    pub capacity: Capacity,
    /// Folder for the model's files.
    #[arg(long, env = "VICUNA_SCRATCH", default_value = "/scratch")]
    pub scratch: PathBuf,
    /// Where /metrics, /healthz and /readyz are served.
    #[arg(long, env = "VICUNA_METRICS", default_value = "0.0.0.0:9090")]
    pub metrics: SocketAddr,
    /// Seconds that running requests get to finish after SIGTERM.
    #[arg(long, env = "VICUNA_DRAIN_TIMEOUT", default_value = "20", value_parser = seconds)]
    pub drain_timeout: Duration,
    /// Seconds for which an unavailable model is asked for again before the worker exits with the
    /// reason, which puts it into the pod's status.
    #[arg(long, env = "VICUNA_MODEL_PATIENCE", default_value = "30", value_parser = seconds)]
    pub model_patience: Duration,
    /// Name of this worker.
    #[arg(long, env = "POD_NAME", default_value = "external")]
    pub worker_name: String,
    #[arg(long, env = "NODE_NAME", default_value = "")]
    pub node_name: String,
    /// Where Kubernetes reads why a container ended; written only if the file is there.
    #[arg(long, env = "VICUNA_TERMINATION_LOG", default_value = "/dev/termination-log")]
    pub termination_log: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    Fp32,
    Bf16,
}

impl Dtype {
    pub fn kind(self) -> Kind {
        match self {
            Self::Fp32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Bf16 => "bf16",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum Capacity {
    OnPrem,
    Spot,
    OnDemand,
    External,
}

impl Capacity {
    pub fn name(self) -> &'static str {
        match self {
            Self::OnPrem => "OnPrem",
            Self::Spot => "Spot",
            Self::OnDemand => "OnDemand",
            Self::External => "External",
        }
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: u32 = text.parse().map_err(|_| format!("{text:?} is not a whole number of seconds"))?;
    Ok(Duration::from_secs(seconds.into()))
}
