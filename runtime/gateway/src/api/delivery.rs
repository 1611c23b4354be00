//! A stream's way to its client, who may read slowly, or not at all.
//!
//! Over HTTP/2 a body is not asked for more as long as the client gives its stream no window, and nobody
//! is told of that. So it is not the body that writes: a task does, and waits for the body for a limited
//! time. When it gives up, all that the request held is free, but for the last piece, which the connection has.

use axum::body::{Body, Bytes};
use futures::Stream;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// Bytes that are handed over at once: so much a stream that stands still keeps hold of.
const PIECE_BYTES: usize = 16 << 10;

/// The client went away, or has read nothing for too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream was given up before its end")]
pub struct GivenUp;

/// The end of a body at which its text is put in. Dropped before its end, the body breaks off.
pub struct Delivery {
    pieces: mpsc::Sender<Bytes>,
    ended: oneshot::Sender<()>,
    limit: Duration,
}

/// `limit`: how long the client may read nothing.
pub fn delivery(limit: Duration) -> (Delivery, Body) {
    let (pieces, taken) = mpsc::channel(1);
    let (ended, is_whole) = oneshot::channel();
    (Delivery { pieces, ended, limit }, Body::from_stream(read(taken, is_whole)))
}

fn read(
    mut pieces: mpsc::Receiver<Bytes>,
    is_whole: oneshot::Receiver<()>,
) -> impl Stream<Item = Result<Bytes, GivenUp>> {
    async_stream::stream! {
        while let Some(piece) = pieces.recv().await {
            yield Ok(piece);
        }
        if is_whole.await.is_err() {
            yield Err(GivenUp);
        }
    }
}

impl Delivery {
    /// Puts in what fits at once of the first text; returns the rest.
    pub fn begin(&self, mut text: String) -> String {
        let rest = text.split_off(text.floor_char_boundary(PIECE_BYTES));
        if !text.is_empty() {
            // There is room, since nothing is in it yet; that the client has gone is noticed by what comes next.
            let _ = self.pieces.try_send(Bytes::from(text));
        }
        rest
    }

    /// Hands over a text, as fast as the client reads.
    pub async fn hand(&self, text: &str) -> Result<(), GivenUp> {
        for piece in text.as_bytes().chunks(PIECE_BYTES) {
            // A copy, so that the last piece does not hold the whole.
            let taken = timeout(self.limit, self.pieces.send(Bytes::copy_from_slice(piece))).await;
            taken.map_err(|_| GivenUp)?.map_err(|_| GivenUp)?;
        }
        Ok(())
    }

    /// Resolves when the client has gone.
    pub async fn abandoned(&self) {
        self.pieces.closed().await;
    }

    /// That was all of it.
    pub fn end(self) {
        // A client that has gone does not miss the end.
        let _ = self.ended.send(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt;
    use tokio::time::{Instant, sleep};

    const LIMIT: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_gets_all_of_it() {
        let (delivery, body) = delivery(LIMIT);
        let text = "x".repeat(5 * PIECE_BYTES);
        let expected = text.len();
        let writer = tokio::spawn(async move {
            delivery.hand(&text).await?;
            delivery.end();
            Ok::<_, GivenUp>(())
        });
        let mut read = 0;
        let mut pieces = body.into_data_stream();
        while let Some(piece) = pieces.next().await {
            read += piece.unwrap().len();
            sleep(LIMIT * 9 / 10).await;
        }
        assert_eq!((read, writer.await.unwrap()), (expected, Ok(())));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_too_long_to_begin_with_is_left() {
        let (delivery, body) = delivery(LIMIT);
        assert_eq!(delivery.begin("é".repeat(PIECE_BYTES / 2) + "rest"), "rest");
        drop(delivery);
        let mut pieces = body.into_data_stream();
        assert_eq!(pieces.next().await.unwrap().unwrap().len(), PIECE_BYTES);
    }

    #[tokio::test(start_paused = true)]
    async fn who_reads_nothing_is_given_up_and_sees_that_the_end_is_missing() {
        let (delivery, body) = delivery(LIMIT);
        let started = Instant::now();
        assert_eq!(delivery.hand(&"x".repeat(5 * PIECE_BYTES)).await, Err(GivenUp));
        assert_eq!(started.elapsed().as_secs(), LIMIT.as_secs());
        drop(delivery);
        let pieces: Vec<_> = body.into_data_stream().collect().await;
        assert_eq!(pieces.len(), 2);
        assert!(pieces[0].is_ok() && pieces[1].is_err());
    }

    #[tokio::test]
    async fn a_client_that_goes_is_noticed_while_nothing_is_written() {
        let (delivery, body) = delivery(LIMIT);
        drop(body);
        delivery.abandoned().await;
        assert_eq!(delivery.hand("x").await, Err(GivenUp));
    }
}
