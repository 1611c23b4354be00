//! A pair, sealed so that its client can carry it and cannot read it.
//!
//! The key comes from the private key that all replicas of the gateway are given (their certificate's), so that
//! a ticket of one is good at another. When that is renewed, pairs that are open are over.

use super::Battle;
use aws_lc_rs::aead::{AES_256_GCM_SIV, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};
use std::path::PathBuf;

/// Keeps this use of the key apart from any other.
const PURPOSE: &[u8] = b"vicuna-gateway arena ticket 1";

#[derive(Debug)]
pub struct Seal {
    /// Read at each use: pairs are rare, and the replicas see a renewed key at the same time.
    key_file: PathBuf,
}

impl Seal {
    pub fn new(key_file: impl Into<PathBuf>) -> Self {
        Self { key_file: key_file.into() }
    }

    fn key(&self) -> Option<RandomizedNonceKey> {
        let secret = std::fs::read(&self.key_file).ok()?;
        let key = Sha256::new().chain_update(PURPOSE).chain_update(&secret).finalize();
        RandomizedNonceKey::new(&AES_256_GCM_SIV, &key).ok()
    }

    /// None where the key cannot be read.
    pub fn seal(&self, battle: &Battle) -> Option<String> {
        let mut text = serde_json::to_vec(battle).ok()?;
        let nonce = self.key()?.seal_in_place_append_tag(Aad::empty(), &mut text).ok()?;
        text.extend_from_slice(nonce.as_ref());
        Some(URL_SAFE_NO_PAD.encode(text))
    }

    /// None for what was not sealed with this key.
    pub fn open(&self, ticket: &str) -> Option<Battle> {
        let mut bytes = URL_SAFE_NO_PAD.decode(ticket).ok()?;
        let nonce = bytes.split_off(bytes.len().checked_sub(NONCE_LEN)?);
        let nonce = Nonce::try_assume_unique_for_key(&nonce).ok()?;
        let text = self.key()?.open_in_place(nonce, Aad::empty(), &mut bytes).ok()?;
        serde_json::from_slice(text).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_replicas_can_read_a_ticket() {
        let folder = tempfile::tempdir().unwrap();
        let seal = |name: &str, key: &str| {
            std::fs::write(folder.path().join(name), key).unwrap();
            Seal::new(folder.path().join(name))
        };
        let (one, replica, other) = (seal("1", "key"), seal("2", "key"), seal("3", "another key"));
        let models = ["team/secret-a".to_owned(), "team/secret-b".to_owned()];
        let battle = Battle::draw(&models, "team", 7).unwrap();
        let ticket = one.seal(&battle).unwrap();
        let inside = URL_SAFE_NO_PAD.decode(&ticket).unwrap();
        assert!(!inside.windows(6).any(|window| window == b"secret"), "it is not readable");
        assert_eq!(replica.open(&ticket), Some(battle.clone()));
        assert_eq!(other.open(&ticket), None);
        assert_ne!(one.seal(&battle).unwrap(), ticket, "two tickets of one pair do not look alike");
        for broken in ["", "x", "AAAA", &ticket[1..], &ticket[..ticket.len() - 4]] {
            assert_eq!(one.open(broken), None, "{broken}");
        }
    }
}
