//! TLS between our own parts: one private CA, its certificate read from a mounted file.

use std::path::{Path, PathBuf};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read the CA bundle {path}: {source}; is the trust ConfigMap mounted?")]
    ReadBundle { path: PathBuf, source: std::io::Error },
    #[error("cannot use {url} as an endpoint: {source}")]
    Endpoint { url: String, source: tonic::transport::Error },
}

/// A lazy channel to `url`, trusting only the CA in `ca_file`. `server_name` is the name in the
/// server's certificate, which may differ from the address that is dialled.
pub fn channel(url: &str, ca_file: &Path, server_name: &str) -> Result<Channel, TlsError> {
    let pem = std::fs::read(ca_file).map_err(|source| TlsError::ReadBundle { path: ca_file.to_owned(), source })?;
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)).domain_name(server_name);
    let failed = |source| TlsError::Endpoint { url: url.to_owned(), source };
    Ok(Endpoint::from_shared(url.to_owned())
        .map_err(failed)?
        .tls_config(tls)
        .map_err(failed)?
        .connect_timeout(std::time::Duration::from_secs(5))
        .http2_keep_alive_interval(std::time::Duration::from_secs(5))
        .keep_alive_timeout(std::time::Duration::from_secs(5))
        .keep_alive_while_idle(true)
        .tcp_nodelay(true)
        .connect_lazy())
}
