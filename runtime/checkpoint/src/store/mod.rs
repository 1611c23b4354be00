//! One API over S3 and local folders.
//!
//! S3 is configured by the pod's environment: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
//! `AWS_ENDPOINT_URL`, `AWS_REGION`. Files of these names in the folder `VICUNA_STORE_CREDENTIALS` (the mounted
//! Secret) come first: a Secret that is corrected reaches a running pod there, and only there. Without a key the pod's
//! own identity counts where a cloud has given it one (`AWS_WEB_IDENTITY_TOKEN_FILE`, `AWS_CONTAINER_CREDENTIALS_*`). The
//! instance's role is asked for only with `VICUNA_STORE_INSTANCE_CREDENTIALS=true`: off the clouds nobody answers at the
//! address where instances ask. Every request has a time limit and a bounded number of retries, so that each call ends
//! within about a minute, whatever the network does.

mod error;
mod transfer;

pub use error::StoreError;
pub use transfer::{Listing, fetch, listing, sizes, upload_dir};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::path::Path as Key;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, ObjectStoreExt, PutMode, PutOptions, RetryConfig};
use std::sync::Arc;
use std::time::Duration;
use url::Url;

/// Objects above this are only streamed ([`fetch`]), never held in memory.
pub const GET_LIMIT_BYTES: u64 = 256 << 20;
/// Objects that one listing returns at most.
pub const LIST_LIMIT: usize = 1 << 20;

/// Objects below one URI.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    base: Key,
    uri: String,
}

/// One object of a listing; `key` is relative to the store's URI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    pub key: String,
    pub bytes: u64,
    pub modified: DateTime<Utc>,
    /// Another one, another content: the store's tag, else the time of its change.
    pub version: String,
}

/// What became of a create-only write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    Created,
    /// An object of that name was there and stays as it was.
    Exists,
}

impl Store {
    /// Opens `s3://bucket/prefix` or `file:///folder`. Nothing is asked of the store yet; see
    /// [`Store::probe`].
    pub fn open(uri: &str) -> Result<Self, StoreError> {
        let bad = |detail: String| StoreError::BadUri { uri: uri.to_owned(), detail };
        let url = Url::parse(uri).map_err(|error| bad(error.to_string()))?;
        let base = Key::from_url_path(url.path()).map_err(|error| bad(error.to_string()))?;
        let inner: Arc<dyn ObjectStore> = match url.scheme() {
            "s3" if !has_credentials(configured) => {
                return Err(StoreError::CredentialsMissing { uri: uri.to_owned() });
            }
            "s3" => Arc::new(open_s3(&url).map_err(|error| bad(error.to_string()))?),
            "file" => Arc::new(object_store::local::LocalFileSystem::new()),
            other => return Err(bad(format!("scheme {other:?} is not supported"))),
        };
        Ok(Self { inner, base, uri: uri.trim_end_matches('/').to_owned() })
    }

    /// A store in this process's memory: for tests of code that takes a store.
    pub fn in_memory() -> Self {
        Self {
            inner: Arc::new(object_store::memory::InMemory::new()),
            base: Key::default(),
            uri: "memory://".to_owned(),
        }
    }

    /// The URI that was opened, without a trailing slash.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The full URI of an object.
    pub fn uri_of(&self, key: &str) -> String {
        if key.is_empty() {
            return self.uri.clone();
        }
        format!("{}/{key}", self.uri)
    }

    /// The same store, `prefix` further down.
    pub fn below(&self, prefix: &str) -> Self {
        Self { inner: self.inner.clone(), base: self.path(prefix), uri: self.uri_of(prefix) }
    }

    /// Fails if the bucket is missing, out of reach, or refuses the credentials.
    pub async fn probe(&self) -> Result<(), StoreError> {
        let mut objects = self.inner.list(Some(&self.base));
        objects.try_next().await.map_err(|e| self.error("", &e))?;
        Ok(())
    }

    pub async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        let result = self.inner.get(&self.path(key)).await;
        let found = result.map_err(|error| self.error(key, &error))?;
        if found.meta.size > GET_LIMIT_BYTES {
            return Err(StoreError::TooLarge { uri: self.uri_of(key), bytes: found.meta.size, limit: GET_LIMIT_BYTES });
        }
        found.bytes().await.map_err(|error| self.error(key, &error))
    }

    /// The first bytes of an object, at most so many.
    pub async fn head(&self, key: &str, bytes: u64) -> Result<Bytes, StoreError> {
        let path = self.path(key);
        let size = self.inner.head(&path).await.map_err(|error| self.error(key, &error))?.size;
        self.inner.get_range(&path, 0..size.min(bytes)).await.map_err(|error| self.error(key, &error))
    }

    /// Writes or replaces an object.
    pub async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        let written = self.inner.put(&self.path(key), bytes.into()).await;
        written.map(drop).map_err(|error| self.error(key, &error))
    }

    /// Writes an object unless one of that name is there; atomic.
    pub async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<Put, StoreError> {
        let options = PutOptions::from(PutMode::Create);
        let path = self.path(key);
        match self.inner.put_opts(&path, bytes.into(), options).await {
            Ok(_) => Ok(Put::Created),
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                Ok(Put::Exists)
            }
            Err(error) => Err(self.error(key, &error)),
        }
    }

    /// Every object below `prefix` (a folder, without trailing slash; "" for all), by key.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Object>, StoreError> {
        let path = self.path(prefix);
        let mut stream = self.inner.list(Some(&path));
        let mut objects = Vec::new();
        while let Some(meta) = stream.try_next().await.map_err(|e| self.error(prefix, &e))? {
            if objects.len() == LIST_LIMIT {
                return Err(StoreError::Other {
                    uri: self.uri_of(prefix),
                    detail: format!("more than {LIST_LIMIT} objects: use a prefix of its own"),
                });
            }
            objects.extend(self.object(meta));
        }
        objects.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(objects)
    }

    /// Size and time of an object, `None` if there is none.
    pub async fn stat(&self, key: &str) -> Result<Option<Object>, StoreError> {
        match self.inner.head(&self.path(key)).await {
            Ok(meta) => Ok(self.object(meta)),
            Err(error) => match self.error(key, &error) {
                StoreError::NotFound { .. } => Ok(None),
                other => Err(other),
            },
        }
    }

    pub async fn exists(&self, key: &str) -> Result<bool, StoreError> {
        Ok(self.stat(key).await?.is_some())
    }

    /// Deletes an object; it is no error if there is none.
    pub async fn delete(&self, key: &str) -> Result<(), StoreError> {
        match self.inner.delete(&self.path(key)).await {
            Ok(()) => Ok(()),
            Err(error) => match self.error(key, &error) {
                StoreError::NotFound { .. } => Ok(()),
                other => Err(other),
            },
        }
    }

    fn path(&self, key: &str) -> Key {
        let parts = key.split('/').filter(|part| !part.is_empty());
        parts.fold(self.base.clone(), |path, part| path.join(part))
    }

    fn object(&self, meta: object_store::ObjectMeta) -> Option<Object> {
        let key: Vec<String> = meta.location.prefix_match(&self.base)?.map(|part| part.as_ref().to_owned()).collect();
        let version = meta.e_tag.unwrap_or_else(|| meta.last_modified.to_rfc3339());
        Some(Object { key: key.join("/"), bytes: meta.size, modified: meta.last_modified, version })
    }

    fn error(&self, key: &str, error: &object_store::Error) -> StoreError {
        StoreError::classify(&self.uri_of(key), error)
    }
}

fn open_s3(url: &Url) -> object_store::Result<object_store::aws::AmazonS3> {
    let mut builder = AmazonS3Builder::from_env();
    for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION"] {
        if let Some(value) = mounted(name) {
            builder = builder.with_config(name.to_lowercase().parse::<AmazonS3ConfigKey>()?, value);
        }
    }
    let endpoint = configured("AWS_ENDPOINT_URL").unwrap_or_default();
    builder = builder
        .with_bucket_name(url.host_str().unwrap_or_default())
        .with_virtual_hosted_style_request(false)
        // Everything large is verified by its BLAKE3 when it is read: a second digest of each block at both ends would
        // only cost time, of which an upload before a reclaim has none.
        .with_unsigned_payload(true)
        .with_retry(retries())
        .with_client_options(
            ClientOptions::new()
                .with_allow_http(endpoint.starts_with("http://"))
                .with_connect_timeout(Duration::from_secs(5))
                .with_timeout(Duration::from_secs(30)),
        );
    if !endpoint.is_empty() {
        builder = builder.with_endpoint(endpoint);
    }
    builder.build()
}

/// Whether requests can be signed, or need not be.
fn has_credentials(value: impl Fn(&str) -> Option<String>) -> bool {
    let is_set = |name: &str| value(name).is_some_and(|value| !value.is_empty());
    let is_true = |name: &str| value(name).is_some_and(|value| value == "true");
    let key = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"].into_iter().all(is_set);
    let identity =
        ["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"];
    key || identity.into_iter().any(is_set)
        || ["VICUNA_STORE_INSTANCE_CREDENTIALS", "AWS_SKIP_SIGNATURE"].into_iter().any(is_true)
}

/// A value of the mounted Secret, else of the environment.
fn configured(name: &str) -> Option<String> {
    mounted(name).or_else(|| std::env::var(name).ok())
}

/// A value of the mounted Secret, as it is now.
fn mounted(name: &str) -> Option<String> {
    let folder = std::env::var_os("VICUNA_STORE_CREDENTIALS")?;
    let value = std::fs::read_to_string(std::path::Path::new(&folder).join(name)).ok()?;
    Some(value.trim().to_owned())
}

fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(3),
            base: 2.,
        },
        max_retries: 5,
        retry_timeout: Duration::from_secs(30),
    }
}

#[cfg(test)]
mod tests;
