//! The way from an operator's process to the API server, and what befalls on it: requests and answers that are late,
//! refused or lost, watches that lag or break, and a process that dies at a write.

use super::watchdog::Watchdog;
use bytes::Bytes;
use futures::{StreamExt, stream};
use http::{Method, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, StreamBody};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::{Instant, sleep};
use vicuna_tests::api_server::{ApiServer, Refusal};

/// A client hears of a connection that leads nowhere after so long.
const NO_ANSWER: Duration = Duration::from_secs(3);

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// One life of an operator's process: it can write as long as it lasts, and reach the API server unless it is cut off.
#[derive(Clone)]
pub struct Life {
    /// As its lease names it.
    pub holder: String,
    over: Arc<AtomicBool>,
    cut_until: Arc<Mutex<Option<Instant>>>,
}

impl Life {
    pub fn new(holder: String) -> Self {
        Self { holder, over: Arc::default(), cut_until: Arc::default() }
    }

    /// Nothing of it is heard any more.
    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    pub fn cut_off(&self, until: Instant) {
        *self.cut_until.lock() = Some(until);
    }

    fn is_cut_off(&self) -> bool {
        self.cut_until.lock().is_some_and(|until| Instant::now() < until)
    }

    /// Goes on only in a process that lives.
    async fn goes_on(&self) {
        if self.is_over() {
            std::future::pending::<()>().await;
        }
    }
}

/// What befalls all requests, drawn from the seed.
#[derive(Clone)]
pub struct Network(Arc<Mutex<Draws>>);

struct Draws {
    random: StdRng,
    trouble: bool,
    /// Writes until one at which the process dies, and whether it is done before that.
    dies_at: Option<(u64, bool)>,
}

enum Fate {
    Done,
    /// Its answer is lost.
    Unheard,
    Lost,
    Refused(u16),
    Dies {
        done: bool,
    },
}

enum Lag {
    For(Duration),
    Broken,
}

impl Network {
    /// `dies_at`: the write at which the first process dies, and whether after it.
    pub fn new(seed: u64, dies_at: Option<(u64, bool)>) -> Self {
        let random = StdRng::seed_from_u64(seed ^ 0x6e65_7477_6f72_6b00);
        Self(Arc::new(Mutex::new(Draws { random, trouble: false, dies_at })))
    }

    pub fn set_trouble(&self, trouble: bool) {
        let mut draws = self.0.lock();
        draws.trouble = trouble;
        if !trouble {
            draws.dies_at = None;
        }
    }

    /// For how long a request is under way, what becomes of it, and for how long its answer is.
    fn draw(&self, write: bool) -> (Duration, Fate, Duration) {
        let mut draws = self.0.lock();
        let there = draws.delay();
        let fate = draws.fate(write);
        (there, fate, draws.delay())
    }

    fn lag(&self) -> Lag {
        let mut draws = self.0.lock();
        match draws.random.random_range(0..1000) {
            0..8 if draws.trouble => Lag::Broken,
            8..40 if draws.trouble => Lag::For(Duration::from_millis(draws.random.random_range(500..8_000))),
            _ => Lag::For(Duration::from_millis(draws.random.random_range(1..40))),
        }
    }
}

impl Draws {
    fn delay(&mut self) -> Duration {
        let late = self.trouble && self.random.random_range(0..100) < 2;
        Duration::from_millis(if late { self.random.random_range(200..2_000) } else { self.random.random_range(1..20) })
    }

    fn fate(&mut self, write: bool) -> Fate {
        if !self.trouble {
            return Fate::Done;
        }
        if let Some((left, done)) = self.dies_at.filter(|_| write) {
            self.dies_at = left.checked_sub(1).map(|left| (left, done));
            if left == 0 {
                return Fate::Dies { done };
            }
        }
        match self.random.random_range(0..1000) {
            0..15 => Fate::Unheard,
            15..25 => Fate::Lost,
            25..35 => Fate::Refused(500),
            35..42 => Fate::Refused(429),
            42..50 => Fate::Refused(504),
            50..52 if write => Fate::Dies { done: self.random.random_bool(0.5) },
            _ => Fate::Done,
        }
    }
}

/// The API server as one life of a process sees it.
#[derive(Clone)]
pub struct Link {
    pub server: ApiServer,
    pub network: Network,
    pub life: Life,
    pub watchdog: Watchdog,
}

impl Link {
    pub fn client(self) -> kube::Client {
        let service = tower::service_fn(move |request| self.clone().pass(request));
        kube::Client::new(service, "default")
    }

    async fn pass(self, request: Request<kube::client::Body>) -> io::Result<Response<Body>> {
        self.life.goes_on().await;
        let write = request.method() != Method::GET;
        let watch = request.uri().query().is_some_and(|query| query.contains("watch=true"));
        if write && !request.uri().path().contains("/leases") {
            self.watchdog.is_written_by(&self.server.store(), &self.life.holder);
        }
        let (there, fate, back) = self.network.draw(write);
        sleep(there).await;
        if self.life.is_cut_off() {
            return self.no_answer().await;
        }
        // What a process that died had sent may still arrive.
        match fate {
            Fate::Done => {}
            Fate::Refused(code) => {
                self.life.goes_on().await;
                return Ok(body(Refusal::new(code, reason(code), "simulated").response()));
            }
            Fate::Lost => return self.no_answer().await,
            Fate::Unheard => {
                drop(self.carry_out(request, write).await);
                return self.no_answer().await;
            }
            Fate::Dies { done } => {
                if done {
                    drop(self.carry_out(request, write).await);
                }
                self.life.end();
                return self.no_answer().await;
            }
        }
        self.life.goes_on().await;
        let response = self.carry_out(request, write).await;
        sleep(back).await;
        self.life.goes_on().await;
        Ok(if watch { self.lagging(response) } else { body(response) })
    }

    async fn carry_out(
        &self,
        request: Request<kube::client::Body>,
        write: bool,
    ) -> Response<vicuna_tests::api_server::Body> {
        let response = self.server.call(request).await;
        if write {
            self.watchdog.look(&self.server.store());
        }
        response
    }

    async fn no_answer(&self) -> io::Result<Response<Body>> {
        sleep(NO_ANSWER).await;
        self.life.goes_on().await;
        Err(io::Error::new(io::ErrorKind::TimedOut, "no answer"))
    }

    /// A watch whose events come late, in order, until it breaks.
    fn lagging(self, response: Response<vicuna_tests::api_server::Body>) -> Response<Body> {
        let (parts, events) = response.into_parts();
        let late = stream::unfold(Some((events, self)), |state| async {
            let (mut events, link) = state?;
            let event = events.frame().await?;
            let broken = match link.network.lag() {
                Lag::For(late) => {
                    sleep(late).await;
                    link.life.is_cut_off()
                }
                Lag::Broken => true,
            };
            link.life.goes_on().await;
            if broken {
                return Some((Err(io::Error::new(io::ErrorKind::ConnectionReset, "the watch broke")), None));
            }
            Some((event.map_err(|never| match never {}), Some((events, link))))
        });
        Response::from_parts(parts, BodyExt::boxed_unsync(StreamBody::new(late.boxed())))
    }
}

fn body(response: Response<vicuna_tests::api_server::Body>) -> Response<Body> {
    response.map(|body| body.map_err(|never| match never {}).boxed_unsync())
}

fn reason(code: u16) -> &'static str {
    match code {
        429 => "TooManyRequests",
        504 => "Timeout",
        _ => "InternalError",
    }
}
