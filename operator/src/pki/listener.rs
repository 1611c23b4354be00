//! TLS connections to the coordinator. The certificate may be exchanged while it is served: connections that are there
//! stay, new ones are shown the new one.

use super::PkiError;
use super::authority::Identity;
use futures::Stream;
use parking_lot::RwLock;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use vicuna_protocol::open_files;

const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);
/// Callers speak first. Who says nothing for so long waits elsewhere than in the way of those who do,
const SPEAKS_WITHIN: Duration = Duration::from_millis(100);
/// with so many others; one more is sent away.
const SILENT: usize = 1024;
/// Handshakes at a time; further callers wait in the kernel's queue, and who finds no room there calls again, later and later.
/// Both are short, so that who is let in is answered before it gives up: callers wait for 5 s. With long ones a storm of
/// callers is answered when they are gone already, for ever.
const HANDSHAKES: usize = 32;
const QUEUE: u32 = 128;
/// After an error of the listener itself, as when no file descriptor is left.
const PAUSE: Duration = Duration::from_millis(100);
const FULL: &str = "no more connections can be held: raise the limit of open files of the container runtime (LimitNOFILE); \
    callers wait until one of the others goes";

/// The certificate that a server shows. Cheap to clone; all clones show the same.
#[derive(Clone, Debug)]
pub struct Shown(Arc<RwLock<Arc<CertifiedKey>>>);

impl Shown {
    pub fn new(identity: &Identity) -> Result<Self, PkiError> {
        Ok(Self(Arc::new(RwLock::new(certified(identity)?))))
    }

    /// From now on new connections are shown this one.
    pub fn exchange(&self, identity: &Identity) -> Result<(), PkiError> {
        *self.0.write() = certified(identity)?;
        Ok(())
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.read().clone())
    }
}

fn certified(identity: &Identity) -> Result<Arc<CertifiedKey>, PkiError> {
    let unreadable = |error: rustls::pki_types::pem::Error| PkiError::UnreadableCertificate(error.to_string());
    let chain = CertificateDer::pem_slice_iter(identity.certificate.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(unreadable)?;
    let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).map_err(unreadable)?;
    Ok(Arc::new(CertifiedKey::from_der(chain, key, &rustls::crypto::aws_lc_rs::default_provider())?))
}

/// A listener for [`connections`].
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(QUEUE)
}

/// Connections that have shaken hands, until the receiver is dropped. One that does not come to that is nobody's
/// concern but its own.
pub fn connections(
    listener: TcpListener,
    shown: Shown,
) -> Result<impl Stream<Item = io::Result<Connection>> + Send, PkiError> {
    let (ready, connections) = mpsc::channel(HANDSHAKES);
    let door = Door {
        acceptor: acceptor(shown)?,
        ready,
        handshakes: Arc::new(Semaphore::new(HANDSHAKES)),
        silent: Arc::new(Semaphore::new(SILENT)),
    };
    tokio::spawn(accept(listener, door));
    Ok(ReceiverStream::new(connections))
}

fn acceptor(shown: Shown) -> Result<TlsAcceptor, PkiError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(shown));
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// A connection that has shaken hands, and its place among those that may be open.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    _place: OwnedSemaphorePermit,
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for Connection {
    type ConnectInfo = <TlsStream<TcpStream> as Connected>::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

#[derive(Clone)]
struct Door {
    acceptor: TlsAcceptor,
    ready: mpsc::Sender<io::Result<Connection>>,
    handshakes: Arc<Semaphore>,
    silent: Arc<Semaphore>,
}

async fn accept(listener: TcpListener, door: Door) {
    let limit = open_files::connections().min(Semaphore::MAX_PERMITS);
    let places = Arc::new(Semaphore::new(limit));
    loop {
        let place = match places.clone().try_acquire_owned() {
            Ok(place) => Some(place),
            Err(_) => {
                tracing::warn!(limit, "{FULL}");
                tokio::select! {
                    place = places.clone().acquire_owned() => place.ok(),
                    () = door.ready.closed() => None,
                }
            }
        };
        let (Some(place), Ok(handshake)) = (place, door.handshakes.clone().acquire_owned().await) else { return };
        let stream = tokio::select! {
            accepted = listener.accept() => accepted,
            () = door.ready.closed() => return,
        };
        match stream {
            Ok((stream, _)) => drop(tokio::spawn(door.clone().let_in(stream, place, handshake))),
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

impl Door {
    async fn let_in(self, stream: TcpStream, place: OwnedSemaphorePermit, handshake: OwnedSemaphorePermit) {
        let shaken = tokio::time::timeout(HANDSHAKE_WITHIN, self.shake_hands(stream, handshake)).await;
        match shaken {
            // The receiver is gone when the server stops.
            Ok(Ok(stream)) => drop(self.ready.send(Ok(Connection { stream, _place: place })).await),
            Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
            Err(_) => tracing::debug!("a TLS handshake took too long"),
        }
    }

    async fn shake_hands(
        &self,
        stream: TcpStream,
        handshake: OwnedSemaphorePermit,
    ) -> io::Result<TlsStream<TcpStream>> {
        stream.set_nodelay(true)?;
        // A socket may be called readable though nothing is there.
        let (mut handshake, mut first) = (Some(handshake), [0]);
        if tokio::time::timeout(SPEAKS_WITHIN, stream.peek(&mut first)).await.is_err() {
            handshake = None;
            let _waits = self.silent.try_acquire().map_err(|_| io::Error::other("too many callers say nothing"))?;
            stream.peek(&mut first).await?;
        }
        let _handshake = match handshake {
            Some(handshake) => handshake,
            None => self.handshakes.clone().acquire_owned().await.map_err(io::Error::other)?,
        };
        self.acceptor.accept(stream).await
    }
}

#[cfg(test)]
mod tests {
    use super::super::authority::Authority;
    use super::*;
    use futures::StreamExt;
    use rustls::pki_types::ServerName;
    use time::OffsetDateTime;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn authority() -> Authority {
        Authority::generate(OffsetDateTime::now_utc()).unwrap()
    }

    fn leaf(authority: &Authority) -> Identity {
        authority.issue(&["vicuna-operator"], 1, OffsetDateTime::now_utc()).unwrap()
    }

    async fn dial(
        address: std::net::SocketAddr,
        trusted: &Authority,
    ) -> io::Result<impl AsyncWriteExt + AsyncReadExt + Unpin> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(trusted.certificate().as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::try_from("vicuna-operator").unwrap();
        tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await
    }

    #[tokio::test]
    async fn a_certificate_is_exchanged_under_connections_that_stay() {
        let (old, new) = (authority(), authority());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shown = Shown::new(&leaf(&old)).unwrap();
        let mut incoming = std::pin::pin!(connections(listener, shown.clone()).unwrap());
        let mut first = dial(address, &old).await.unwrap();
        let mut served = incoming.next().await.unwrap().unwrap();
        assert!(dial(address, &new).await.is_err(), "the new CA has signed nothing yet");

        shown.exchange(&leaf(&new)).unwrap();
        assert!(dial(address, &new).await.is_ok());
        assert!(dial(address, &old).await.is_err(), "new connections are shown the new certificate");
        first.write_all(b"still here").await.unwrap();
        let mut heard = [0; 10];
        served.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"still here");
    }

    #[tokio::test]
    async fn a_caller_who_does_not_speak_tls_keeps_nobody_out() {
        let authority = authority();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let _incoming = connections(listener, Shown::new(&leaf(&authority)).unwrap()).unwrap();
        let mut stranger = TcpStream::connect(address).await.unwrap();
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut silent = Vec::new();
        for _ in 0..2 * HANDSHAKES {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let dialled = tokio::time::timeout(HANDSHAKE_WITHIN / 2, dial(address, &authority)).await;
        assert!(dialled.expect("those who say nothing are in the way").is_ok());
    }
}
