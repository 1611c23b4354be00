//! Trust between our own parts: a private CA that renews itself, and the cluster's public token keys.
//!
//! The CA's key is in a Secret of the operator's namespace. Everybody else gets a ConfigMap with the
//! CAs' certificates and the keys with which the API server signs service-account tokens. The CA's and the
//! gateway's are the only Secrets that the operator touches.

mod authority;
mod listener;
mod rotation;
mod secret;
#[cfg(test)]
mod testing;
mod trust;

pub use listener::{Connection, bind};
pub use trust::{Clock, Trust};

use crate::leader::NotLeader;

#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("{what} cannot be read or written: {source}")]
    Kube {
        what: String,
        #[source]
        source: Box<kube::Error>,
    },
    #[error("a certificate cannot be made: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error("a certificate or its key cannot be read: {0}")]
    UnreadableCertificate(String),
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
    #[error(
        "the secret {0} lacks a certificate, a key or a time: delete it, and a new CA is made; pods trust it within minutes"
    )]
    MalformedCa(String),
    #[error("the API server's token keys cannot be read: {0}")]
    Keys(#[from] serde_json::Error),
    #[error(transparent)]
    NotLeader(#[from] NotLeader),
}
