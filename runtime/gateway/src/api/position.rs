//! How far a client is in a stream, as it is told with each event and tells with `Last-Event-ID`:
//! `<request>:<tokens>.<bytes>` with one pair for each choice, between commas, and `!` behind those
//! whose end it has.

use crate::choice::Seen;
use std::fmt::{self, Display, Formatter};

const MAX_ID: usize = 128;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    pub request: String,
    pub choices: Vec<At>,
}

/// What the client has of one choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct At {
    pub seen: Seen,
    pub closed: bool,
}

impl Position {
    pub fn parse(id: &str) -> Option<Self> {
        let (request, choices) = id.trim().split_once(':')?;
        let sound = |letter: char| letter.is_ascii_alphanumeric() || letter == '-';
        if request.is_empty() || request.len() > MAX_ID || !request.chars().all(sound) {
            return None;
        }
        let choices = choices.split(',').map(At::parse).collect::<Option<_>>()?;
        Some(Self { request: request.to_owned(), choices })
    }
}

impl At {
    fn parse(text: &str) -> Option<Self> {
        let (text, closed) = match text.strip_suffix('!') {
            Some(text) => (text, true),
            None => (text, false),
        };
        let (tokens, bytes) = text.split_once('.')?;
        Some(Self { seen: Seen { tokens: tokens.parse().ok()?, bytes: bytes.parse().ok()? }, closed })
    }
}

impl Display for At {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Seen { bytes, tokens } = self.seen;
        write!(formatter, "{tokens}.{bytes}{}", if self.closed { "!" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_read_as_it_was_written() {
        let choices = vec![
            At { seen: Seen { tokens: 3, bytes: 17 }, closed: false },
            At { seen: Seen { tokens: 5, bytes: 0 }, closed: true },
        ];
        let written = format!("chatcmpl-1:{},{}", choices[0], choices[1]);
        assert_eq!(written, "chatcmpl-1:3.17,5.0!");
        assert_eq!(Position::parse(&written), Some(Position { request: "chatcmpl-1".into(), choices }));
    }

    #[test]
    fn what_is_no_position_is_refused() {
        for wrong in ["", "a", "a:", ":1.2", "a:1", "a:1.", "a:1.2,", "a:-1.2", "a b:1.2", "a\n:1.2", "a:1.2!!"] {
            assert_eq!(Position::parse(wrong), None, "{wrong:?}");
        }
    }
}
