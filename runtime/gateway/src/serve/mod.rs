//! Listeners: TCP or TLS, HTTP/1 and HTTP/2, with a bound on everything that a client may hold.

pub mod certificates;
mod stall;
pub mod watched;

use axum::Router;
use hyper::body::Incoming;
use hyper::service::Service;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use stall::Stalling;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use vicuna_protocol::open_files;

const HTTP2: &[u8] = b"h2";
/// Request line and headers; far more than any of the known clients sends.
const MAX_HEADERS: usize = 100;
const MAX_HEADER_BYTES: u32 = 64 << 10;
/// Requests at a time on one connection of HTTP/2.
const MAX_STREAMS: u32 = 256;
/// What one stream of HTTP/2 holds for a peer that does not read.
const MAX_SEND_BUFFER: usize = 64 << 10;
/// What a connection of HTTP/1 holds in each direction.
const MAX_BUFFER: usize = 128 << 10;
/// After the process ran out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How a listener treats its clients.
#[derive(Clone)]
pub struct Terms {
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// Connections at a time; others wait in the kernel's queue.
    pub max_connections: usize,
    /// For a TLS handshake and for each request's headers; so long a connection may also be idle.
    pub header_timeout: Duration,
    /// How long a client may read nothing of what is sent to it.
    pub write_timeout: Duration,
    /// Between two signs of life on HTTP/2.
    pub keep_alive: Duration,
}

/// Serves until `stop`, and then until the last request has ended.
pub async fn serve(listener: TcpListener, router: Router, terms: Terms, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(terms.max_connections.min(open_files::connections())));
    let terms = Arc::new(terms);
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &places) => accepted,
            () = stop.cancelled() => break,
        };
        let Some((stream, place)) = accepted else {
            return;
        };
        let (router, terms, watcher) = (router.clone(), terms.clone(), graceful.watcher());
        tokio::spawn(async move {
            if let Err(error) = connection(stream, router, &terms, watcher).await {
                tracing::debug!(error, "a connection broke off");
            }
            drop(place);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

/// The next connection, once there is a place for it.
async fn accept(listener: &TcpListener, places: &Arc<Semaphore>) -> Option<(TcpStream, OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.ok()?;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return Some((stream, place)),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection; trying on");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Who sent a request, as far as the network says: of those behind a proxy it is the proxy.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub IpAddr);

/// Tells each request of a connection who sent it.
#[derive(Clone)]
struct Addressed {
    router: TowerToHyperService<Router>,
    peer: Peer,
}

impl Service<hyper::Request<Incoming>> for Addressed {
    type Response = <TowerToHyperService<Router> as Service<hyper::Request<Incoming>>>::Response;
    type Error = <TowerToHyperService<Router> as Service<hyper::Request<Incoming>>>::Error;
    type Future = <TowerToHyperService<Router> as Service<hyper::Request<Incoming>>>::Future;

    fn call(&self, mut request: hyper::Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(self.peer);
        self.router.call(request)
    }
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

async fn connection(stream: TcpStream, router: Router, terms: &Terms, watcher: Watcher) -> Result<(), BoxError> {
    stream.set_nodelay(true)?;
    let router = Addressed { router: TowerToHyperService::new(router), peer: Peer(stream.peer_addr()?.ip()) };
    match &terms.tls {
        None => {
            let http2 = timeout(terms.header_timeout, begins_http2(&stream)).await??;
            exchange(stream, http2, router, terms, watcher).await
        }
        Some(tls) => {
            let stream = timeout(terms.header_timeout, TlsAcceptor::from(tls.clone()).accept(stream)).await??;
            let http2 = stream.get_ref().1.alpn_protocol() == Some(HTTP2);
            exchange(stream, http2, router, terms, watcher).await
        }
    }
}

/// Whether the client speaks HTTP/2 at once, as RFC 9113 (3.3) allows: no method of HTTP/1 begins so.
async fn begins_http2(stream: &TcpStream) -> io::Result<bool> {
    const PREFACE: &[u8] = b"PRI ";
    let mut bytes = [0; PREFACE.len()];
    loop {
        let count = stream.peek(&mut bytes).await?;
        if count == 0 || bytes[..count] != PREFACE[..count] {
            return Ok(false);
        }
        if count == PREFACE.len() {
            return Ok(true);
        }
        // What has been looked at is still there, so that waiting for it would not wait.
        sleep(Duration::from_millis(10)).await;
    }
}

async fn exchange<S>(stream: S, http2: bool, router: Addressed, terms: &Terms, watcher: Watcher) -> Result<(), BoxError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let stream = TokioIo::new(Stalling::new(stream, terms.write_timeout));
    let builder = builder(http2, terms);
    let exchange = builder.serve_connection(stream, router);
    watcher.watch(exchange.into_owned()).await
}

fn builder(http2: bool, terms: &Terms) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(terms.header_timeout)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_BUFFER);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(terms.keep_alive)
        .keep_alive_timeout(terms.keep_alive)
        .max_concurrent_streams(MAX_STREAMS)
        .max_send_buf_size(MAX_SEND_BUFFER)
        .max_header_list_size(MAX_HEADER_BYTES);
    match http2 {
        true => builder.http2_only(),
        false => builder.http1_only(),
    }
}
