//! The command line. Every flag can come from the environment.

use clap::{Parser, ValueEnum};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use vicuna_model::inference::Precision;

/// More threads than this rarely help one step, and cost on a node that others share.
const MOST_THREADS: usize = 16;

/// Serves models to every gateway that it can reach.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Options {
    /// Public name of the model, "namespace/name".
    #[arg(long, env = "VICUNA_MODEL_NAME", required_unless_present = "on_request", requires = "model_uri")]
    pub model_name: Option<String>,
    /// Hugging Face directory or GGUF file: s3://…, file://…
    #[arg(long, env = "VICUNA_MODEL_URI", requires = "model_name")]
    pub model_uri: Option<String>,
    /// A model that is loaded once a gateway has requests for it, NAME=URI, and makes room for others when none runs;
    /// may be given several times, or separated by commas in the variable.
    #[arg(long, env = "VICUNA_ON_REQUEST", value_delimiter = ',', value_parser = named_uri)]
    pub on_request: Vec<(String, String)>,
    /// MiB that models on request may take together: their files, and --kv-memory-mib for each.
    #[arg(long, env = "VICUNA_ON_REQUEST_MEMORY_MIB", default_value_t = 16 * 1024)]
    pub on_request_memory_mib: u32,
    /// Another model, NAME=URI; may be given several times, or separated by commas in the variable.
    /// Template, types and limits are the same for all.
    #[arg(long, env = "VICUNA_ALSO_SERVE", value_delimiter = ',', value_parser = named_uri)]
    pub also_serve: Vec<(String, String)>,
    /// A PEFT adapter of the first model, NAME=URI, offered as a model of that name and computed beside
    /// the weights; may be given several times, or separated by commas in the variable.
    #[arg(long = "adapter", env = "VICUNA_ADAPTERS", value_delimiter = ',', value_parser = named_uri)]
    pub adapters: Vec<(String, String)>,
    /// Chat template, vicuna_v1.1 or chatml; the model's own if absent.
    #[arg(long, env = "VICUNA_TEMPLATE")]
    pub template: Option<String>,
    /// Type of weights that are not quantised: on a GPU that of the model's file (auto), or this one.
    #[arg(long, env = "VICUNA_DTYPE", value_enum, default_value = "auto")]
    pub dtype: Dtype,
    /// What weights are held as: quantised tensors of a GGUF file as they are (file), or all as dtype
    /// says (none), or rounded on loading (int8, int4). On a GPU file is as none.
    #[arg(long, env = "VICUNA_QUANTIZATION", value_enum, default_value = "file")]
    pub quantization: Quantization,
    /// Memory for keys and values, in MiB; one sequence of the greatest length fits in any case.
    #[arg(long, env = "VICUNA_KV_MEMORY_MIB", default_value_t = 1024)]
    pub kv_memory_mib: u32,
    /// Threads of a step on the CPU; as many as the process may use, but at most 16, if absent.
    #[arg(long, env = "VICUNA_THREADS", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Tokens in a sequence at most, prompt and completion together; the model's limit if absent.
    #[arg(long, env = "VICUNA_MAX_LENGTH", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_length: Option<u32>,
    /// URL of the gateways' gRPC service; every address of its host name is dialled.
    #[arg(long, env = "VICUNA_GATEWAY")]
    pub gateway: String,
    /// Name in the gateways' certificate.
    #[arg(long, env = "VICUNA_GATEWAY_SERVER_NAME", default_value = "vicuna-gateway")]
    pub gateway_server_name: String,
    /// Certificate of the CA that signed the gateways' certificates; if absent the one in the token file, or what is
    /// mounted into pods, /etc/vicuna/trust/ca.crt.
    #[arg(long, env = "VICUNA_CA")]
    pub ca: Option<PathBuf>,
    /// Bearer token, for the audience vicuna-gateway; may hold the CA's certificate besides. Read again for every call.
    #[arg(long, env = "VICUNA_TOKEN_FILE", default_value = "/var/run/secrets/vicuna/token")]
    pub token_file: PathBuf,
    /// Sequences that run at the same time.
    #[arg(long, env = "VICUNA_SLOTS", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub slots: u32,
    /// What the node is.
    #[arg(long, env = "VICUNA_CAPACITY", value_enum, default_value = "External")]
    pub capacity: Capacity,
    /// The pool that the operator made it for; shown beside the node.
    #[arg(long, env = "VICUNA_POOL", default_value = "")]
    pub pool: String,
    /// Folder for the models' files, of this worker alone; /scratch, or vicuna-worker in the user's cache, if absent.
    #[arg(long, env = "VICUNA_SCRATCH")]
    pub scratch: Option<PathBuf>,
    /// Folder in which workers of this node share what they have fetched from buckets; each keeps its own in the
    /// scratch folder if absent.
    #[arg(long = "cache", env = "VICUNA_WEIGHTS_CACHE")]
    pub cache: Option<PathBuf>,
    /// MiB that the shared folder may take; what was used longest ago goes.
    #[arg(long, env = "VICUNA_WEIGHTS_CACHE_MIB", default_value_t = 100 * 1024, value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    pub cache_mib: u64,
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
    /// Name of this worker; the host's with something random behind it if absent.
    #[arg(long, env = "POD_NAME")]
    pub worker_name: Option<String>,
    #[arg(long, env = "NODE_NAME", default_value = "")]
    pub node_name: String,
    /// Where Kubernetes reads why a container ended; written only if the file is there.
    #[arg(long, env = "VICUNA_TERMINATION_LOG", default_value = "/dev/termination-log")]
    pub termination_log: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// bf16 where the model is stored in it and the device is a GPU, else fp32.
    Auto,
    Fp32,
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Quantization {
    File,
    None,
    Int8,
    Int4,
}

impl Options {
    /// `bf16_on_gpu`: the model is stored in bf16, and the device is a GPU.
    pub fn precision(&self, bf16_on_gpu: bool) -> Precision {
        match (self.quantization, self.dtype) {
            (Quantization::Int8, _) => Precision::Int8,
            (Quantization::Int4, _) => Precision::Int4,
            (_, Dtype::Bf16) => Precision::Bf16,
            (_, Dtype::Auto) if bf16_on_gpu => Precision::Bf16,
            (Quantization::File, _) => Precision::File,
            (Quantization::None, _) => Precision::Fp32,
        }
    }

    pub fn threads(&self) -> usize {
        let usable = || std::thread::available_parallelism().map_or(1, |threads| threads.get().min(MOST_THREADS));
        self.threads.map_or_else(usable, |threads| threads as usize)
    }

    /// What gateways call it: workers of one name would be taken for one.
    pub fn worker_name(&self) -> String {
        let host = || std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let drawn = || format!("{}-{:06x}", named_host(&host()), rand::random_range(0..1 << 24));
        self.worker_name.clone().unwrap_or_else(drawn)
    }

    /// Public names of all that is loaded from the start on.
    pub fn names(&self) -> Vec<String> {
        self.models().into_iter().chain(self.adapters.iter().cloned()).map(|(name, _)| name).collect()
    }

    /// Name and URI of every model, adapters apart.
    pub fn models(&self) -> Vec<(String, String)> {
        let mut models: Vec<_> = self.model_name.clone().zip(self.model_uri.clone()).into_iter().collect();
        models.extend(self.also_serve.iter().cloned());
        models
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

fn named_host(host: &str) -> &str {
    match host.trim() {
        "" => "external",
        host => host,
    }
}

fn named_uri(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, uri)) if !name.is_empty() && !uri.is_empty() => Ok((name.to_owned(), uri.to_owned())),
        _ => Err(format!("{text:?} is not NAME=URI")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(more: &[&str]) -> Options {
        let given = ["worker", "--model-name", "a/b", "--model-uri", "file:///m", "--gateway", "http://g:1"];
        Options::parse_from(given.iter().chain(more))
    }

    #[test]
    fn quantization_and_dtype_name_one_precision() {
        for (arguments, expected) in [
            (&[][..], Precision::File),
            (&["--quantization", "none"], Precision::Fp32),
            (&["--dtype", "bf16"], Precision::Bf16),
            (&["--quantization", "int8", "--dtype", "bf16"], Precision::Int8),
            (&["--quantization", "int4"], Precision::Int4),
        ] {
            assert_eq!(options(arguments).precision(false), expected, "{arguments:?}");
        }
        for (arguments, expected) in [
            (&[][..], Precision::Bf16),
            (&["--dtype", "fp32"], Precision::File),
            (&["--quantization", "none"], Precision::Bf16),
            (&["--quantization", "int8"], Precision::Int8),
        ] {
            assert_eq!(options(arguments).precision(true), expected, "{arguments:?} of a bf16 model on a GPU");
        }
    }

    #[test]
    fn external_workers_have_names_of_their_own() {
        assert_eq!(options(&["--worker-name", "w"]).worker_name(), "w");
        let (one, other) = (options(&[]), options(&[]));
        assert_ne!(one.worker_name(), other.worker_name());
        assert_eq!((named_host(" \n"), named_host("box\n")), ("external", "box"));
    }

    #[test]
    fn several_models_are_named_with_their_uris() {
        let several = options(&["--also-serve", "a/c=file:///n", "--also-serve", "a/d=s3://x?y=z"]).models();
        assert_eq!(several.len(), 3);
        assert_eq!(several[2], ("a/d".to_owned(), "s3://x?y=z".to_owned()));
        let adapted = options(&["--adapter", "a/b:x=s3://x/y", "--adapter", "a/b:z=file:///z"]).adapters;
        assert_eq!(adapted[0], ("a/b:x".to_owned(), "s3://x/y".to_owned()));
        assert_eq!(adapted.len(), 2);
        assert!(named_uri("nothing").is_err());
    }
}
