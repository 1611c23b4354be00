//! Streams that are being written: a client that comes back with `Last-Event-ID` while its old connection still
//! seems to live gets the stream, and the old connection ends.

use super::answer::Request;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// For the old connection's task to hand over, which does nothing that takes time.
const PATIENCE: Duration = Duration::from_secs(5);

/// To whom a stream is to be handed over.
pub type Heir = oneshot::Sender<Request>;

/// By request, as many as there are streams.
#[derive(Default)]
pub struct Takeovers {
    streams: Mutex<HashMap<String, mpsc::Sender<Heir>>>,
}

/// One stream's entry, gone when this is dropped.
pub struct Entry {
    all: Arc<Takeovers>,
    request: String,
    own: mpsc::Sender<Heir>,
    heirs: mpsc::Receiver<Heir>,
}

impl Takeovers {
    pub fn enter(self: &Arc<Self>, request: &str) -> Entry {
        let (own, heirs) = mpsc::channel(1);
        self.streams.lock().insert(request.to_owned(), own.clone());
        Entry { all: self.clone(), request: request.to_owned(), own, heirs }
    }

    /// The request as it stands, taken from the connection that has it; none if none has.
    pub async fn take(&self, request: &str) -> Option<Request> {
        let owner = self.streams.lock().get(request).cloned()?;
        let (heir, handed) = oneshot::channel();
        owner.try_send(heir).ok()?;
        timeout(PATIENCE, handed).await.ok()?.ok()
    }
}

impl Entry {
    /// Resolves when another connection wants the stream.
    pub async fn heir(&mut self) -> Option<Heir> {
        self.heirs.recv().await
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut streams = self.all.streams.lock();
        // A later stream of this request may have taken its place.
        if streams.get(&self.request).is_some_and(|sender| sender.same_channel(&self.own)) {
            streams.remove(&self.request);
        }
    }
}
