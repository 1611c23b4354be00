//! Streams whose client went away unfinished: it may come back with `Last-Event-ID`, here for as long
//! as they are kept, or at another gateway for as long as workers remember them.

use crate::choice::{Job, Transcript};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Streams kept, at most, and the bytes of all of them, about. What is over goes at once: the client
/// then asks the workers by way of this or another gateway.
const MAX_STREAMS: usize = 1024;
const MAX_BYTES: usize = 64 << 20;

/// A stream to go on with: each choice with what there is of it.
pub type Stream = Vec<(Arc<Job>, u32, Transcript)>;

pub struct Parked {
    keep: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    streams: HashMap<String, (Instant, usize, Stream)>,
    bytes: usize,
}

impl Parked {
    pub fn new(keep: Duration) -> Self {
        Self { keep, state: Mutex::default() }
    }

    pub fn put(&self, request: &str, stream: Stream, now: Instant) {
        let bytes = stream.iter().map(|(job, _, transcript)| size(job, transcript)).sum();
        let mut state = self.state.lock();
        if state.streams.len() < MAX_STREAMS && state.bytes + bytes <= MAX_BYTES {
            state.remove(request);
            state.bytes += bytes;
            state.streams.insert(request.to_owned(), (now, bytes, stream));
        }
    }

    pub fn take(&self, request: &str, now: Instant) -> Option<Stream> {
        let (since, stream) = self.state.lock().remove(request)?;
        (now.duration_since(since) < self.keep).then_some(stream)
    }

    /// Drops what nobody came back for.
    pub fn forget_old(&self, now: Instant) {
        let mut state = self.state.lock();
        let old = state.streams.iter().filter(|(_, (since, _, _))| now.duration_since(*since) >= self.keep);
        let old: Vec<_> = old.map(|(request, _)| request.clone()).collect();
        for request in old {
            state.remove(&request);
        }
    }
}

impl State {
    fn remove(&mut self, request: &str) -> Option<(Instant, Stream)> {
        let (since, bytes, stream) = self.streams.remove(request)?;
        self.bytes -= bytes;
        Some((since, stream))
    }
}

fn size(job: &Job, transcript: &Transcript) -> usize {
    let generate = &job.generate;
    let messages = generate.messages.iter().map(|message| message.content.len() + message.tool_calls_json.len());
    let prompt = generate.prompt.as_ref().map_or(0, String::len) + 4 * generate.prompt_tokens.len();
    messages.sum::<usize>() + prompt + transcript.bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choice::tests::job;

    fn stream(bytes: usize) -> Stream {
        vec![(job(), 0, Transcript { text: "x".repeat(bytes), ..Transcript::default() })]
    }

    #[test]
    fn a_stream_can_be_taken_once_and_in_time() {
        let (parked, now) = (Parked::new(Duration::from_secs(60)), Instant::now());
        parked.put("a", stream(1), now);
        parked.put("b", stream(1), now);
        assert!(parked.take("a", now).is_some());
        assert!(parked.take("a", now).is_none());
        assert!(parked.take("b", now + Duration::from_secs(60)).is_none());
    }

    #[test]
    fn no_more_is_kept_than_there_is_room_for() {
        let (parked, now) = (Parked::new(Duration::from_secs(60)), Instant::now());
        parked.put("a", stream(MAX_BYTES - 10), now);
        parked.put("b", stream(20), now);
        assert!(parked.take("b", now).is_none());
        parked.forget_old(now + Duration::from_secs(61));
        parked.put("b", stream(20), now);
        assert!(parked.take("b", now).is_some());
    }
}
