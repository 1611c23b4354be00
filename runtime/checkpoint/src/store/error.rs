//! What can go wrong with a store, in the words of someone who can repair it.

use std::error::Error;
use std::io;
use std::path::PathBuf;

/// Each message says what was wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{uri} does not exist: check the path")]
    NotFound { uri: String },
    #[error("the bucket of {uri} does not exist: create it, or correct the URI")]
    BucketMissing { uri: String },
    #[error(
        "the store refused the credentials for {uri} ({detail}): check the credentials Secret and the bucket's policy"
    )]
    CredentialsRefused { uri: String, detail: String },
    #[error(
        "there are no credentials for {uri}: put AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY into the Secret that the spec's credentials name; on a cloud whose instances have a role, put VICUNA_STORE_INSTANCE_CREDENTIALS=true there instead"
    )]
    CredentialsMissing { uri: String },
    #[error("the store of {uri} cannot be reached ({detail}): check AWS_ENDPOINT_URL and the network")]
    Unreachable { uri: String, detail: String },
    #[error(
        "the store of {uri} is full ({detail}): delete what is not needed there, raise the bucket's quota or enlarge the volume, or keep fewer checkpoints (checkpoint.keep)"
    )]
    StoreFull { uri: String, detail: String },
    #[error("{uri} is not a URI that can be opened ({detail}): use s3://bucket/path or file:///path")]
    BadUri { uri: String, detail: String },
    #[error("{uri} has {bytes} bytes, more than the {limit} that are read at once: fetch it to disk")]
    TooLarge { uri: String, bytes: u64, limit: u64 },
    #[error("{path}: {source}; check free space and permissions of the folder")]
    Disk { path: PathBuf, source: io::Error },
    #[error("the store failed on {uri}: {detail}")]
    Other { uri: String, detail: String },
}

impl StoreError {
    /// Whether waiting may help without anyone's action on the URI itself.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Other { .. })
    }

    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    pub(crate) fn disk(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Disk { path: path.into(), source }
    }

    /// Sorts an error of the store's client by status and by S3's error codes, which only the
    /// text of the answer carries.
    pub(super) fn classify(uri: &str, error: &object_store::Error) -> Self {
        use object_store::Error as E;
        let uri = uri.to_owned();
        let text = chain(error);
        let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
        let detail = short(&text);
        if says(&["NoSuchBucket"]) {
            return Self::BucketMissing { uri };
        }
        // Before refusals: a quota that is used up is told with status 403 too.
        if is_full(&text) || has_no_space(error) {
            return Self::StoreFull { uri, detail };
        }
        if says(REFUSALS) || matches!(error, E::PermissionDenied { .. } | E::Unauthenticated { .. }) {
            return Self::CredentialsRefused { uri, detail };
        }
        match error {
            E::NotFound { .. } => Self::NotFound { uri },
            _ if says(UNREACHABLE) => Self::Unreachable { uri, detail },
            _ => Self::Other { uri, detail },
        }
    }
}

/// Codes of S3's kind for a bucket or a server without room: AWS and Ceph, MinIO, SeaweedFS.
const FULL: &[&str] = &[
    "QuotaExceeded",
    "XMinioStorageFull",
    "XMinioAdminBucketQuotaExceeded",
    "XMinioStorageQuotaExceeded",
    "InsufficientStorage",
    "InsufficientCapacity",
    "StorageFull",
];

/// By the answer's code, or by its status where it has none. The code alone counts: an object's key may hold such a word.
fn is_full(text: &str) -> bool {
    element(text, "Code").is_some_and(|code| FULL.contains(&code)) || text.contains("507 Insufficient Storage")
}

/// A disk or its quota is used up (`ENOSPC`, `EDQUOT`).
fn has_no_space(error: &object_store::Error) -> bool {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
        if matches!(kind, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)) {
            return true;
        }
        cause = error.source();
    }
    false
}

const REFUSALS: &[&str] = &[
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "AccessDenied",
    "ExpiredToken",
    "401 Unauthorized",
    "403 Forbidden",
];

const UNREACHABLE: &[&str] = &[
    "error sending request",
    "Connection refused",
    "dns error",
    "timed out",
    "connect error",
    "connection closed",
    "500 Internal Server Error",
    "502 Bad Gateway",
    "503 Service Unavailable",
    "504 Gateway Timeout",
];

fn chain(error: &object_store::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// S3's own code and sentence where the text carries an answer in XML, else its first 300 characters on one line:
/// answers of stores may be whole pages.
fn short(text: &str) -> String {
    if let Some(code) = element(text, "Code") {
        return format!("{code}: {}", element(text, "Message").unwrap_or("no message")).chars().take(300).collect();
    }
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(300).collect()
}

fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    rest.split_once(&format!("</{name}>")).map(|(inside, _)| inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_in_xml_becomes_its_code_and_sentence() {
        let text =
            "403 Forbidden: <?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>No.</Message></Error>";
        assert_eq!(short(text), "AccessDenied: No.");
        assert_eq!(short("no\n xml"), "no xml");
    }

    #[test]
    fn a_disk_without_space_and_one_whose_quota_is_used_up_are_full_stores() {
        let [no_space, quota, forbidden] = [28, 122, 13];
        let written = |number: i32| {
            let disk = io::Error::from_raw_os_error(number);
            let inner = object_store::Error::Generic { store: "LocalFileSystem", source: Box::new(disk) };
            let outer = object_store::Error::Generic { store: "LocalFileSystem", source: Box::new(inner) };
            StoreError::classify("file:///run/blocks/b", &outer)
        };
        for number in [no_space, quota] {
            let error = written(number);
            assert!(matches!(error, StoreError::StoreFull { .. }), "{error}");
            let told = error.to_string();
            assert!(told.contains("file:///run/blocks/b") && told.contains("volume"), "{told}");
        }
        assert!(!matches!(written(forbidden), StoreError::StoreFull { .. }));
    }
}
