//! Frames on a connection.
//!
//! ```text
//! length u32 │ tag 16 │ mac 16 │ payload
//! ```
//!
//! Little-endian. The MAC is keyed BLAKE3 over a sequence number, length, tag and payload. The
//! number is not sent: both sides count, so that a dropped, repeated or reordered frame fails too.

use super::{Kind, Tag};
use std::io::{self, Read, Write};

/// Largest payload: well above a block's 4 MiB.
pub const PAYLOAD_LIMIT: usize = 16 << 20;
const TAG_BYTES: usize = 16;
const MAC_BYTES: usize = 16;
const HEADER_BYTES: usize = 4 + TAG_BYTES + MAC_BYTES;

/// One direction of a connection.
#[derive(Debug)]
pub struct FrameKey {
    key: [u8; 32],
    sequence: u64,
}

#[derive(Debug)]
pub enum ReadError {
    Io(io::Error),
    /// The MAC does not fit.
    Forged,
    /// Authentic, but nothing that this program sends.
    Malformed(&'static str),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl FrameKey {
    pub fn new(key: [u8; 32]) -> Self {
        Self { key, sequence: 0 }
    }

    fn next_mac(&mut self, prefix: &[u8], payload: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&self.sequence.to_le_bytes()).update(prefix).update(payload);
        self.sequence += 1;
        hasher.finalize()
    }

    pub fn write(&mut self, stream: &mut impl Write, tag: Tag, payload: &[u8]) -> io::Result<()> {
        if payload.len() > PAYLOAD_LIMIT {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "payload above the frame limit"));
        }
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        header[4..4 + TAG_BYTES].copy_from_slice(&encode(tag));
        let mac = self.next_mac(&header[..4 + TAG_BYTES], payload);
        header[4 + TAG_BYTES..].copy_from_slice(&mac.as_bytes()[..MAC_BYTES]);
        stream.write_all(&header)?;
        stream.write_all(payload)
    }

    pub fn read(&mut self, stream: &mut impl Read) -> Result<(Tag, Vec<u8>), ReadError> {
        let mut header = [0; HEADER_BYTES];
        stream.read_exact(&mut header)?;
        let (prefix, mac) = header.split_at(4 + TAG_BYTES);
        let length = u32::from_le_bytes([prefix[0], prefix[1], prefix[2], prefix[3]]) as usize;
        if length > PAYLOAD_LIMIT {
            return Err(ReadError::Forged);
        }
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload)?;
        let expected = self.next_mac(prefix, &payload);
        if !same(&expected.as_bytes()[..MAC_BYTES], mac) {
            return Err(ReadError::Forged);
        }
        let tag = decode(&prefix[4..]).ok_or(ReadError::Malformed("unknown kind of message"))?;
        Ok((tag, payload))
    }
}

/// Compares without telling by its time where the difference is.
pub(super) fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |all, (x, y)| all | (x ^ y)) == 0
}

fn encode(tag: Tag) -> [u8; TAG_BYTES] {
    let mut bytes = [0; TAG_BYTES];
    bytes[0] = tag.kind as u8;
    bytes[1] = tag.part;
    bytes[2..4].copy_from_slice(&tag.node.to_le_bytes());
    bytes[4..8].copy_from_slice(&tag.block.to_le_bytes());
    bytes[8..].copy_from_slice(&tag.step.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Option<Tag> {
    let bytes: &[u8; TAG_BYTES] = bytes.try_into().ok()?;
    let [kind, part, n0, n1, b0, b1, b2, b3, step @ ..] = *bytes;
    let kind = match kind {
        1 => Kind::Partial,
        2 => Kind::Commit,
        3 => Kind::Weights,
        4 => Kind::Stored,
        5 => Kind::Manifest,
        6 => Kind::Bye,
        7 => Kind::Gradient,
        8 => Kind::State,
        9 => Kind::Evaluation,
        10 => Kind::Inputs,
        11 => Kind::Log,
        12 => Kind::Memory,
        _ => return None,
    };
    Some(Tag {
        kind,
        part,
        node: u16::from_le_bytes([n0, n1]),
        block: u32::from_le_bytes([b0, b1, b2, b3]),
        step: u64::from_le_bytes(step),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag() -> Tag {
        Tag::new(Kind::Partial, 1 << 40).block(70_000).node(1, 300)
    }

    fn written(frames: &[&[u8]]) -> Vec<u8> {
        let mut key = FrameKey::new([9; 32]);
        let mut bytes = Vec::new();
        frames.iter().for_each(|payload| key.write(&mut bytes, tag(), payload).unwrap());
        bytes
    }

    #[test]
    fn frames_come_back() {
        let bytes = written(&[b"one", b"", b"three"]);
        let (mut key, mut stream) = (FrameKey::new([9; 32]), &bytes[..]);
        for expected in [&b"one"[..], b"", b"three"] {
            assert_eq!(key.read(&mut stream).unwrap(), (tag(), expected.to_vec()));
        }
        assert!(matches!(key.read(&mut stream), Err(ReadError::Io(_))));
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let bytes = written(&[b"payload"]);
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(FrameKey::new([9; 32]).read(&mut &changed[..]).is_err(), "byte {at}");
        }
        assert!(matches!(FrameKey::new([8; 32]).read(&mut &bytes[..]), Err(ReadError::Forged)));
    }

    #[test]
    fn a_repeated_or_dropped_frame_is_noticed() {
        let bytes = written(&[b"a", b"b"]);
        let (first, second) = bytes.split_at(bytes.len() / 2);
        let mut key = FrameKey::new([9; 32]);
        key.read(&mut &*first).unwrap();
        assert!(matches!(key.read(&mut &*first), Err(ReadError::Forged)));
        assert!(matches!(FrameKey::new([9; 32]).read(&mut &*second), Err(ReadError::Forged)));
    }

    #[test]
    fn an_oversized_length_allocates_nothing() {
        let mut bytes = written(&[b"a"]);
        bytes[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(FrameKey::new([9; 32]).read(&mut &bytes[..]), Err(ReadError::Forged)));
    }
}
