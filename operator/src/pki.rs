//! Trust between our own parts: a private CA, and the cluster's public token keys.
//!
//! The CA's key is in a Secret of the operator's namespace. Everybody else gets a ConfigMap with the
//! CA's certificate and the keys with which the API server signs service-account tokens. These and the
//! gateway's certificate are the only Secrets that the operator touches.

use crate::config::{Config, MANAGER};
use crate::leader::{Leadership, NotLeader};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};
use time::OffsetDateTime;
use tokio::sync::watch;
use vicuna_protocol::COORDINATOR_AUDIENCE;
use vicuna_protocol::auth::TokenVerifier;

const CA_DAYS: i64 = 3650;
const SERVING_DAYS: i64 = 90;
/// A serving certificate is replaced when so much of its life is over.
const RENEW_AFTER_DAYS: i64 = 60;
/// The operator's own certificate is made anew at every start.
const OPERATOR_DAYS: i64 = 730;
const REFRESH_EVERY: Duration = Duration::from_secs(60);
/// A ConfigMap that somebody deleted is there again after so long.
const REPUBLISH_AFTER: Duration = Duration::from_secs(600);
const MAX_NAMESPACES: usize = 10_000;
const ISSUED_ANNOTATION: &str = "vicuna.dev/issued-at";
const CA_ANNOTATION: &str = "vicuna.dev/ca-digest";

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
    #[error(
        "the secret {0} lacks tls.crt or tls.key: delete it, and restart operator, gateway and pods so that all trust a new CA"
    )]
    MalformedCa(String),
    #[error("the API server's token keys cannot be read: {0}")]
    Keys(#[from] serde_json::Error),
    #[error(transparent)]
    NotLeader(#[from] NotLeader),
}

fn failed(what: &str) -> impl FnOnce(kube::Error) -> PkiError {
    let what = what.to_owned();
    move |source| PkiError::Kube { what, source: Box::new(source) }
}

/// PEM texts of a certificate and its key.
#[derive(Clone)]
pub struct Identity {
    pub certificate: String,
    pub key: String,
}

/// The CA.
pub struct Authority(Identity);

impl Authority {
    /// Makes a new CA.
    pub fn generate() -> Result<Self, PkiError> {
        let key = KeyPair::generate()?;
        let mut params = parameters(&[], CA_DAYS)?;
        params.distinguished_name.push(DnType::CommonName, "vicuna-operator CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Ok(Self(Identity { certificate: params.self_signed(&key)?.pem(), key: key.serialize_pem() }))
    }

    pub fn certificate(&self) -> &str {
        &self.0.certificate
    }

    /// A server's certificate for these names.
    pub fn issue(&self, names: &[&str], days: i64) -> Result<Identity, PkiError> {
        let issuer = Issuer::from_ca_cert_pem(&self.0.certificate, KeyPair::from_pem(&self.0.key)?)?;
        let key = KeyPair::generate()?;
        let mut params = parameters(names, days)?;
        params.distinguished_name.push(DnType::CommonName, names.first().copied().unwrap_or_default());
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        Ok(Identity { certificate: params.signed_by(&key, &issuer)?.pem(), key: key.serialize_pem() })
    }

    fn digest(&self) -> String {
        hex::encode(&Sha256::digest(self.0.certificate.as_bytes())[..16])
    }

    /// The CA of this installation: read, or made by whoever comes first.
    async fn load_or_create(client: &Client, config: &Config, leadership: &Leadership) -> Result<Self, PkiError> {
        let secrets: Api<Secret> = Api::namespaced(client.clone(), &config.namespace);
        let name = &config.ca_secret;
        if let Some(secret) = secrets.get_opt(name).await.map_err(failed("the CA secret"))? {
            return Self::read(&secret);
        }
        let made = Self::generate()?;
        leadership.check()?;
        match secrets.create(&PostParams::default(), &tls_secret(name, &made.0, BTreeMap::new())).await {
            Ok(_) => {
                tracing::info!(secret = name, "made a CA");
                Ok(made)
            }
            Err(kube::Error::Api(status)) if status.code == 409 => {
                Self::read(&secrets.get(name).await.map_err(failed("the CA secret"))?)
            }
            Err(error) => Err(failed("the CA secret")(error)),
        }
    }

    fn read(secret: &Secret) -> Result<Self, PkiError> {
        let text = |key: &str| {
            let bytes = secret.data.as_ref()?.get(key)?;
            String::from_utf8(bytes.0.clone()).ok()
        };
        match (text("tls.crt"), text("tls.key")) {
            (Some(certificate), Some(key)) => Ok(Self(Identity { certificate, key })),
            _ => Err(PkiError::MalformedCa(secret.name_any())),
        }
    }
}

fn parameters(names: &[&str], days: i64) -> Result<CertificateParams, rcgen::Error> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names)?;
    let now = OffsetDateTime::now_utc();
    // Nodes' clocks differ.
    params.not_before = now - time::Duration::hours(1);
    params.not_after = now + time::Duration::days(days);
    params.distinguished_name = rcgen::DistinguishedName::new();
    Ok(params)
}

fn tls_secret(name: &str, identity: &Identity, annotations: BTreeMap<String, String>) -> Secret {
    let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
    Secret {
        metadata: metadata(name, annotations),
        type_: Some("kubernetes.io/tls".to_owned()),
        data: Some(
            [("tls.crt".to_owned(), bytes(&identity.certificate)), ("tls.key".to_owned(), bytes(&identity.key))].into(),
        ),
        ..Secret::default()
    }
}

fn metadata(name: &str, annotations: BTreeMap<String, String>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        labels: Some([("app.kubernetes.io/managed-by".to_owned(), MANAGER.to_owned())].into()),
        annotations: (!annotations.is_empty()).then_some(annotations),
        ..ObjectMeta::default()
    }
}

/// Publishes what our pods trust, and keeps it fresh.
pub struct Trust {
    client: Client,
    config: Arc<Config>,
    leadership: Leadership,
    authority: Authority,
    keys: watch::Sender<Arc<Keys>>,
    published: Mutex<HashMap<String, Published>>,
}

/// The keys with which the API server signs tokens.
pub struct Keys {
    jwks: String,
    /// For tokens of ranks and gateways.
    pub verifier: TokenVerifier,
}

struct Published {
    at: Instant,
    digest: String,
}

impl Trust {
    /// Reads or makes the CA and reads the token keys.
    pub async fn start(client: Client, config: Arc<Config>, leadership: Leadership) -> Result<Self, PkiError> {
        let authority = Authority::load_or_create(&client, &config, &leadership).await?;
        let keys = read_keys(&client).await?;
        Ok(Self {
            client,
            config,
            leadership,
            authority,
            keys: watch::Sender::new(Arc::new(keys)),
            published: Mutex::default(),
        })
    }

    /// The coordinator's certificate, for its Service's name in and outside of its namespace.
    pub fn operator_identity(&self) -> Result<Identity, PkiError> {
        self.issue_for(&self.config.coordinator_service, OPERATOR_DAYS)
    }

    pub fn keys(&self) -> Arc<Keys> {
        self.keys.borrow().clone()
    }

    /// Makes the trust ConfigMap of a namespace be there and be right. Cheap when it was just done.
    pub async fn ensure(&self, namespace: &str) -> Result<(), PkiError> {
        let keys = self.keys();
        let digest = hex::encode(Sha256::digest(keys.jwks.as_bytes()));
        let fresh = self
            .published
            .lock()
            .get(namespace)
            .is_some_and(|last| last.digest == digest && last.at.elapsed() < REPUBLISH_AFTER);
        if fresh {
            return Ok(());
        }
        self.publish(namespace, &keys.jwks).await?;
        let mut published = self.published.lock();
        if published.len() < MAX_NAMESPACES {
            published.insert(namespace.to_owned(), Published { at: Instant::now(), digest });
        }
        Ok(())
    }

    async fn publish(&self, namespace: &str, jwks: &str) -> Result<(), PkiError> {
        let name = &self.config.trust_config_map;
        let map = ConfigMap {
            metadata: metadata(name, BTreeMap::new()),
            data: Some(
                [
                    ("ca.crt".to_owned(), self.authority.certificate().to_owned()),
                    ("jwks.json".to_owned(), jwks.to_owned()),
                ]
                .into(),
            ),
            ..ConfigMap::default()
        };
        self.leadership.check()?;
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        let parameters = PatchParams::apply(MANAGER).force();
        maps.patch(name, &parameters, &Patch::Apply(&map))
            .await
            .map_err(failed(&format!("the trust ConfigMap {namespace}/{name}")))?;
        Ok(())
    }

    fn issue_for(&self, service: &str, days: i64) -> Result<Identity, PkiError> {
        let namespace = &self.config.namespace;
        let qualified = format!("{service}.{namespace}.svc");
        self.authority.issue(&[service, &qualified], days)
    }

    /// Keeps everything fresh until we are not the leader any more.
    pub async fn keep_fresh(self: Arc<Self>) {
        let mut round = tokio::time::interval(REFRESH_EVERY);
        loop {
            round.tick().await;
            if !self.leadership.is_held() {
                return;
            }
            if let Err(error) = self.refresh().await {
                tracing::warn!(%error, "trust could not be refreshed and is tried again");
            }
        }
    }

    async fn refresh(&self) -> Result<(), PkiError> {
        let keys = read_keys(&self.client).await?;
        self.keys.send_if_modified(|current| {
            let changed = current.jwks != keys.jwks;
            *current = Arc::new(keys);
            changed
        });
        self.ensure_gateway_certificate().await?;
        let mut namespaces: BTreeSet<String> = self.published.lock().keys().cloned().collect();
        namespaces.insert(self.config.namespace.clone());
        for namespace in namespaces {
            match self.ensure(&namespace).await {
                // A namespace that is gone needs no trust.
                Err(PkiError::Kube { source, .. }) if is_gone(&source) => {
                    self.published.lock().remove(&namespace);
                }
                other => other?,
            }
        }
        Ok(())
    }

    async fn ensure_gateway_certificate(&self) -> Result<(), PkiError> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.config.namespace);
        let name = &self.config.gateway_tls_secret;
        let current = secrets.get_opt(name).await.map_err(failed("the gateway's certificate"))?;
        let now = OffsetDateTime::now_utc().unix_timestamp();
        if current.is_some_and(|secret| is_fresh(&secret, &self.authority.digest(), now)) {
            return Ok(());
        }
        let gateway = &self.config.gateway_service;
        let workers = &self.config.gateway_workers_service;
        let namespace = &self.config.namespace;
        let qualified = [format!("{gateway}.{namespace}.svc"), format!("{workers}.{namespace}.svc")];
        let names = [gateway.as_str(), workers, &qualified[0], &qualified[1]];
        let identity = self.authority.issue(&names, SERVING_DAYS)?;
        let annotations =
            [(ISSUED_ANNOTATION.to_owned(), now.to_string()), (CA_ANNOTATION.to_owned(), self.authority.digest())];
        self.leadership.check()?;
        let secret = tls_secret(name, &identity, annotations.into());
        let parameters = PatchParams::apply(MANAGER).force();
        secrets.patch(name, &parameters, &Patch::Apply(&secret)).await.map_err(failed("the gateway's certificate"))?;
        tracing::info!(secret = name, days = SERVING_DAYS, "issued the gateway's certificate");
        Ok(())
    }
}

fn is_gone(error: &kube::Error) -> bool {
    // 403 with this reason: the namespace is being deleted.
    matches!(error, kube::Error::Api(status) if status.code == 404 || status.message.contains("being terminated"))
}

fn is_fresh(secret: &Secret, ca_digest: &str, now: i64) -> bool {
    let annotation = |key: &str| secret.annotations().get(key).map(String::as_str);
    let issued: Option<i64> = annotation(ISSUED_ANNOTATION).and_then(|text| text.parse().ok());
    let young = issued.is_some_and(|issued| now - issued < RENEW_AFTER_DAYS * 86_400);
    young && annotation(CA_ANNOTATION) == Some(ca_digest)
}

async fn read_keys(client: &Client) -> Result<Keys, PkiError> {
    let request = http::Request::get("/openid/v1/jwks")
        .body(Vec::new())
        .map_err(|error| failed("the token keys")(kube::Error::HttpError(error)))?;
    let jwks = client.request_text(request).await.map_err(failed("the token keys at /openid/v1/jwks"))?;
    let verifier = TokenVerifier::new(&jwks, COORDINATOR_AUDIENCE)?;
    Ok(Keys { jwks, verifier })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};

    fn verify(authority: &Authority, identity: &Identity, name: &str) -> bool {
        verify_in(authority, identity, name, 0)
    }

    fn verify_in(authority: &Authority, identity: &Identity, name: &str, days: u64) -> bool {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.certificate().as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier =
            rustls::client::WebPkiServerVerifier::builder_with_provider(roots.into(), provider).build().unwrap();
        let leaf = CertificateDer::from_pem_slice(identity.certificate.as_bytes()).unwrap();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        use rustls::client::danger::ServerCertVerifier;
        let then = UnixTime::now().as_secs() + days * 86_400;
        let then = UnixTime::since_unix_epoch(Duration::from_secs(then));
        verifier.verify_server_cert(&leaf, &[], &name, &[], then).is_ok()
    }

    #[test]
    fn clients_accept_our_names_from_our_ca_only() {
        let authority = Authority::generate().unwrap();
        let identity = authority.issue(&["vicuna-operator", "vicuna-operator.ns.svc"], 90).unwrap();
        assert!(verify(&authority, &identity, "vicuna-operator"));
        assert!(verify(&authority, &identity, "vicuna-operator.ns.svc"));
        assert!(!verify(&authority, &identity, "vicuna-gateway"));
        assert!(!verify(&Authority::generate().unwrap(), &identity, "vicuna-operator"));
    }

    #[test]
    fn an_expired_certificate_is_not_accepted() {
        let authority = Authority::generate().unwrap();
        let identity = authority.issue(&["vicuna-operator"], 90).unwrap();
        assert!(verify_in(&authority, &identity, "vicuna-operator", 89));
        assert!(!verify_in(&authority, &identity, "vicuna-operator", 91));
    }

    #[test]
    fn a_ca_survives_its_secret() {
        let authority = Authority::generate().unwrap();
        let secret = tls_secret("vicuna-ca", &authority.0, BTreeMap::new());
        let read = Authority::read(&secret).unwrap();
        assert_eq!(read.digest(), authority.digest());
        let identity = read.issue(&["a"], 1).unwrap();
        assert!(verify(&authority, &identity, "a"));
        assert!(Authority::read(&Secret::default()).is_err());
    }

    #[test]
    fn the_gateways_certificate_is_renewed_in_time_and_after_a_change_of_ca() {
        let annotations =
            [(ISSUED_ANNOTATION.to_owned(), "1000000".to_owned()), (CA_ANNOTATION.to_owned(), "ca1".to_owned())];
        let identity = Identity { certificate: String::new(), key: String::new() };
        let secret = tls_secret("s", &identity, annotations.into());
        assert!(is_fresh(&secret, "ca1", 1_000_000 + 59 * 86_400));
        assert!(!is_fresh(&secret, "ca1", 1_000_000 + 61 * 86_400));
        assert!(!is_fresh(&secret, "ca2", 1_000_000));
        assert!(!is_fresh(&Secret::default(), "ca1", 0));
    }
}
