//! The CAs as the Secret holds them: `tls.crt` and `tls.key` sign, `next.crt` and `next.key` will, `former.crt` did.

use super::PkiError;
use super::authority::{Authority, Identity};
use super::rotation::{Announced, Former, Succession};
use crate::config::MANAGER;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;
use kube::api::ObjectMeta;
use std::collections::BTreeMap;
use time::OffsetDateTime;

const ANNOUNCED_AT: &str = "vicuna.dev/next-announced-at";
const REPLACED_AT: &str = "vicuna.dev/former-replaced-at";

/// Reads the CAs. The times are Unix seconds in annotations.
pub fn read(secret: &Secret) -> Result<Succession, PkiError> {
    let malformed = || PkiError::MalformedCa(secret.name_any());
    let text = |key: &str| {
        let bytes = secret.data.as_ref()?.get(key)?;
        String::from_utf8(bytes.0.clone()).ok()
    };
    let authority = |certificate: &str, key: &str| {
        let identity =
            Identity { certificate: text(certificate).ok_or_else(malformed)?, key: text(key).ok_or_else(malformed)? };
        Authority::of(identity)
    };
    let time = |annotation: &str| {
        let seconds = secret.annotations().get(annotation).and_then(|text| text.parse().ok());
        seconds.and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok()).ok_or_else(malformed)
    };
    let signing = authority("tls.crt", "tls.key")?;
    let announced = match text("next.crt") {
        Some(_) => Some(Announced { authority: authority("next.crt", "next.key")?, at: time(ANNOUNCED_AT)? }),
        None => None,
    };
    let former = match text("former.crt") {
        Some(certificate) => Some(Former { certificate, replaced_at: time(REPLACED_AT)? }),
        None => None,
    };
    Ok(Succession { signing, announced, former })
}

/// Writes the CAs into `secret`, which keeps its name and version, so that only one of two writers succeeds.
pub fn write(succession: &Succession, secret: &mut Secret) {
    let Succession { signing, announced, former } = succession;
    let mut data = pair("tls", signing.identity());
    let annotations = secret.annotations_mut();
    annotations.remove(ANNOUNCED_AT);
    annotations.remove(REPLACED_AT);
    if let Some(Announced { authority, at }) = announced {
        data.extend(pair("next", authority.identity()));
        annotations.insert(ANNOUNCED_AT.to_owned(), at.unix_timestamp().to_string());
    }
    if let Some(Former { certificate, replaced_at }) = former {
        data.insert("former.crt".to_owned(), bytes(certificate));
        annotations.insert(REPLACED_AT.to_owned(), replaced_at.unix_timestamp().to_string());
    }
    secret.data = Some(data);
}

/// A new Secret of type TLS, ours.
pub fn tls_secret(name: &str, identity: &Identity, annotations: BTreeMap<String, String>) -> Secret {
    Secret {
        metadata: metadata(name, annotations),
        type_: Some("kubernetes.io/tls".to_owned()),
        data: Some(pair("tls", identity)),
        ..Secret::default()
    }
}

pub fn metadata(name: &str, annotations: BTreeMap<String, String>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        labels: Some([("app.kubernetes.io/managed-by".to_owned(), MANAGER.to_owned())].into()),
        annotations: (!annotations.is_empty()).then_some(annotations),
        ..ObjectMeta::default()
    }
}

fn pair(name: &str, identity: &Identity) -> BTreeMap<String, ByteString> {
    let Identity { certificate, key } = identity;
    [(format!("{name}.crt"), bytes(certificate)), (format!("{name}.key"), bytes(key))].into()
}

fn bytes(text: &str) -> ByteString {
    ByteString(text.as_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::super::authority::CA_DAYS;
    use super::super::rotation::SPREAD;
    use super::super::testing::date;
    use super::*;
    use time::Duration;

    fn stored(succession: &Succession) -> Secret {
        let mut secret = tls_secret("vicuna-ca", succession.signing.identity(), BTreeMap::new());
        write(succession, &mut secret);
        secret
    }

    #[test]
    fn a_succession_survives_its_secret_at_every_stage() {
        let start = date(2026, 1, 1);
        let begun = Succession::begin(start).unwrap();
        let late = start + Duration::days(CA_DAYS * 95 / 100);
        let announced = begun.advance(late).unwrap().unwrap();
        let replaced = announced.advance(late + SPREAD).unwrap().unwrap();
        for stage in [begun, announced, replaced] {
            let read = read(&stored(&stage)).unwrap();
            assert_eq!(read.bundle(), stage.bundle());
            assert_eq!(read.announced.map(|it| it.at), stage.announced.map(|it| it.at));
            assert_eq!(read.former.map(|it| it.replaced_at), stage.former.map(|it| it.replaced_at));
            assert!(read.signing.issue(&["a"], 1, late).is_ok());
        }
    }

    #[test]
    fn what_is_not_needed_any_more_leaves_the_secret() {
        let start = date(2026, 1, 1);
        let begun = Succession::begin(start).unwrap();
        let announced = begun.advance(start + Duration::days(CA_DAYS * 95 / 100)).unwrap().unwrap();
        let mut secret = stored(&announced);
        write(&begun, &mut secret);
        assert_eq!(secret.data.as_ref().unwrap().len(), 2);
        assert!(secret.annotations().is_empty());
    }

    #[test]
    fn a_secret_that_lacks_something_is_refused_by_name() {
        let begun = Succession::begin(date(2026, 1, 1)).unwrap();
        let mut secret = stored(&begun);
        secret.data.as_mut().unwrap().remove("tls.key");
        let error = read(&secret).err().unwrap();
        assert!(error.to_string().contains("vicuna-ca"), "{error}");
    }
}
