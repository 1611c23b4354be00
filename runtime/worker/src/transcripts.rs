//! What became of requests whose gateway went away, kept for a minute so that another gateway can
//! continue them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};
use vicuna_protocol::inference::TranscriptChoice;

const KEPT: Duration = Duration::from_secs(60);
/// Whatever comes, no more is kept than this.
const MAX_CHOICES: usize = 1024;
const MAX_BYTES: usize = 64 << 20;
/// What one message to a gateway may hold, which takes 32 MiB.
const MAX_MESSAGE_BYTES: usize = 24 << 20;

#[derive(Debug, Default)]
pub struct Transcripts {
    /// Oldest first.
    kept: VecDeque<Kept>,
    bytes: usize,
}

#[derive(Debug)]
struct Kept {
    since: Instant,
    bytes: usize,
    choice: TranscriptChoice,
}

impl Transcripts {
    pub fn keep(&mut self, choice: TranscriptChoice, now: Instant) {
        let bytes = size(&choice);
        self.bytes += bytes;
        self.kept.push_back(Kept { since: now, bytes, choice });
        self.expire(now);
    }

    /// All choices of a request, the newest of each.
    pub fn of(&mut self, request: &str, now: Instant) -> Vec<TranscriptChoice> {
        self.expire(now);
        let mut found: Vec<TranscriptChoice> = Vec::new();
        for kept in self.kept.iter().rev().filter(|kept| request_of(&kept.choice) == Some(request)) {
            if !found.iter().any(|other| index_of(other) == index_of(&kept.choice)) {
                found.push(kept.choice.clone());
            }
        }
        found.sort_by_key(index_of);
        found
    }

    pub fn expire(&mut self, now: Instant) {
        while self.kept.front().is_some_and(|oldest| now.duration_since(oldest.since) > KEPT) {
            self.forget(0);
        }
        while self.kept.len() > MAX_CHOICES || self.bytes > MAX_BYTES {
            // An answer that had ended was most likely read to its end; one that had not is asked for.
            let finished = self.kept.iter().position(|kept| !kept.choice.finish_reason.is_empty());
            self.forget(finished.unwrap_or(0));
        }
    }

    fn forget(&mut self, index: usize) {
        if let Some(kept) = self.kept.remove(index) {
            self.bytes -= kept.bytes;
        }
    }
}

/// As many of the choices as one message to a gateway may hold: it would take a longer one for the end of
/// the connection, with all answers on it.
pub fn within_a_message(mut choices: Vec<TranscriptChoice>) -> Vec<TranscriptChoice> {
    let mut bytes = 0;
    choices.retain(|choice| {
        bytes += size(choice);
        bytes <= MAX_MESSAGE_BYTES
    });
    choices
}

fn request_of(choice: &TranscriptChoice) -> Option<&str> {
    choice.generate.as_ref().map(|generate| generate.request.as_str())
}

fn index_of(choice: &TranscriptChoice) -> u32 {
    choice.generate.as_ref().map_or(0, |generate| generate.choice)
}

/// About what it takes in memory.
fn size(choice: &TranscriptChoice) -> usize {
    let generate = choice.generate.as_ref();
    let messages = generate.iter().flat_map(|generate| &generate.messages);
    let said: usize = messages.map(|message| message.content.len() + message.tool_calls_json.len()).sum();
    let asked = generate.map_or(0, |generate| {
        let ids = generate.generated.len() + generate.prompt_tokens.len();
        4 * ids + generate.prompt.as_ref().map_or(0, String::len) + generate.tools_json.len()
    });
    let alternatives: usize = choice.logprobs.iter().map(|entry| 1 + entry.top.len()).sum();
    1024 + said + asked + choice.text.len() + 4 * choice.tokens.len() + 80 * alternatives
}

#[cfg(test)]
mod tests {
    use super::*;
    use vicuna_protocol::inference::Generate;

    fn choice(request: &str, index: u32, text: &str) -> TranscriptChoice {
        let generate = Generate { request: request.into(), choice: index, ..Generate::default() };
        TranscriptChoice { generate: Some(generate), text: text.into(), ..TranscriptChoice::default() }
    }

    fn texts(transcripts: &mut Transcripts, request: &str, now: Instant) -> Vec<String> {
        transcripts.of(request, now).into_iter().map(|choice| choice.text).collect()
    }

    #[test]
    fn the_newest_of_each_choice_is_found_for_a_minute() {
        let (mut transcripts, start) = (Transcripts::default(), Instant::now());
        for (request, index, text) in [("a", 1, "old"), ("b", 0, "other"), ("a", 0, "first"), ("a", 1, "second")] {
            transcripts.keep(choice(request, index, text), start);
        }
        assert_eq!(texts(&mut transcripts, "a", start), ["first", "second"]);
        assert_eq!(texts(&mut transcripts, "a", start + KEPT), ["first", "second"]);
        assert!(texts(&mut transcripts, "a", start + KEPT + Duration::from_millis(1)).is_empty());
        assert_eq!((transcripts.kept.len(), transcripts.bytes), (0, 0));
    }

    #[test]
    fn what_had_ended_makes_room_for_what_had_not() {
        let (mut transcripts, now) = (Transcripts::default(), Instant::now());
        transcripts.keep(choice("unfinished", 0, "so far"), now);
        for index in 0..2 * MAX_CHOICES {
            let ended = TranscriptChoice { finish_reason: "stop".into(), ..choice(&index.to_string(), 0, "") };
            transcripts.keep(ended, now);
        }
        assert_eq!(transcripts.kept.len(), MAX_CHOICES);
        assert_eq!(texts(&mut transcripts, "unfinished", now), ["so far"]);
    }

    #[test]
    fn a_message_holds_no_more_than_a_gateway_takes() {
        let large = |index| choice("a", index, &"x".repeat(MAX_MESSAGE_BYTES / 3));
        assert_eq!(within_a_message((0..4).map(large).collect()).len(), 2);
    }

    #[test]
    fn it_is_bounded_in_number_and_in_bytes() {
        let (mut transcripts, now) = (Transcripts::default(), Instant::now());
        for index in 0..3000 {
            transcripts.keep(choice(&index.to_string(), 0, ""), now);
        }
        assert_eq!(transcripts.kept.len(), MAX_CHOICES);
        assert!(texts(&mut transcripts, "0", now).is_empty());
        assert_eq!(texts(&mut transcripts, "2999", now).len(), 1);
        transcripts.keep(choice("large", 0, &"x".repeat(MAX_BYTES)), now);
        assert!(transcripts.bytes <= MAX_BYTES);
    }
}
