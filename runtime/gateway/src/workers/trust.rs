//! The keys that workers' tokens are verified with, as the operator publishes them.

use std::path::{Path, PathBuf};
use tonic::Status;
use tonic::metadata::MetadataMap;
use vicuna_protocol::GATEWAY_AUDIENCE;
use vicuna_protocol::auth::{Caller, TokenVerifier};

/// `jwks.json` in the mounted trust. It is read at every attachment, which is rare: so a rotated key
/// counts as soon as the kubelet has written it.
#[derive(Clone, Debug)]
pub struct Trust(PathBuf);

impl Trust {
    pub fn new(folder: &Path) -> Self {
        Self(folder.join("jwks.json"))
    }

    /// Who calls.
    pub fn verify(&self, metadata: &MetadataMap) -> Result<Caller, Status> {
        Ok(self.verifier()?.verify_call(metadata)?)
    }

    /// Whose token this is.
    pub fn verify_token(&self, token: &str) -> Result<Caller, Status> {
        Ok(self.verifier()?.verify(token)?)
    }

    fn verifier(&self) -> Result<TokenVerifier, Status> {
        let unusable = |error: &dyn std::fmt::Display| {
            let path = self.0.display();
            tracing::warn!(%path, %error, "cannot read the published keys");
            Status::unavailable("the gateway has no keys to verify tokens with yet; try again")
        };
        let keys = std::fs::read_to_string(&self.0).map_err(|error| unusable(&error))?;
        TokenVerifier::new(&keys, GATEWAY_AUDIENCE).map_err(|error| unusable(&error))
    }
}
