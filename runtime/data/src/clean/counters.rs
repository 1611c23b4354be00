//! The counter of regenerated replies ("2 / 3"), which ShareGPT's page shows beside a turn, and its
//! count of what the copy button would copy.
//!
//! Only in a line of its own at the start or end of a turn: "3 / 4" in a text is a fraction.

use super::{Candidate, Step, Verdict};

pub struct Counters;

impl Step for Counters {
    fn name(&self) -> &'static str {
        "counters of the page"
    }

    fn apply(&mut self, candidate: &mut Candidate) -> Verdict {
        Verdict::changed(candidate.rewrite(None, stripped))
    }
}

pub(super) fn stripped(text: &str) -> Option<String> {
    let mut rest = text;
    loop {
        let (first, after) = rest.split_once('\n').unwrap_or((rest, ""));
        let (before, last) = rest.rsplit_once('\n').unwrap_or(("", rest));
        if is_counter(first) {
            rest = after.trim_start_matches('\n');
        } else if is_counter(last) {
            rest = before.trim_end_matches('\n');
        } else {
            break;
        }
        // What would be left is nothing: a turn that is a counter only may be an answer.
        if rest.trim().is_empty() {
            return None;
        }
    }
    (rest.len() < text.len()).then(|| rest.to_owned())
}

fn is_counter(line: &str) -> bool {
    let line = line.trim();
    is_regenerated(line) || is_copied(line)
}

/// "n / m" with 1 ≤ n ≤ m, 2 ≤ m.
fn is_regenerated(line: &str) -> bool {
    let number = |text: &str| text.parse::<u32>().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
    let pair = line.split_once(" / ").and_then(|(n, m)| Some((number(n)?, number(m)?)));
    pair.is_some_and(|(n, m)| (1..=m).contains(&n) && (2..1000).contains(&m))
}

/// "Copy123 chars / 45 words".
fn is_copied(line: &str) -> bool {
    let counts = line.strip_prefix("Copy").and_then(|rest| rest.strip_suffix(" words"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    counts
        .and_then(|rest| rest.split_once(" chars / "))
        .is_some_and(|(chars, words)| digits(chars.trim()) && digits(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_at_the_edges_go() {
        assert_eq!(stripped("2 / 3\n\nHello").as_deref(), Some("Hello"));
        assert_eq!(stripped("1 / 2\nHello\nCopy12 chars / 3 words").as_deref(), Some("Hello"));
        assert_eq!(stripped("Hello\n2 / 2").as_deref(), Some("Hello"));
    }

    #[test]
    fn fractions_stay() {
        for text in
            ["It is 3 / 4.", "3 / 4", "a\n1 / 2\nb", "5 / 4\nx", "1 / 1\nx", "+1 / 2\nx", "Copy chars / words\nx"]
        {
            assert_eq!(stripped(text), None, "{text}");
        }
    }
}
