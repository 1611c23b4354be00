//! Text that looks like a control token of LLaMA's vocabulary is broken up, for programs that would
//! take it for one. (Our own encoder never does; see [`crate::template`].)

use super::{Candidate, Step, Verdict};

/// The token, and how it is written instead.
const BROKEN_UP: [(&str, &str); 3] = [("</s>", "</ s>"), ("<s>", "< s>"), ("<unk>", "< unk>")];

pub struct ControlTokens;

impl Step for ControlTokens {
    fn name(&self) -> &'static str {
        "literal control tokens"
    }

    fn apply(&mut self, candidate: &mut Candidate) -> Verdict {
        Verdict::changed(candidate.rewrite(None, broken_up))
    }
}

fn broken_up(text: &str) -> Option<String> {
    let found = BROKEN_UP.iter().any(|(token, _)| text.contains(token));
    found.then(|| BROKEN_UP.iter().fold(text.to_owned(), |text, (token, apart)| text.replace(token, apart)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_token_is_left_and_the_rest_is() {
        let text = "a</s><s><unk>b <strong> <s";
        assert_eq!(broken_up(text).as_deref(), Some("a</ s>< s>< unk>b <strong> <s"));
        assert_eq!(broken_up("<strong>"), None);
        // Taking one apart does not put another together.
        let once = broken_up("<<s>s>").unwrap();
        assert_eq!(broken_up(&once), None);
    }
}
