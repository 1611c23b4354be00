//! Files into and out of the cluster's bucket, by curl with the S3 signature.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cluster::S3;

/// The small real model, below the cache and below `models/` of the samples' bucket.
pub const SMOLLM2: &str = "smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf";

/// Where `tests/tools/model.sh` has put it.
pub fn smollm2() -> Result<PathBuf> {
    let cache = std::env::var_os("VICUNA_CACHE").context("VICUNA_CACHE is not set: source tests/tools/env.sh")?;
    Ok(PathBuf::from(cache).join(SMOLLM2))
}

/// A bucket as seen from the host.
#[derive(Debug, Clone)]
pub struct Bucket {
    s3: S3,
}

impl Bucket {
    pub fn new(s3: S3) -> Self {
        Self { s3 }
    }

    pub fn put(&self, key: &str, file: &Path) -> Result<()> {
        self.curl(key, &["--upload-file", &file.display().to_string()]).map(drop)
    }

    pub fn get(&self, key: &str) -> Result<Vec<u8>> {
        self.curl(key, &[])
    }

    pub fn delete(&self, key: &str) -> Result<()> {
        self.curl(key, &["--request", "DELETE"]).map(drop)
    }

    fn curl(&self, key: &str, words: &[&str]) -> Result<Vec<u8>> {
        let s3 = &self.s3;
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--fail-with-body", "--max-time", "120"]);
        command.args(["--aws-sigv4", &format!("aws:amz:{}:s3", s3.region)]);
        command.args(["--header", "x-amz-content-sha256: UNSIGNED-PAYLOAD"]).args(words);
        command.arg(format!("{}/{}/{key}", s3.host_endpoint, s3.bucket));
        // The key goes in by a configuration on standard input: arguments are visible to everybody on the machine.
        let output = super::with_input(
            command.args(["--config", "-"]),
            &format!("user = \"{}:{}\"\n", s3.access_key, s3.secret_key),
        )?;
        if !output.status.success() {
            let told = String::from_utf8_lossy(&output.stdout);
            bail!("s3://{}/{key}: {} {told}", s3.bucket, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(output.stdout)
    }
}
