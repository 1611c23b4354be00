//! Publishes what our pods trust, and keeps it and the certificates of our servers fresh.

use super::PkiError;
use super::authority::Identity;
use super::listener::{self, Connection, Shown};
use super::rotation::Succession;
use super::secret::{self, metadata, tls_secret};
use crate::config::{Config, MANAGER};
use crate::leader::Leadership;
use futures::Stream;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::sync::Arc;
use time::{Duration, OffsetDateTime};
use tokio::net::TcpListener;
use tokio::sync::watch;
use vicuna_protocol::COORDINATOR_AUDIENCE;
use vicuna_protocol::auth::TokenVerifier;

const SERVING_DAYS: i64 = 90;
/// A serving certificate is replaced when so much of its life is over.
const RENEW_AFTER: Duration = Duration::days(60);
const REFRESH_EVERY: std::time::Duration = std::time::Duration::from_secs(60);
/// A ConfigMap that somebody deleted is there again after so long.
const REPUBLISH_AFTER: Duration = Duration::minutes(10);
const MAX_NAMESPACES: usize = 10_000;
const ISSUED_ANNOTATION: &str = "vicuna.dev/issued-at";
const CA_ANNOTATION: &str = "vicuna.dev/ca-digest";

/// The time, for certificates; tests bring their own.
pub type Clock = Arc<dyn Fn() -> OffsetDateTime + Send + Sync>;

pub struct Trust {
    client: Client,
    config: Arc<Config>,
    leadership: Leadership,
    clock: Clock,
    succession: Mutex<Arc<Succession>>,
    keys: watch::Sender<Arc<Keys>>,
    published: Mutex<HashMap<String, Published>>,
    /// The coordinator's certificate, and what it was made from.
    shown: Shown,
    issued: Mutex<Issued>,
}

/// The keys with which the API server signs tokens.
pub struct Keys {
    jwks: String,
    /// For tokens of ranks and gateways.
    pub verifier: TokenVerifier,
}

struct Published {
    at: OffsetDateTime,
    digest: String,
}

/// Since when, and by which CA, a certificate has been there.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Issued {
    at: OffsetDateTime,
    ca: String,
}

impl Issued {
    /// It is young, and of the CA that signs now.
    fn is_fresh(&self, ca: &str, now: OffsetDateTime) -> bool {
        now - self.at < RENEW_AFTER && self.ca == ca
    }
}

impl Trust {
    /// Reads or makes the CA and reads the token keys.
    pub async fn start(
        client: Client,
        config: Arc<Config>,
        leadership: Leadership,
        clock: Clock,
    ) -> Result<Self, PkiError> {
        let now = clock();
        let succession = load_or_create(&client, &config, &leadership, now).await?;
        let keys = read_keys(&client).await?;
        let issued = Issued { at: now, ca: succession.signing.digest() };
        let shown = Shown::new(&operator_identity(&config, &succession, now)?)?;
        Ok(Self {
            client,
            config,
            leadership,
            clock,
            succession: Mutex::new(Arc::new(succession)),
            keys: watch::Sender::new(Arc::new(keys)),
            published: Mutex::default(),
            shown,
            issued: Mutex::new(issued),
        })
    }

    /// Connections to the coordinator under its name in and outside of its namespace, with a certificate that is
    /// renewed while it is served.
    pub fn listen(
        &self,
        listener: TcpListener,
    ) -> Result<impl Stream<Item = io::Result<Connection>> + Send + use<>, PkiError> {
        listener::connections(listener, self.shown.clone())
    }

    pub fn keys(&self) -> Arc<Keys> {
        self.keys.borrow().clone()
    }

    /// Makes the trust ConfigMap of a namespace be there and be right. Cheap when it was just done.
    pub async fn ensure(&self, namespace: &str) -> Result<(), PkiError> {
        let now = (self.clock)();
        let (bundle, keys) = (self.succession().bundle(), self.keys());
        let digest = hex::encode(Sha256::digest(format!("{bundle}{}", keys.jwks)));
        let fresh = self
            .published
            .lock()
            .get(namespace)
            .is_some_and(|last| last.digest == digest && now - last.at < REPUBLISH_AFTER);
        if fresh {
            return Ok(());
        }
        self.publish(namespace, &bundle, &keys.jwks).await?;
        let mut published = self.published.lock();
        if published.len() < MAX_NAMESPACES {
            published.insert(namespace.to_owned(), Published { at: now, digest });
        }
        Ok(())
    }

    async fn publish(&self, namespace: &str, bundle: &str, jwks: &str) -> Result<(), PkiError> {
        let name = &self.config.trust_config_map;
        let map = ConfigMap {
            metadata: metadata(name, BTreeMap::new()),
            data: Some([("ca.crt", bundle), ("jwks.json", jwks)].map(|(key, text)| (key.into(), text.into())).into()),
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

    fn succession(&self) -> Arc<Succession> {
        self.succession.lock().clone()
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

    /// A CA is trusted by all before anybody shows what it signed, hence the order. The error is the first; a namespace
    /// that refuses its ConfigMap keeps nobody's certificate from being renewed.
    async fn refresh(&self) -> Result<(), PkiError> {
        let keys = self.refresh_keys().await;
        self.refresh_succession().await?;
        let published = self.publish_everywhere().await;
        let gateways = self.ensure_gateway_certificate().await;
        self.refresh_own_certificate()?;
        keys.and(published).and(gateways)
    }

    async fn refresh_keys(&self) -> Result<(), PkiError> {
        let keys = read_keys(&self.client).await?;
        self.keys.send_if_modified(|current| {
            let changed = current.jwks != keys.jwks;
            *current = Arc::new(keys);
            changed
        });
        Ok(())
    }

    /// Does what is due with the CAs, and takes over what an administrator has changed.
    async fn refresh_succession(&self) -> Result<(), PkiError> {
        let now = (self.clock)();
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.config.namespace);
        let name = &self.config.ca_secret;
        let Some(mut secret) = secrets.get_opt(name).await.map_err(failed("the CA secret"))? else {
            let made = load_or_create(&self.client, &self.config, &self.leadership, now).await?;
            *self.succession.lock() = Arc::new(made);
            return Ok(());
        };
        let mut succession = secret::read(&secret)?;
        if let Some(due) = succession.advance(now)? {
            secret::write(&due, &mut secret);
            // The managed fields are the server's.
            secret.metadata.managed_fields = None;
            self.leadership.check()?;
            // With the version that was read: of two writers one is refused, and reads again.
            secrets.replace(name, &PostParams::default(), &secret).await.map_err(failed("the CA secret"))?;
            tracing::info!(
                secret = name,
                signing_until = %due.signing.validity.ends,
                announced = due.announced.is_some(),
                former_trusted = due.former.is_some(),
                "the CA is in rotation"
            );
            succession = due;
        }
        *self.succession.lock() = Arc::new(succession);
        Ok(())
    }

    /// The error is the first; the other namespaces get theirs nevertheless.
    async fn publish_everywhere(&self) -> Result<(), PkiError> {
        let mut namespaces: BTreeSet<String> = self.published.lock().keys().cloned().collect();
        namespaces.insert(self.config.namespace.clone());
        let mut result = Ok(());
        for namespace in namespaces {
            match self.ensure(&namespace).await {
                // A namespace that is gone needs no trust.
                Err(PkiError::Kube { source, .. }) if is_gone(&source) => {
                    self.published.lock().remove(&namespace);
                }
                outcome => result = result.and(outcome),
            }
        }
        result
    }

    async fn ensure_gateway_certificate(&self) -> Result<(), PkiError> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.config.namespace);
        let name = &self.config.gateway_tls_secret;
        let current = secrets.get_opt(name).await.map_err(failed("the gateway's certificate"))?;
        let (now, signing) = ((self.clock)(), self.succession().signing.clone());
        let issued = current.as_ref().and_then(issued);
        if issued.is_some_and(|issued| issued.is_fresh(&signing.digest(), now)) {
            return Ok(());
        }
        let gateway = &self.config.gateway_service;
        let workers = &self.config.gateway_workers_service;
        let namespace = &self.config.namespace;
        let qualified = [format!("{gateway}.{namespace}.svc"), format!("{workers}.{namespace}.svc")];
        let names = [gateway.as_str(), workers, &qualified[0], &qualified[1]];
        let identity = signing.issue(&names, SERVING_DAYS, now)?;
        let annotations = [
            (ISSUED_ANNOTATION.to_owned(), now.unix_timestamp().to_string()),
            (CA_ANNOTATION.to_owned(), signing.digest()),
        ];
        self.leadership.check()?;
        let secret = tls_secret(name, &identity, annotations.into());
        let parameters = PatchParams::apply(MANAGER).force();
        secrets.patch(name, &parameters, &Patch::Apply(&secret)).await.map_err(failed("the gateway's certificate"))?;
        tracing::info!(secret = name, days = SERVING_DAYS, "issued the gateway's certificate");
        Ok(())
    }

    fn refresh_own_certificate(&self) -> Result<(), PkiError> {
        let (now, succession) = ((self.clock)(), self.succession());
        let ca = succession.signing.digest();
        let mut issued = self.issued.lock();
        if !issued.is_fresh(&ca, now) {
            self.shown.exchange(&operator_identity(&self.config, &succession, now)?)?;
            *issued = Issued { at: now, ca };
            tracing::info!(days = SERVING_DAYS, "renewed the coordinator's certificate");
        }
        Ok(())
    }
}

/// The coordinator's certificate, for its Service's name in and outside of its namespace.
fn operator_identity(config: &Config, succession: &Succession, now: OffsetDateTime) -> Result<Identity, PkiError> {
    let service = &config.coordinator_service;
    let qualified = format!("{service}.{}.svc", config.namespace);
    succession.signing.issue(&[service, &qualified], SERVING_DAYS, now)
}

/// The CA of this installation: read, or made by whoever comes first.
async fn load_or_create(
    client: &Client,
    config: &Config,
    leadership: &Leadership,
    now: OffsetDateTime,
) -> Result<Succession, PkiError> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &config.namespace);
    let name = &config.ca_secret;
    if let Some(secret) = secrets.get_opt(name).await.map_err(failed("the CA secret"))? {
        return secret::read(&secret);
    }
    let made = Succession::begin(now)?;
    leadership.check()?;
    match secrets.create(&PostParams::default(), &tls_secret(name, made.signing.identity(), BTreeMap::new())).await {
        Ok(_) => {
            tracing::info!(secret = name, "made a CA");
            Ok(made)
        }
        Err(kube::Error::Api(status)) if status.code == 409 => {
            secret::read(&secrets.get(name).await.map_err(failed("the CA secret"))?)
        }
        Err(error) => Err(failed("the CA secret")(error)),
    }
}

fn failed(what: &str) -> impl FnOnce(kube::Error) -> PkiError {
    let what = what.to_owned();
    move |source| PkiError::Kube { what, source: Box::new(source) }
}

fn is_gone(error: &kube::Error) -> bool {
    // 403 with this reason: the namespace is being deleted.
    matches!(error, kube::Error::Api(status) if status.code == 404 || status.message.contains("being terminated"))
}

fn issued(secret: &Secret) -> Option<Issued> {
    let annotation = |key: &str| secret.annotations().get(key);
    let seconds = annotation(ISSUED_ANNOTATION)?.parse().ok()?;
    Some(Issued { at: OffsetDateTime::from_unix_timestamp(seconds).ok()?, ca: annotation(CA_ANNOTATION)?.clone() })
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
mod tests;
