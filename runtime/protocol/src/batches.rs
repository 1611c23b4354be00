//! Fewer and larger messages from a worker, since each costs the gateway more than what is in it: what is ready at the
//! same time goes together, and so do tokens that nobody reads as they come.

use crate::inference::{Batch, Delta, WorkerMessage, worker_message::Body};
use prost::Message;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::Stream;

/// Of one batch, at most; a longer message goes alone.
const BATCH_BYTES: usize = 1 << 20;
const BATCH_MESSAGES: usize = 1024;
/// Tokens that are told together, and how long the first of them is kept for that.
const GATHERED_TOKENS: usize = 32;
const GATHERED_FOR: Duration = Duration::from_millis(100);

/// A worker's messages on their way to a gateway, in order. A step of the scheduler says something of each sequence at
/// about the same time, and the more a connection is behind, the more goes at once.
#[derive(Debug)]
pub struct Batches {
    messages: mpsc::Receiver<WorkerMessage>,
    /// Taken out of the channel, not sent yet.
    next: VecDeque<WorkerMessage>,
    wanted: Arc<AtomicBool>,
}

impl Batches {
    /// `wanted`: the gateway's welcome says that it takes batches; until then each message goes by itself.
    pub fn new(messages: mpsc::Receiver<WorkerMessage>, wanted: Arc<AtomicBool>) -> Self {
        Self { messages, next: VecDeque::new(), wanted }
    }

    fn batch(&mut self) -> Option<WorkerMessage> {
        let mut bytes = 0;
        let fits = |message: &&WorkerMessage| {
            bytes += message.encoded_len();
            bytes <= BATCH_BYTES
        };
        let count = self.next.iter().take_while(fits).count();
        if count < 2 {
            return self.next.pop_front();
        }
        let messages = self.next.drain(..count).collect();
        Some(WorkerMessage { body: Some(Body::Batch(Batch { messages })) })
    }
}

impl Stream for Batches {
    type Item = WorkerMessage;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<WorkerMessage>> {
        if self.next.is_empty() {
            let mut taken = Vec::new();
            ready!(self.messages.poll_recv_many(context, &mut taken, BATCH_MESSAGES));
            self.next = taken.into();
        }
        Poll::Ready(match self.wanted.load(Ordering::Relaxed) {
            true => self.batch(),
            false => self.next.pop_front(),
        })
    }
}

/// Tokens of an answer that its client wants in one piece. The first is told at once, the others together.
#[derive(Debug, Default)]
pub struct Gathered {
    delta: Option<(Instant, Delta)>,
}

impl Gathered {
    /// Takes what follows; returns what is to be told now.
    pub fn add(&mut self, next: Delta, now: Instant) -> Option<Delta> {
        if next.prompt_tokens > 0 {
            return Some(next);
        }
        let (since, delta) = match self.delta.take() {
            None => (now, next),
            Some((since, delta)) => (since, joined(delta, next)),
        };
        if delta.tokens.len() >= GATHERED_TOKENS || now.duration_since(since) >= GATHERED_FOR {
            return Some(delta);
        }
        self.delta = Some((since, delta));
        None
    }

    /// What is left: nothing follows, or not from here.
    pub fn take(&mut self) -> Option<Delta> {
        self.delta.take().map(|(_, delta)| delta)
    }
}

fn joined(mut delta: Delta, next: Delta) -> Delta {
    delta.tokens.extend(next.tokens);
    delta.text.push_str(&next.text);
    delta.logprobs.extend(next.logprobs);
    delta
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_stream::StreamExt;

    fn delta(position: u32, prompt_tokens: u32) -> Delta {
        let text = format!("{position} ");
        Delta { request: "r".into(), position, tokens: vec![position], text, prompt_tokens, ..Delta::default() }
    }

    fn message(position: u32, text: &str) -> WorkerMessage {
        WorkerMessage { body: Some(Body::Delta(Delta { text: text.into(), ..delta(position, 0) })) }
    }

    fn positions(message: WorkerMessage) -> Vec<u32> {
        match message.body {
            Some(Body::Delta(delta)) => vec![delta.position],
            Some(Body::Batch(batch)) => batch.messages.into_iter().flat_map(positions).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn what_is_ready_goes_together_once_it_is_wanted_and_stays_in_order() {
        let (sender, messages) = mpsc::channel(BATCH_MESSAGES);
        let wanted = Arc::new(AtomicBool::new(false));
        let mut batches = Batches::new(messages, wanted.clone());
        for position in 0..5 {
            sender.send(message(position, "")).await.unwrap();
        }
        assert_eq!(positions(batches.next().await.unwrap()), [0]);
        wanted.store(true, Ordering::Relaxed);
        assert_eq!(positions(batches.next().await.unwrap()), [1, 2, 3, 4]);
        let long = "x".repeat(BATCH_BYTES);
        for (position, text) in [(5, ""), (6, ""), (7, long.as_str()), (8, "")] {
            sender.send(message(position, text)).await.unwrap();
        }
        drop(sender);
        let rest: Vec<_> = batches.map(positions).collect().await;
        assert_eq!(rest, [vec![5, 6], vec![7], vec![8]]);
    }

    #[test]
    fn the_first_token_is_told_at_once_and_the_others_together() {
        let (mut gathered, start) = (Gathered::default(), Instant::now());
        assert_eq!(gathered.add(delta(0, 7), start), Some(delta(0, 7)));
        assert_eq!(gathered.take(), None);
        let told: Vec<_> = (1..40).filter_map(|position| gathered.add(delta(position, 0), start)).collect();
        assert_eq!((told.len(), told[0].position, told[0].tokens.len()), (1, 1, GATHERED_TOKENS));
        assert!(told[0].text.starts_with("1 2 3 ") && told[0].text.ends_with(" 32 "), "{}", told[0].text);
        let late = gathered.add(delta(40, 0), start + GATHERED_FOR).unwrap();
        assert_eq!((late.position, late.tokens.len()), (33, 8));
        assert_eq!(gathered.take(), None);
        gathered.add(delta(41, 0), start);
        assert_eq!(gathered.take(), Some(delta(41, 0)));
    }
}
