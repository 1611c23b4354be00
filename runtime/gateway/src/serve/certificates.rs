//! The certificate that a listener shows, read again when its files change: connections that are
//! there stay, new ones see the new certificate.

use super::watched::{Unreadable, Watched};
use parking_lot::{Mutex, RwLock};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    #[error("the certificate is not PEM: {0}")]
    NotPem(#[from] rustls::pki_types::pem::Error),
    #[error("the certificate cannot be used: {0}; do certificate and key belong together?")]
    Unusable(#[from] rustls::Error),
    #[error("the certificate file holds no certificate")]
    Empty,
}

/// A certificate chain and its key, as the files last held them in a usable form.
#[derive(Debug)]
pub struct Certificates {
    files: Mutex<Watched>,
    current: RwLock<Arc<CertifiedKey>>,
}

impl Certificates {
    /// PEM files of the chain and of its private key.
    pub fn load(chain: &Path, key: &Path) -> Result<Arc<Self>, CertificateError> {
        let mut files = Watched::new(&[chain, key]);
        let contents = files.changed()?.unwrap_or_default();
        let current = RwLock::new(Arc::new(certified(&contents)?));
        Ok(Arc::new(Self { files: Mutex::new(files), current }))
    }

    /// TLS with this certificate, whatever it is at the time of the handshake.
    pub fn server(self: &Arc<Self>, protocols: &[&str]) -> Result<Arc<rustls::ServerConfig>, CertificateError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(self.clone());
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        Ok(Arc::new(config))
    }

    /// Looks at the files every `interval`. What cannot be used is not: the last good pair stays.
    pub async fn watch(self: Arc<Self>, interval: Duration) {
        let mut ticks = tokio::time::interval(interval);
        loop {
            ticks.tick().await;
            match self.reload() {
                Ok(true) => tracing::info!("the certificate has been renewed"),
                Ok(false) => {}
                Err(error) => tracing::error!(%error, "the new certificate is not used; the old one stays"),
            }
        }
    }

    fn reload(&self) -> Result<bool, CertificateError> {
        let Some(contents) = self.files.lock().changed()? else {
            return Ok(false);
        };
        *self.current.write() = Arc::new(certified(&contents)?);
        Ok(true)
    }
}

fn certified(contents: &[Vec<u8>]) -> Result<CertifiedKey, CertificateError> {
    let [chain, key] = contents else {
        return Err(CertificateError::Empty);
    };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(chain).collect::<Result<_, _>>()?;
    if chain.is_empty() {
        return Err(CertificateError::Empty);
    }
    let key = PrivateKeyDer::from_pem_slice(key)?;
    Ok(CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider())?)
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.read().clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair};

    fn write(folder: &Path, name: &str) {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().self_signed(&key).unwrap();
        std::fs::write(folder.join("tls.crt"), certificate.pem()).unwrap();
        std::fs::write(folder.join("tls.key"), key.serialize_pem()).unwrap();
    }

    #[test]
    fn a_new_certificate_is_taken_and_half_a_new_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (chain, key) = (folder.path().join("tls.crt"), folder.path().join("tls.key"));
        write(folder.path(), "first");
        let certificates = Certificates::load(&chain, &key).unwrap();
        let shown = || certificates.current.read().cert.clone();
        let first = shown();
        assert!(!certificates.reload().unwrap());

        write(folder.path(), "second");
        let whole = std::fs::read(&key).unwrap();
        write(folder.path(), "third");
        std::fs::write(&key, whole).unwrap();
        assert!(certificates.reload().is_err(), "chain and key of two pairs");
        assert_eq!(shown(), first);

        write(folder.path(), "fourth");
        assert!(certificates.reload().unwrap());
        assert_ne!(shown(), first);
    }
}
