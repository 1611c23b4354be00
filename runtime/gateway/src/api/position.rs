//! How far a client is in a stream, as it is told with each event and tells with `Last-Event-ID`:
//! `<request>:<tokens>.<bytes>` with one pair for each choice, between commas, `!` behind those whose end
//! it has, and `+` behind those of which it has nothing but what comes before the text.

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
    /// It has the role, or the prompt that is echoed.
    pub opened: bool,
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
        let (text, closed) = text.strip_suffix('!').map_or((text, false), |text| (text, true));
        let (text, marked) = text.strip_suffix('+').map_or((text, false), |text| (text, true));
        let (tokens, bytes) = text.split_once('.')?;
        let seen = Seen { tokens: tokens.parse().ok()?, bytes: bytes.parse().ok()? };
        Some(Self { seen, opened: marked || closed || seen != Seen::default(), closed })
    }
}

impl Display for At {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Seen { bytes, tokens } = self.seen;
        let mark = match self {
            At { closed: true, .. } => "!",
            At { opened: true, seen, .. } if *seen == Seen::default() => "+",
            _ => "",
        };
        write!(formatter, "{tokens}.{bytes}{mark}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_read_as_it_was_written() {
        let choices = vec![
            At { seen: Seen { tokens: 3, bytes: 17 }, opened: true, closed: false },
            At { seen: Seen { tokens: 5, bytes: 0 }, opened: true, closed: true },
            At { seen: Seen::default(), opened: true, closed: false },
            At::default(),
        ];
        let written = choices.iter().map(At::to_string).collect::<Vec<_>>().join(",");
        let written = format!("chatcmpl-1:{written}");
        assert_eq!(written, "chatcmpl-1:3.17,5.0!,0.0+,0.0");
        assert_eq!(Position::parse(&written), Some(Position { request: "chatcmpl-1".into(), choices }));
    }

    #[test]
    fn what_is_no_position_is_refused() {
        for wrong in
            ["", "a", "a:", ":1.2", "a:1", "a:1.", "a:1.2,", "a:-1.2", "a b:1.2", "a\n:1.2", "a:1.2!!", "a:1.2!+"]
        {
            assert_eq!(Position::parse(wrong), None, "{wrong:?}");
        }
    }
}
