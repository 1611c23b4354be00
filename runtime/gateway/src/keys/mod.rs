//! API keys: who may ask for which models, how much, and how urgently.
//!
//! They come in a mounted Secret, which holds only their digests, and are read again when it changes.
//! A key itself is never kept, logged or compared: its digest is looked up, so that the time which a
//! refusal takes says nothing about the keys that there are. Quotas hold at each gateway for itself: a client
//! with one connection is with one gateway, and would have a part of its quota only if it were divided among them.

pub mod quota;

use crate::api::error::ApiError;
use crate::serve::watched::{Unreadable, Watched};
use parking_lot::{Mutex, RwLock};
use quota::{Left, Quota};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Keys in one file, at most.
const MAX_KEYS: usize = 100_000;

type Hash = [u8; 32];

#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    #[error("the keys are not as they should be: {0}")]
    Malformed(#[from] serde_json::Error),
    #[error("key {name:?}: {what}")]
    Unsound { name: String, what: &'static str },
    #[error("there are more than {MAX_KEYS} keys")]
    TooMany,
}

/// The file: `{"keys": [{"name": "team-a", "sha256": "…", "models": ["team-a/*"]}]}`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    keys: Vec<Entry>,
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Entry {
    /// What requests are fair between, and whose a stream is that a client comes back for.
    name: String,
    /// Of the key, in hexadecimal: `printf %s "$KEY" | sha256sum`.
    sha256: String,
    /// Names, or beginnings that end in `*`.
    #[serde(default = "all_models")]
    models: Vec<String>,
    requests_per_minute: Option<u32>,
    /// Prompt and completion together.
    tokens_per_minute: Option<u32>,
    /// Higher goes first where requests wait.
    #[serde(default)]
    priority: i32,
}

fn all_models() -> Vec<String> {
    vec!["*".to_owned()]
}

/// One key's rights.
#[derive(Debug)]
pub struct Key {
    entry: Entry,
    requests: Quota,
    tokens: Quota,
}

impl Key {
    fn new(entry: Entry) -> Self {
        let now = Instant::now();
        let requests = Quota::new(entry.requests_per_minute, now);
        let tokens = Quota::new(entry.tokens_per_minute, now);
        Self { entry, requests, tokens }
    }

    pub fn name(&self) -> &str {
        &self.entry.name
    }

    pub fn priority(&self) -> i32 {
        self.entry.priority
    }

    pub fn may_use(&self, model: &str) -> bool {
        self.entry.models.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(beginning) => model.starts_with(beginning),
            None => pattern == model,
        })
    }

    /// Takes one request from the quotas and sets tokens aside for it, as many as it may use; they are charged when they
    /// are known.
    fn admit(self: &Arc<Self>, tokens: u32) -> Result<Reserved, ApiError> {
        let now = Instant::now();
        let over_requests = |wait| ApiError::over_quota("requests", self.entry.requests_per_minute, wait);
        let over_tokens = |wait| ApiError::over_quota("tokens", self.entry.tokens_per_minute, wait);
        let tokens = self.tokens.reserve(tokens, now).map_err(over_tokens)?;
        let reserved = Reserved(Some((self.clone(), tokens)));
        self.requests.take(now).map_err(over_requests)?;
        Ok(reserved)
    }
}

/// Tokens that are set aside for a request, given back when this is dropped: by then it is charged for what it used.
#[derive(Debug, Default)]
#[must_use]
pub struct Reserved(Option<(Arc<Key>, u32)>);

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Some((key, tokens)) = self.0.take() {
            key.tokens.give_back(tokens, Instant::now());
        }
    }
}

/// Who sent a request.
#[derive(Clone, Debug, Default)]
pub struct Client(Option<Arc<Key>>);

impl Client {
    /// Empty where no keys are asked for.
    pub fn name(&self) -> &str {
        self.0.as_ref().map_or("", |key| key.name())
    }

    pub fn priority(&self) -> i32 {
        self.0.as_ref().map_or(0, |key| key.priority())
    }

    pub fn may_use(&self, model: &str) -> bool {
        self.0.as_ref().is_none_or(|key| key.may_use(model))
    }

    /// Takes one request, which may use so many tokens, from the key's quotas.
    pub fn admit(&self, tokens: u32) -> Result<Reserved, ApiError> {
        self.0.as_ref().map_or_else(|| Ok(Reserved::default()), |key| key.admit(tokens))
    }

    /// How the key's quotas of requests and of tokens stand.
    pub fn left(&self) -> [(&'static str, Option<Left>); 2] {
        let now = Instant::now();
        let of = |quota: fn(&Key) -> &Quota| self.0.as_ref().and_then(|key| quota(key).left(now));
        [("requests", of(|key| &key.requests)), ("tokens", of(|key| &key.tokens))]
    }

    /// Takes what a request has used from the key's tokens.
    pub fn charge(&self, tokens: u32) {
        if let Some(key) = &self.0 {
            key.tokens.charge(tokens, Instant::now());
        }
    }
}

/// The keys that there are; without a file, everybody may do everything.
pub struct Keys {
    file: Option<Mutex<Watched>>,
    known: RwLock<HashMap<Hash, Arc<Key>>>,
}

impl Keys {
    pub fn load(path: Option<&Path>) -> Result<Arc<Self>, KeysError> {
        let file = path.map(|path| Mutex::new(Watched::new(&[path])));
        let keys = Self { file, known: RwLock::default() };
        keys.reload()?;
        Ok(Arc::new(keys))
    }

    /// Who presents `authorization`, a header's value.
    pub fn client(&self, authorization: Option<&str>) -> Result<Client, ApiError> {
        if self.file.is_none() {
            return Ok(Client::default());
        }
        let key = authorization.and_then(|value| value.split_once(' '));
        let key = key.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let (_, key) = key.ok_or_else(ApiError::no_key)?;
        let hash: Hash = Sha256::digest(key.trim().as_bytes()).into();
        let known = self.known.read().get(&hash).cloned();
        Ok(Client(Some(known.ok_or_else(ApiError::unknown_key)?)))
    }

    /// Looks at the file every `interval`. What cannot be used is not: the last good keys stay.
    pub async fn watch(self: Arc<Self>, interval: Duration) {
        let mut ticks = tokio::time::interval(interval);
        loop {
            ticks.tick().await;
            match self.reload() {
                Ok(Some(keys)) => tracing::info!(keys, "the API keys have been read"),
                Ok(None) => {}
                Err(error) => tracing::error!(%error, "the new API keys are not used; the old ones stay"),
            }
        }
    }

    fn reload(&self) -> Result<Option<usize>, KeysError> {
        let Some(file) = &self.file else {
            return Ok(None);
        };
        let Some(contents) = file.lock().changed()? else {
            return Ok(None);
        };
        let entries = entries(contents.first().map_or(&[][..], Vec::as_slice))?;
        let mut known = self.known.write();
        let mut next = HashMap::with_capacity(entries.len());
        for (hash, entry) in entries {
            // One that has not changed keeps what it has used.
            let same = known.get(&hash).filter(|key| key.entry == entry).cloned();
            next.insert(hash, same.unwrap_or_else(|| Arc::new(Key::new(entry))));
        }
        *known = next;
        Ok(Some(known.len()))
    }
}

fn entries(text: &[u8]) -> Result<HashMap<Hash, Entry>, KeysError> {
    let document: Document = serde_json::from_slice(text)?;
    if document.keys.len() > MAX_KEYS {
        return Err(KeysError::TooMany);
    }
    let mut names = HashSet::new();
    let mut entries = HashMap::new();
    for entry in document.keys {
        let unsound = |what| KeysError::Unsound { name: entry.name.clone(), what };
        if entry.name.is_empty() || entry.name.len() > 63 || !names.insert(entry.name.clone()) {
            return Err(unsound("its name must be of 1 to 63 letters and given once"));
        }
        let hash = hash(&entry.sha256).ok_or_else(|| unsound("sha256 must be 64 hexadecimal digits"))?;
        if entries.contains_key(&hash) {
            return Err(unsound("its sha256 is another key's, too"));
        }
        entries.insert(hash, entry);
    }
    Ok(entries)
}

fn hash(hexadecimal: &str) -> Option<Hash> {
    hex::decode(hexadecimal).ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn entry(name: &str, key: &str) -> Value {
        json!({ "name": name, "sha256": hex::encode(Sha256::digest(key)), "models": ["a/*", "b/one"] })
    }

    fn keys(entries: &[Value]) -> (tempfile::TempDir, Result<Arc<Keys>, KeysError>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.json");
        std::fs::write(&path, json!({ "keys": entries }).to_string()).unwrap();
        let keys = Keys::load(Some(&path));
        (folder, keys)
    }

    #[test]
    fn a_key_opens_its_models_and_no_others() {
        let (_folder, keys) = keys(&[entry("one", "sk-1"), entry("two", "sk-2")]);
        let keys = keys.unwrap();
        let client = keys.client(Some("Bearer sk-2")).unwrap();
        assert_eq!(client.name(), "two");
        assert!(client.may_use("a/x") && client.may_use("b/one"));
        assert!(!client.may_use("b/two") && !client.may_use("a"));
        for refused in [None, Some("Bearer"), Some("Basic sk-1"), Some("Bearer sk-3"), Some("Bearer ")] {
            assert_eq!(keys.client(refused).unwrap_err().status, 401, "{refused:?}");
        }
    }

    #[test]
    fn a_withdrawn_key_is_refused_and_an_unchanged_one_keeps_its_count() {
        let mut limited = entry("one", "sk-1");
        limited["requestsPerMinute"] = json!(1);
        let (folder, keys) = keys(&[limited.clone(), entry("two", "sk-2")]);
        let keys = keys.unwrap();
        keys.client(Some("Bearer sk-1")).unwrap().admit(0).map(drop).unwrap();
        let path = folder.path().join("keys.json");
        std::fs::write(&path, json!({ "keys": [limited] }).to_string()).unwrap();
        assert_eq!(keys.reload().unwrap(), Some(1));
        assert!(keys.client(Some("Bearer sk-2")).is_err());
        let error = keys.client(Some("bearer sk-1")).unwrap().admit(0).unwrap_err();
        assert_eq!(error.status, 429);
        assert!(error.retry_after.unwrap() <= 60);
        std::fs::write(&path, "{").unwrap();
        assert!(keys.reload().is_err());
        assert!(keys.client(Some("Bearer sk-1")).is_ok(), "the last good keys stay");
    }

    #[test]
    fn unsound_keys_are_named() {
        let twice = [entry("one", "sk-1"), entry("one", "sk-2")];
        let same = [entry("one", "sk-1"), entry("two", "sk-1")];
        let not_a_digest = [json!({ "name": "one", "sha256": "sk-1" })];
        for unsound in [&twice[..], &same, &not_a_digest] {
            let (_folder, keys) = keys(unsound);
            assert!(matches!(keys.err().unwrap(), KeysError::Unsound { .. }));
        }
    }

    #[test]
    fn without_a_file_everybody_may_ask() {
        let keys = Keys::load(None).unwrap();
        let client = keys.client(None).unwrap();
        assert!(client.may_use("any/model") && client.admit(0).is_ok());
    }
}
