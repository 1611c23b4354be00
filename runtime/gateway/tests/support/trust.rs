//! Certificates, keys and tokens as the operator would publish them.

#![allow(dead_code, clippy::unwrap_used, reason = "tests and benches stop where what they rely on is not there")]

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use std::time::{SystemTime, UNIX_EPOCH};
use tempfile::TempDir;
use vicuna_protocol::auth::TokenFile;

/// Certificates, keys and token files in one folder.
pub struct Trust {
    folder: TempDir,
    key: KeyPair,
    key_id: String,
}

impl Trust {
    pub fn new() -> Self {
        let trust = Self::signing();
        trust.renew();
        trust
    }

    /// One whose certificates are the same, and who signs tokens with a key of its own.
    pub fn with_own_key(&self) -> Self {
        let trust = Self::signing();
        for file in ["ca.crt", "tls.crt", "tls.key"] {
            std::fs::copy(self.path(file), trust.path(file)).unwrap();
        }
        trust
    }

    fn signing() -> Self {
        let (folder, key) = (tempfile::tempdir().unwrap(), KeyPair::generate().unwrap());
        let key_id = hex(&key.public_key_raw()[1..9]);
        let trust = Self { folder, key, key_id };
        trust.accept(&[&trust]);
        trust
    }

    /// Publishes the keys of those whose tokens are good here.
    pub fn accept(&self, signers: &[&Self]) {
        let keys: Vec<_> = signers.iter().map(|signer| jwk(&signer.key, &signer.key_id)).collect();
        std::fs::write(self.path("jwks.json"), json!({ "keys": keys }).to_string()).unwrap();
    }

    /// A new CA, and a certificate of it.
    pub fn renew(&self) {
        let write = |name: &str, text: &str| std::fs::write(self.path(name), text).unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_key = KeyPair::generate().unwrap();
        write("ca.crt", &params.self_signed(&ca_key).unwrap().pem());
        let names = ["vicuna-gateway".to_owned(), "vicuna-operator".to_owned()];
        let tls_key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(names).unwrap();
        let certificate = certificate.signed_by(&tls_key, &Issuer::new(params, ca_key)).unwrap();
        write("tls.crt", &certificate.pem());
        write("tls.key", &tls_key.serialize_pem());
    }

    pub fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    /// A file with a token of a pod.
    pub fn token(&self, audience: &str, namespace: &str, pod: &str) -> TokenFile {
        self.signed(audience, namespace, Some(pod), 3600)
    }

    /// A file with a token of no pod, as an administrator makes for a worker outside.
    pub fn external_token(&self, namespace: &str) -> TokenFile {
        self.signed("vicuna-gateway", namespace, None, 3600)
    }

    /// One that ran out so long ago.
    pub fn expired_token(&self, namespace: &str, seconds: i64) -> TokenFile {
        self.signed("vicuna-gateway", namespace, None, -seconds)
    }

    fn signed(&self, audience: &str, namespace: &str, pod: Option<&str>, seconds: i64) -> TokenFile {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
        let claims = json!({
            "aud": [audience], "exp": now + seconds, "iat": now, "iss": "test",
            "kubernetes.io": {
                "namespace": namespace, "serviceaccount": { "name": "default", "uid": "s" },
                "pod": pod.map(|pod| json!({ "name": pod, "uid": pod })),
            },
        });
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(self.key_id.clone());
        let key = EncodingKey::from_ec_pem(self.key.serialize_pem().as_bytes()).unwrap();
        let path = self.path(&format!("{audience}.{namespace}.{}.token", pod.unwrap_or("external")));
        std::fs::write(&path, jsonwebtoken::encode(&header, &claims, &key).unwrap()).unwrap();
        TokenFile::new(path)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn jwk(key: &KeyPair, id: &str) -> Value {
    let point = key.public_key_raw();
    let coordinate = |range: std::ops::Range<usize>| URL_SAFE_NO_PAD.encode(&point[range]);
    json!({
        "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": id,
        "x": coordinate(1..33), "y": coordinate(33..65),
    })
}
