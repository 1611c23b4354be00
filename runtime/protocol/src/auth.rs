//! Bearer tokens: projected service-account tokens, verified against the cluster's public keys
//! without asking the API server (Kubernetes, "Service account issuer discovery").

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
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
    #[error("the token has run out: write a new one into the file that the caller reads it from")]
    Expired,
    #[error("the token is for another audience: make it with `kubectl create token ACCOUNT --audience {0}`")]
    Audience(String),
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
        let decoded = decode::<Claims>(token, &DecodingKey::from_jwk(key)?, &rules);
        let claims = decoded.map_err(|error| self.refusal(error))?.claims;
        let claims = claims.kubernetes.ok_or(AuthError::NotServiceAccount)?;
        Ok(Caller {
            namespace: claims.namespace,
            service_account: claims.serviceaccount.name,
            pod_uid: claims.pod.as_ref().and_then(|pod| pod.uid.clone()),
            pod_name: claims.pod.map(|pod| pod.name),
        })
    }

    /// What a person can do something about is said so.
    fn refusal(&self, error: jsonwebtoken::errors::Error) -> AuthError {
        match error.kind() {
            ErrorKind::ExpiredSignature => AuthError::Expired,
            ErrorKind::InvalidAudience => AuthError::Audience(self.audience.clone()),
            _ => error.into(),
        }
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

/// A token in a file that is read at every call: the kubelet renews it there, or whoever runs a worker outside the cluster.
///
/// The file may be a *bundle*: PEM blocks in it, the CA's certificate, are not part of the token.
#[derive(Clone, Debug)]
pub struct TokenFile(PathBuf);

impl TokenFile {
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self(path.as_ref().to_owned())
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn read(&self) -> Result<String, Status> {
        let path = self.0.display();
        let text = std::fs::read_to_string(&self.0)
            .map_err(|error| Status::unauthenticated(format!("cannot read the token {path}: {error}")))?;
        let token = token_in(&text);
        token.ok_or_else(|| Status::unauthenticated(format!("{path} must hold one token, on one line")))
    }

    /// Whether it is a bundle.
    pub fn holds_certificates(&self) -> bool {
        std::fs::read_to_string(&self.0).is_ok_and(|text| text.lines().any(|line| line.starts_with(CERTIFICATE)))
    }

    /// Adds the token to a request.
    pub fn sign<T>(&self, mut request: Request<T>) -> Result<Request<T>, Status> {
        request.metadata_mut().insert("authorization", bearer(&self.read()?)?);
        Ok(request)
    }
}

const CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----";

/// How a token is sent.
pub fn bearer(token: &str) -> Result<AsciiMetadataValue, Status> {
    let value = format!("Bearer {token}").parse();
    value.map_err(|_| Status::unauthenticated("the token file holds no token"))
}

/// The one line that is outside of all PEM blocks.
fn token_in(text: &str) -> Option<String> {
    let mut in_block = false;
    let mut lines = text.lines().map(str::trim).filter(|line| {
        in_block |= line.starts_with("-----BEGIN ");
        let outside = !in_block && !line.is_empty();
        in_block &= !line.starts_with("-----END ");
        outside
    });
    let token = lines.next()?.to_owned();
    lines.next().is_none().then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_found_beside_certificates() {
        let pem = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
        for bundle in ["a.b.c".to_owned(), format!("{pem}a.b.c\n"), format!(" a.b.c \n\n{pem}{pem}")] {
            assert_eq!(token_in(&bundle).as_deref(), Some("a.b.c"), "{bundle}");
        }
        for none in [String::new(), pem.to_owned(), format!("a.b.c\n{pem}d.e.f")] {
            assert_eq!(token_in(&none), None, "{none}");
        }
    }
}
