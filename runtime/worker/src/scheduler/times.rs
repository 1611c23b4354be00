//! When what happened to a request at this worker.

use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug)]
pub struct Times {
    arrived: Instant,
    /// Into the batch, for the first time.
    admitted: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    tokens: usize,
}

/// What a request that has ended took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Took {
    pub all: Duration,
    pub queue: Duration,
    /// From there to the first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
    /// That this worker has made.
    pub tokens: usize,
}

impl Times {
    pub fn arrived(now: Instant) -> Self {
        Self { arrived: now, admitted: None, first_token: None, last_token: None, tokens: 0 }
    }

    pub fn admitted(&mut self, now: Instant) {
        self.admitted.get_or_insert(now);
    }

    /// This worker has sent a token of it.
    pub fn has_begun(&self) -> bool {
        self.first_token.is_some()
    }

    /// A token; tells how long after the last one, if there was one.
    pub fn token(&mut self, now: Instant) -> Option<Duration> {
        self.tokens += 1;
        self.first_token.get_or_insert(now);
        self.last_token.replace(now).map(|last| now.duration_since(last))
    }

    pub fn since_arrival(&self, now: Instant) -> Duration {
        now.duration_since(self.arrived)
    }

    pub fn took(&self, now: Instant) -> Took {
        let admitted = self.admitted.unwrap_or(now);
        let first = self.first_token.unwrap_or(now);
        let last = self.last_token.unwrap_or(first);
        Took {
            all: now.duration_since(self.arrived),
            queue: admitted.duration_since(self.arrived),
            prefill: first.duration_since(admitted),
            decode: last.duration_since(first),
            tokens: self.tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_request_s_time_are_told_apart() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut times = Times::arrived(start);
        times.admitted(after(2));
        times.admitted(after(4));
        assert!(!times.has_begun());
        assert_eq!(times.token(after(7)), None);
        assert_eq!(times.token(after(8)), Some(Duration::from_secs(1)));
        assert_eq!(times.token(after(12)), Some(Duration::from_secs(4)));
        let seconds = |took: Took| [took.all, took.queue, took.prefill, took.decode].map(|part| part.as_secs());
        assert_eq!(seconds(times.took(after(13))), [13, 2, 5, 5], "one that is preempted has been admitted before");
    }
}
