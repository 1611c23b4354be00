//! Both sides prove that they hold the generation's key, and derive a key per direction.
//!
//! ```text
//! dialler  → magic 4 │ generation u64 │ from u32 │ to u32 │ nonce 32
//! acceptor → nonce 32 │ proof 32
//! dialler  → proof 32
//! ```
//!
//! Proofs are keyed BLAKE3 over a role and everything said so far: nothing can be reflected or
//! replayed.

use super::frame::{FrameKey, same};
use std::io::{self, Read, Write};

const MAGIC: [u8; 4] = *b"VCN1";
const HELLO_BYTES: usize = 4 + 8 + 4 + 4 + 32;

/// Who wants to talk to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Introduction {
    pub generation: u64,
    pub from: u32,
    pub to: u32,
}

#[derive(Debug)]
pub(super) struct Keys {
    pub send: FrameKey,
    pub receive: FrameKey,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it does not hold the generation's key")]
    WrongKey,
    #[error("it does not speak our protocol")]
    Magic,
}

struct Transcript<'a> {
    key: &'a [u8; 32],
    hello: [u8; HELLO_BYTES],
    answer: [u8; 32],
}

impl Transcript<'_> {
    fn derive(&self, role: &[u8]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(self.key);
        hasher.update(&(role.len() as u64).to_le_bytes()).update(role);
        hasher.update(&self.hello).update(&self.answer);
        *hasher.finalize().as_bytes()
    }

    fn direction(&self, role: &[u8]) -> FrameKey {
        FrameKey::new(self.derive(role))
    }
}

pub(super) fn dial(
    stream: &mut (impl Read + Write),
    key: &[u8; 32],
    who: Introduction,
) -> Result<Keys, HandshakeError> {
    let hello = hello(who, rand::random());
    stream.write_all(&hello)?;
    let mut answer = [0; 32];
    stream.read_exact(&mut answer)?;
    let transcript = Transcript { key, hello, answer };
    let mut proof = [0; 32];
    stream.read_exact(&mut proof)?;
    if !same(&proof, &transcript.derive(b"acceptor")) {
        return Err(HandshakeError::WrongKey);
    }
    stream.write_all(&transcript.derive(b"dialler"))?;
    Ok(Keys {
        send: transcript.direction(b"dialler to acceptor"),
        receive: transcript.direction(b"acceptor to dialler"),
    })
}

/// Reads what the dialler says, asks `key_for` for the key, and answers.
pub(super) fn accept(
    stream: &mut (impl Read + Write),
    key_for: impl FnOnce(Introduction) -> Option<[u8; 32]>,
) -> Result<(Introduction, Keys), HandshakeError> {
    let mut hello = [0; HELLO_BYTES];
    stream.read_exact(&mut hello)?;
    let who = parse(&hello).ok_or(HandshakeError::Magic)?;
    let key = key_for(who).ok_or(HandshakeError::WrongKey)?;
    let transcript = Transcript { key: &key, hello, answer: rand::random() };
    stream.write_all(&transcript.answer)?;
    stream.write_all(&transcript.derive(b"acceptor"))?;
    let mut proof = [0; 32];
    stream.read_exact(&mut proof)?;
    if !same(&proof, &transcript.derive(b"dialler")) {
        return Err(HandshakeError::WrongKey);
    }
    let keys = Keys {
        send: transcript.direction(b"acceptor to dialler"),
        receive: transcript.direction(b"dialler to acceptor"),
    };
    Ok((who, keys))
}

fn hello(who: Introduction, nonce: [u8; 32]) -> [u8; HELLO_BYTES] {
    let mut bytes = [0; HELLO_BYTES];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..12].copy_from_slice(&who.generation.to_le_bytes());
    bytes[12..16].copy_from_slice(&who.from.to_le_bytes());
    bytes[16..20].copy_from_slice(&who.to.to_le_bytes());
    bytes[20..].copy_from_slice(&nonce);
    bytes
}

fn parse(hello: &[u8; HELLO_BYTES]) -> Option<Introduction> {
    let word = |at: usize| u32::from_le_bytes([hello[at], hello[at + 1], hello[at + 2], hello[at + 3]]);
    (hello[..4] == MAGIC).then(|| Introduction {
        generation: u64::from(word(4)) | u64::from(word(8)) << 32,
        from: word(12),
        to: word(16),
    })
}
