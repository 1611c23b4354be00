//! The TCP transport: one connection per pair of ranks, authenticated per generation.
//!
//! A thread per peer reads and never waits for anyone, so writes always drain; the training thread
//! writes by itself. The higher rank of a pair dials.

use super::frame::{FrameKey, ReadError};
use super::handshake::{self, Introduction, Keys};
use super::mailbox::Mailbox;
use super::{Collective, CollectiveError, Kind, Tag};
use parking_lot::Mutex;
use socket2::{SockRef, TcpKeepalive};
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
const WRITE_LIMIT: Duration = Duration::from_secs(60);
/// An idle peer is probed so often. Kernels answer, however busy their processes are.
const PROBE_EVERY: Duration = Duration::from_secs(1);
const PROBES: u32 = 4;
/// A peer whose machine is gone acknowledges neither probes nor what was sent: it counts as lost after so long, which is
/// four probes, or four repetitions of what was sent.
const UNACKNOWLEDGED_LIMIT: Duration = Duration::from_secs(4);
const DIAL_PAUSE: Duration = Duration::from_millis(100);
/// Handshakes at a time; more are turned away, and their diallers try again.
const HANDSHAKES: usize = 64;

/// The listening socket of this process, which outlives generations.
#[derive(Debug)]
pub struct Network {
    forming: Arc<Mutex<Option<Forming>>>,
    address: SocketAddr,
}

/// The generation that is being connected: whom to let in.
#[derive(Debug)]
struct Forming {
    generation: u64,
    rank: u32,
    world: u32,
    key: [u8; 32],
    arrived: mpsc::Sender<(u32, TcpStream, Keys)>,
}

/// One generation, as the coordinator described it.
#[derive(Clone, Debug)]
pub struct Membership {
    pub generation: u64,
    pub rank: usize,
    /// In rank order, this rank included.
    pub members: Vec<Peer>,
    pub key: [u8; 32],
}

#[derive(Clone, Debug)]
pub struct Peer {
    /// For messages: the pod's name.
    pub name: String,
    /// "host:port".
    pub address: String,
}

impl Network {
    /// Listens until the process ends.
    pub fn listen(address: &str) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let network = Self { address: listener.local_addr()?, forming: Arc::default() };
        let forming = network.forming.clone();
        std::thread::Builder::new().name("accept".to_owned()).spawn(move || accept_all(&listener, &forming))?;
        Ok(network)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

fn accept_all(listener: &TcpListener, forming: &Arc<Mutex<Option<Forming>>>) {
    let running = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming().flatten() {
        if running.fetch_add(1, Ordering::Relaxed) >= HANDSHAKES {
            running.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (forming, running) = (forming.clone(), running.clone());
        std::thread::spawn(move || {
            if let Err(error) = admit(stream, &forming) {
                tracing::debug!(%error, "connection turned away");
            }
            running.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// Lets a higher rank of the forming generation in.
fn admit(mut stream: TcpStream, forming: &Mutex<Option<Forming>>) -> Result<(), handshake::HandshakeError> {
    limit_handshake(&stream)?;
    let expected = |forming: &Forming, who: Introduction| {
        forming.generation == who.generation
            && forming.rank == who.to
            && (forming.rank + 1..forming.world).contains(&who.from)
    };
    let key_for = |who| forming.lock().as_ref().filter(|f| expected(f, who)).map(|f| f.key);
    let (who, keys) = handshake::accept(&mut stream, key_for)?;
    if let Some(forming) = forming.lock().as_ref().filter(|f| expected(f, who)) {
        // Nobody listens any more: the generation was given up, and the stream closes.
        drop(forming.arrived.send((who.from, stream, keys)));
    }
    Ok(())
}

fn limit_handshake(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(HANDSHAKE_LIMIT))?;
    stream.set_write_timeout(Some(HANDSHAKE_LIMIT))
}

/// Connections to all peers.
#[derive(Debug)]
pub struct Mesh {
    inner: Arc<Inner>,
    rank: usize,
    watch: CancellationToken,
}

#[derive(Debug)]
struct Inner {
    /// By rank; `None` for this one.
    links: Vec<Option<Link>>,
    names: Vec<String>,
    mailbox: Mailbox,
}

#[derive(Debug)]
struct Link {
    stream: TcpStream,
    /// Held while one frame is written.
    send: Mutex<FrameKey>,
}

impl Mesh {
    /// Connects to every other member, trying until `patience` is over or `abort` is called, which
    /// later ends the mesh too. At most `unread_limit_bytes` may wait to be received.
    pub fn connect(
        network: &Network,
        membership: &Membership,
        unread_limit_bytes: usize,
        patience: Duration,
        abort: &CancellationToken,
    ) -> Result<Self, CollectiveError> {
        let deadline = Instant::now() + patience;
        let (arrived, arrivals) = mpsc::channel();
        *network.forming.lock() = Some(Forming {
            generation: membership.generation,
            rank: membership.rank as u32,
            world: membership.members.len() as u32,
            key: membership.key,
            arrived,
        });
        let connected = connect_all(membership, &arrivals, deadline, abort);
        *network.forming.lock() = None;
        let mesh = Self::start(membership, connected?, unread_limit_bytes)?;
        mesh.end_on(abort);
        Ok(mesh)
    }

    fn start(
        membership: &Membership,
        connected: Vec<Option<(TcpStream, Keys)>>,
        unread_limit_bytes: usize,
    ) -> Result<Self, CollectiveError> {
        let names: Vec<String> = membership.members.iter().map(|peer| peer.name.clone()).collect();
        let mut links = Vec::new();
        let mut readers = Vec::new();
        for (rank, connection) in connected.into_iter().enumerate() {
            let Some((stream, keys)) = connection else {
                links.push(None);
                continue;
            };
            let failed =
                |error: io::Error| CollectiveError::Connect { peer: names[rank].clone(), detail: error.to_string() };
            stream.set_read_timeout(None).map_err(failed)?;
            stream.set_write_timeout(Some(WRITE_LIMIT)).map_err(failed)?;
            notice_silence(&stream).map_err(failed)?;
            readers.push((rank, stream.try_clone().map_err(failed)?, keys.receive));
            links.push(Some(Link { stream, send: Mutex::new(keys.send) }));
        }
        let mailbox = Mailbox::new(unread_limit_bytes);
        let inner = Arc::new(Inner { links, names, mailbox });
        for (rank, stream, key) in readers {
            let inner = inner.clone();
            std::thread::spawn(move || inner.read_all(rank, stream, key));
        }
        Ok(Self { inner, rank: membership.rank, watch: CancellationToken::new() })
    }

    /// A thread that closes the connections on `abort`, so that a blocked write ends at once.
    fn end_on(&self, abort: &CancellationToken) {
        let (abort, watch) = (abort.clone(), self.watch.clone());
        let inner = Arc::downgrade(&self.inner);
        std::thread::spawn(move || {
            futures::executor::block_on(async {
                let ended = std::pin::pin!(abort.cancelled());
                let dropped = std::pin::pin!(watch.cancelled());
                futures::future::select(ended, dropped).await;
            });
            if let Some(inner) = inner.upgrade().filter(|_| abort.is_cancelled()) {
                inner.mailbox.fail(CollectiveError::Aborted);
                inner.close();
            }
        });
    }

    /// Leaves in peace: peers that need nothing more from this rank do not take it for lost.
    pub fn leave(&self) {
        // A peer that is gone already misses nothing.
        drop(self.broadcast(Tag::new(Kind::Bye, 0), &[]));
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.watch.cancel();
        self.inner.close();
    }
}

impl Inner {
    fn close(&self) {
        for link in self.links.iter().flatten() {
            // It may be closed already, which is what is wanted.
            drop(link.stream.shutdown(Shutdown::Both));
        }
    }

    /// Reads one connection to its end.
    fn read_all(&self, from: usize, stream: TcpStream, mut key: FrameKey) {
        let mut stream = io::BufReader::with_capacity(1 << 16, stream);
        let peer = || self.names[from].clone();
        let fault = loop {
            let (tag, payload) = match key.read(&mut stream) {
                Ok(frame) => frame,
                Err(ReadError::Io(error)) => {
                    break CollectiveError::Lost { peer: peer(), detail: error.to_string() };
                }
                Err(ReadError::Forged) => break CollectiveError::Forged { peer: peer() },
                Err(ReadError::Malformed(detail)) => {
                    break CollectiveError::Protocol { peer: peer(), detail: detail.to_owned() };
                }
            };
            if let Err(detail) = self.mailbox.deliver(from, tag, payload) {
                break CollectiveError::Protocol { peer: peer(), detail: detail.to_owned() };
            }
        };
        if !self.mailbox.has_left(from) {
            self.mailbox.fail(fault);
        }
    }
}

impl Collective for Mesh {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.inner.links.len()
    }

    fn send(&self, to: usize, tag: Tag, payload: &[u8]) -> Result<(), CollectiveError> {
        let Some(Some(link)) = self.inner.links.get(to) else {
            let detail = "there is no connection to it".to_owned();
            return Err(CollectiveError::Lost { peer: format!("rank {to}"), detail });
        };
        let written = link.send.lock().write(&mut &link.stream, tag, payload);
        written.map_err(|error| {
            self.inner
                .mailbox
                .fail(CollectiveError::Lost { peer: self.inner.names[to].clone(), detail: error.to_string() });
            self.inner.mailbox.fault().unwrap_or(CollectiveError::Aborted)
        })
    }

    fn receive(&self, from: usize, tag: Tag, cancel: &CancellationToken) -> Result<Vec<u8>, CollectiveError> {
        let peer = self.inner.names.get(from).map_or("nobody", String::as_str);
        self.inner.mailbox.take(from, tag, peer, cancel)
    }
}

/// A node that is switched off or cut away closes nothing: the kernel has to find out.
fn notice_silence(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    let probes = TcpKeepalive::new().with_time(PROBE_EVERY).with_interval(PROBE_EVERY).with_retries(PROBES);
    socket.set_tcp_keepalive(&probes)?;
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_LIMIT))
}

type Connection = Option<(TcpStream, Keys)>;

fn connect_all(
    membership: &Membership,
    arrivals: &mpsc::Receiver<(u32, TcpStream, Keys)>,
    deadline: Instant,
    abort: &CancellationToken,
) -> Result<Vec<Connection>, CollectiveError> {
    let world = membership.members.len();
    let mut connections: Vec<Connection> = (0..world).map(|_| None).collect();
    for (rank, connection) in connections.iter_mut().enumerate().take(membership.rank) {
        *connection = Some(dial(membership, rank, deadline, abort)?);
    }
    while let Some(missing) = (membership.rank + 1..world).find(|rank| connections[*rank].is_none()) {
        check(abort)?;
        if Instant::now() > deadline {
            return Err(CollectiveError::Connect {
                peer: membership.members[missing].name.clone(),
                detail: "it does not connect to this rank".to_owned(),
            });
        }
        if let Ok((from, stream, keys)) = arrivals.recv_timeout(DIAL_PAUSE) {
            connections[from as usize] = Some((stream, keys));
        }
    }
    Ok(connections)
}

fn check(abort: &CancellationToken) -> Result<(), CollectiveError> {
    if abort.is_cancelled() { Err(CollectiveError::Aborted) } else { Ok(()) }
}

/// Dials until it works: the peer may hear of the generation later than this rank.
fn dial(
    membership: &Membership,
    to: usize,
    deadline: Instant,
    abort: &CancellationToken,
) -> Result<(TcpStream, Keys), CollectiveError> {
    let peer = &membership.members[to];
    loop {
        check(abort)?;
        let error = match dial_once(membership, to) {
            Ok(connection) => return Ok(connection),
            Err(error) => error,
        };
        tracing::debug!(peer = peer.name, %error, "dialling again");
        if Instant::now() > deadline {
            return Err(CollectiveError::Connect { peer: peer.name.clone(), detail: error.to_string() });
        }
        std::thread::sleep(DIAL_PAUSE);
    }
}

fn dial_once(membership: &Membership, to: usize) -> Result<(TcpStream, Keys), handshake::HandshakeError> {
    let mut addresses = membership.members[to].address.to_socket_addrs()?;
    let address = addresses.next().ok_or(io::Error::from(io::ErrorKind::AddrNotAvailable))?;
    let mut stream = TcpStream::connect_timeout(&address, HANDSHAKE_LIMIT)?;
    limit_handshake(&stream)?;
    let who = Introduction { generation: membership.generation, from: membership.rank as u32, to: to as u32 };
    let keys = handshake::dial(&mut stream, &membership.key, who)?;
    Ok((stream, keys))
}
