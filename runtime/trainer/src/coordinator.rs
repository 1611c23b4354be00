//! The stream to the coordinator.
//!
//! It may break at any time, and the leader may change: the rank trains on. Everything that a new
//! leader must know is remembered here and said again after the next welcome, so that no message is
//! ever waited for.

use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};
use vicuna_protocol::auth::TokenFile;
use vicuna_protocol::coordinator::coordinator_client::CoordinatorClient;
use vicuna_protocol::coordinator::coordinator_message::Body as Heard;
use vicuna_protocol::coordinator::rank_message::Body;
use vicuna_protocol::coordinator::{CoordinatorMessage, Hello, Notice, RankMessage};
use vicuna_protocol::tls::TlsError;

const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// Messages that wait to be sent, at most; of progress only the newest waits.
const QUEUE: usize = 256;

/// How to reach the coordinator.
#[derive(Clone)]
pub struct Route {
    pub channel: Arc<dyn Fn() -> Result<Channel, TlsError> + Send + Sync>,
    pub token: TokenFile,
}

/// The rank's end of the stream. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Link {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Something is to be sent.
    wake: Notify,
    /// Say hello anew.
    restart: Notify,
    /// The queue became empty.
    sent: Notify,
}

#[derive(Debug)]
struct State {
    hello: Hello,
    /// When the last step was applied.
    stepped_at: Option<Instant>,
    welcomed: bool,
    queue: VecDeque<Body>,
    said: Said,
}

/// The newest of each kind that a new leader must hear.
#[derive(Debug, Default)]
struct Said {
    estimated: Option<Body>,
    prepared: Option<Body>,
    checkpointed: Option<Body>,
    evaluated: Option<Body>,
    /// … and when it was said.
    notice: Option<(Notice, Instant)>,
    /// Blocked, Ready, Stopped, LoadFailed, Finished or Failed: where the rank is.
    place: Option<Body>,
}

impl State {
    fn hello(&self) -> Hello {
        let since_step_ms = self.stepped_at.map_or(0, |at| at.elapsed().as_millis().max(1) as u64);
        Hello { since_step_ms, ..self.hello.clone() }
    }
}

impl Said {
    fn note(&mut self, body: &Body) {
        let slot = match body {
            Body::Hello(_) | Body::Progress(_) => return,
            // It is said again for as long as it holds.
            Body::Blocked(blocked) if blocked.behind => return,
            Body::Evaluated(evaluated) if evaluated.loss.is_none() => return,
            Body::Evaluated(_) => &mut self.evaluated,
            Body::Prepared(_) => {
                self.place = None;
                &mut self.prepared
            }
            Body::Estimated(_) => &mut self.estimated,
            Body::Checkpointed(_) => &mut self.checkpointed,
            Body::Notice(notice) => {
                self.notice = Some((notice.clone(), Instant::now()));
                return;
            }
            _ => &mut self.place,
        };
        *slot = Some(body.clone());
    }

    fn all(&self) -> impl Iterator<Item = Body> {
        let notice = self.notice.as_ref().map(|(notice, said_at)| Body::Notice(left_of(notice, said_at.elapsed())));
        let before = [&self.estimated, &self.prepared, &self.checkpointed, &self.evaluated];
        before.into_iter().flatten().cloned().chain(notice).chain(self.place.clone())
    }
}

/// What is left of a notice after so long.
fn left_of(notice: &Notice, after: Duration) -> Notice {
    let after_ms = after.as_millis() as u64;
    let time_left_ms = match notice.time_left_ms {
        0 => 0,
        // Not none at all, which would be unknown.
        left_ms => left_ms.saturating_sub(after_ms).max(1),
    };
    Notice { time_left_ms, ..notice.clone() }
}

impl Link {
    /// Starts the stream; what the coordinator says arrives at the receiver.
    pub fn start(route: Route, hello: Hello) -> (Self, mpsc::Receiver<Heard>) {
        let state = State { hello, stepped_at: None, welcomed: false, queue: VecDeque::new(), said: Said::default() };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            wake: Notify::new(),
            restart: Notify::new(),
            sent: Notify::new(),
        });
        let (heard, inbox) = mpsc::channel(64);
        tokio::spawn(run(shared.clone(), route, heard));
        (Self { shared }, inbox)
    }

    /// Says something as soon as the coordinator is there to hear it. Never waits.
    pub fn say(&self, body: Body) {
        let mut state = self.shared.state.lock();
        state.said.note(&body);
        if let Body::Progress(progress) = &body {
            state.hello.step = progress.step;
            state.stepped_at = Some(Instant::now());
            if matches!(state.queue.back(), Some(Body::Progress(_))) {
                state.queue.pop_back();
            }
        }
        if state.welcomed && state.queue.len() < QUEUE {
            state.queue.push_back(body);
        }
        drop(state);
        self.shared.wake.notify_one();
    }

    /// The generation that this rank is in from now on, and its last step; what was said of an older
    /// one is forgotten.
    pub fn enter(&self, generation: u64, step: u64) {
        let mut state = self.shared.state.lock();
        state.hello.generation = generation;
        state.hello.step = step;
        state.said.place = None;
        state.said.checkpointed = None;
        state.said.evaluated = None;
    }

    /// Leaves everything and says hello as a newcomer.
    pub fn start_over(&self) {
        self.enter(0, 0);
        self.shared.restart.notify_one();
    }

    /// Waits until everything said is sent, or `patience` is over.
    pub async fn flush(&self, patience: Duration) {
        let emptied = async {
            loop {
                let sent = self.shared.sent.notified();
                if self.shared.state.lock().queue.is_empty() {
                    return;
                }
                sent.await;
            }
        };
        drop(tokio::time::timeout(patience, emptied).await);
    }
}

async fn run(shared: Arc<Shared>, route: Route, heard: mpsc::Sender<Heard>) {
    let mut pause = FIRST_PAUSE;
    while !heard.is_closed() {
        let ended = converse(&shared, &route, &heard).await;
        let welcomed = std::mem::take(&mut shared.state.lock().welcomed);
        shared.state.lock().queue.clear();
        shared.sent.notify_waiters();
        if welcomed {
            pause = FIRST_PAUSE;
        }
        match ended {
            Ok(()) => tracing::info!("stream to the coordinator ended; saying hello again"),
            Err(error) => tracing::warn!(%error, "the coordinator is out of reach; trying again"),
        }
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.5))).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("{} ({})", .0.message(), .0.code())]
    Call(Box<Status>),
    #[error("no answer within {} s", CALL_LIMIT.as_secs())]
    Silent,
}

impl From<Status> for LinkError {
    fn from(status: Status) -> Self {
        Self::Call(Box::new(status))
    }
}

/// One stream, from hello to its end.
async fn converse(shared: &Shared, route: &Route, heard: &mpsc::Sender<Heard>) -> Result<(), LinkError> {
    let (say, outbound) = mpsc::channel(64);
    let hello = Body::Hello(shared.state.lock().hello());
    // The receiver is right here.
    drop(say.try_send(message(hello)));
    let mut client = CoordinatorClient::new((route.channel)()?);
    let request = route.token.sign(Request::new(ReceiverStream::new(outbound)))?;
    let call = tokio::time::timeout(CALL_LIMIT, client.join(request)).await;
    let mut inbound: Streaming<CoordinatorMessage> = call.map_err(|_| LinkError::Silent)??.into_inner();
    loop {
        tokio::select! {
            said = inbound.message() => {
                let Some(body) = said?.map(|message| message.body) else { return Ok(()) };
                let Some(body) = body else { continue };
                if matches!(body, Heard::Welcome(_)) {
                    welcome(shared);
                }
                if heard.send(body).await.is_err() {
                    return Ok(());
                }
            }
            () = shared.wake.notified() => {
                if !send_queued(shared, &say).await {
                    return Ok(());
                }
            }
            () = shared.restart.notified() => return Ok(()),
        }
    }
}

fn welcome(shared: &Shared) {
    let mut state = shared.state.lock();
    state.welcomed = true;
    state.queue = state.said.all().collect();
    drop(state);
    shared.wake.notify_one();
}

/// Sends what waits; false if the stream is gone.
async fn send_queued(shared: &Shared, say: &mpsc::Sender<RankMessage>) -> bool {
    loop {
        let next = shared.state.lock().queue.pop_front();
        let Some(body) = next else {
            shared.sent.notify_waiters();
            return true;
        };
        if say.send(message(body)).await.is_err() {
            return false;
        }
    }
}

fn message(body: Body) -> RankMessage {
    RankMessage { body: Some(body) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notice_that_is_said_again_has_less_time_left() {
        let notice = |time_left_ms| Notice { source: "SIGTERM".to_owned(), time_left_ms, ..Default::default() };
        assert_eq!(left_of(&notice(30_000), Duration::from_secs(10)), notice(20_000));
        assert_eq!(left_of(&notice(30_000), Duration::from_secs(40)), notice(1), "it is over, rather than unknown");
        assert_eq!(left_of(&notice(0), Duration::from_secs(10)), notice(0));
        let mut said = Said::default();
        said.note(&Body::Notice(notice(30_000)));
        said.notice.as_mut().unwrap().1 = Instant::now().checked_sub(Duration::from_secs(10)).unwrap();
        let again: Vec<Body> = said.all().collect();
        assert!(matches!(&again[..], [Body::Notice(Notice { time_left_ms: ..=20_000, .. })]), "{again:?}");
    }
}
