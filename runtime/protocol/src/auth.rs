//! Bearer tokens: projected service-account tokens, verified against the cluster's public keys
//! without asking the API server (Kubernetes, "Service account issuer discovery").

use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use tonic::metadata::MetadataMap;
use tonic::{Request, Status};

/// Who called, as the API server signed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    pub namespace: String,
    pub service_account: String,
    /// Present for tokens bound to a pod, which all of ours are.
    pub pod_name: Option<String>,
    pub pod_uid: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("the call carries no bearer token: mount a projected token and send it")]
    Missing,
    #[error("the token is not acceptable: {0}")]
    Invalid(#[from] jsonwebtoken::errors::Error),
    #[error("the token was signed with key {0:?}, which the cluster does not publish")]
    UnknownKey(Option<String>),
    #[error("the token is not a service account's")]
    NotServiceAccount,
}

impl From<AuthError> for Status {
    fn from(error: AuthError) -> Self {
        Status::unauthenticated(error.to_string())
    }
}

/// Verifies tokens of one audience.
#[derive(Clone, Debug)]
pub struct TokenVerifier {
    keys: JwkSet,
    audience: String,
}

#[derive(Deserialize)]
struct Claims {
    #[serde(rename = "kubernetes.io")]
    kubernetes: Option<KubernetesClaims>,
}

#[derive(Deserialize)]
struct KubernetesClaims {
    namespace: String,
    serviceaccount: Named,
    pod: Option<Named>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
    uid: Option<String>,
}

impl TokenVerifier {
    /// `jwks` is the document that the API server serves at `/openid/v1/jwks`.
    pub fn new(jwks: &str, audience: &str) -> Result<Self, serde_json::Error> {
        Ok(Self { keys: serde_json::from_str(jwks)?, audience: audience.to_owned() })
    }

    /// Verifies signature, audience and expiry of a raw token.
    pub fn verify(&self, token: &str) -> Result<Caller, AuthError> {
        let header = decode_header(token)?;
        let key = header
            .kid
            .as_deref()
            .and_then(|kid| self.keys.find(kid))
            .ok_or_else(|| AuthError::UnknownKey(header.kid.clone()))?;
        let mut rules = Validation::new(header.alg);
        rules.algorithms = vec![Algorithm::RS256, Algorithm::ES256];
        rules.algorithms.retain(|allowed| *allowed == header.alg);
        rules.set_audience(&[&self.audience]);
        rules.set_required_spec_claims(&["exp", "aud"]);
        let claims = decode::<Claims>(token, &DecodingKey::from_jwk(key)?, &rules)?.claims;
        let claims = claims.kubernetes.ok_or(AuthError::NotServiceAccount)?;
        Ok(Caller {
            namespace: claims.namespace,
            service_account: claims.serviceaccount.name,
            pod_uid: claims.pod.as_ref().and_then(|pod| pod.uid.clone()),
            pod_name: claims.pod.map(|pod| pod.name),
        })
    }

    /// Verifies the token in a call's metadata.
    pub fn verify_call(&self, metadata: &MetadataMap) -> Result<Caller, AuthError> {
        let token = metadata
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("Bearer "))
            .ok_or(AuthError::Missing)?;
        self.verify(token)
    }
}

/// A token that the kubelet rotates on disk: read at every call.
#[derive(Clone, Debug)]
pub struct TokenFile(PathBuf);

impl TokenFile {
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self(path.as_ref().to_owned())
    }

    /// Adds the token to a request.
    pub fn sign<T>(&self, mut request: Request<T>) -> Result<Request<T>, Status> {
        let token = std::fs::read_to_string(&self.0)
            .map_err(|error| Status::unauthenticated(format!("cannot read the token {}: {error}", self.0.display())))?;
        let value = format!("Bearer {}", token.trim())
            .parse()
            .map_err(|_| Status::unauthenticated("the token file holds no token"))?;
        request.metadata_mut().insert("authorization", value);
        Ok(request)
    }
}
