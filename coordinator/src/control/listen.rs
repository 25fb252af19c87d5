//! Connections: accepted within limits, with TLS where it is spoken, and each with what is known of its peer.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tonic::transport::server::Connected;
use tunefleet_proto::dial::chain;

use super::guard::Guard;
use super::tls::Certificate;

/// Connections at once, and of one address.
const MAX_CONNECTIONS: usize = 8192;
const MAX_PER_ADDRESS: usize = 4096;
/// How long a peer may take over its handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Connections that are ready and not served yet.
const WINDOW: usize = 64;
/// Until accepting is tried again when there are no descriptors left.
const TRY_AGAIN: Duration = Duration::from_millis(100);

/// Who is at the other end.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// The certificate that it has shown, and whose signature is right.
    pub certificate: Option<Arc<Certificate>>,
}

trait Io: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Io for T {}

/// A connection that is ready to be served.
pub struct Connection {
    io: Pin<Box<dyn Io>>,
    peer: Peer,
    _seat: Seat,
}

impl Connection {
    fn new(io: Pin<Box<dyn Io>>, peer: Peer, seat: Seat) -> Self {
        Connection { io, peer, _seat: seat }
    }

    /// One that nobody has accepted.
    #[cfg(test)]
    pub fn of(io: impl AsyncRead + AsyncWrite + Send + 'static, address: SocketAddr) -> Self {
        let seat = Seat { seats: Arc::default(), address: address.ip() };
        Connection::new(Box::pin(io), Peer { address, certificate: None }, seat)
    }
}

/// How many connections there are.
#[derive(Default)]
struct Seats {
    taken: Mutex<HashMap<IpAddr, usize>>,
}

/// One of them, given back when it is dropped.
struct Seat {
    seats: Arc<Seats>,
    address: IpAddr,
}

impl Seats {
    fn take(self: &Arc<Self>, address: IpAddr) -> Option<Seat> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = taken.values().sum();
        let of_address = taken.get(&address).copied().unwrap_or(0);
        if all >= MAX_CONNECTIONS || of_address >= MAX_PER_ADDRESS {
            return None;
        }
        taken.insert(address, of_address + 1);
        Some(Seat { seats: Arc::clone(self), address })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.seats.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.address);
            }
        }
    }
}

/// Accepts connections until the receiver is dropped.
pub fn connections(
    listener: TcpListener,
    tls: Option<watch::Receiver<Arc<ServerConfig>>>,
    guard: Guard,
) -> mpsc::Receiver<io::Result<Connection>> {
    let (ready, connections) = mpsc::channel(WINDOW);
    tokio::spawn(async move {
        let seats = Arc::new(Seats::default());
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = ready.closed() => return,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!("accepting a connection: {error}");
                    tokio::time::sleep(TRY_AGAIN).await;
                    continue;
                }
            };
            let Some(seat) = seats.take(address.ip()) else {
                guard.refused(address, "connect", "too many connections");
                continue;
            };
            let _ = stream.set_nodelay(true);
            let config = tls.as_ref().map(|tls| Arc::clone(&tls.borrow()));
            let (ready, guard) = (ready.clone(), guard.clone());
            // A peer that is slow over its handshake holds nobody up.
            tokio::spawn(async move {
                if let Some((io, certificate)) = shake_hands(stream, config, address, &guard).await {
                    let peer = Peer { address, certificate };
                    let _ = ready.send(Ok(Connection::new(io, peer, seat))).await;
                }
            });
        }
    });
    connections
}

type Shaken = (Pin<Box<dyn Io>>, Option<Arc<Certificate>>);

async fn shake_hands(
    stream: TcpStream,
    config: Option<Arc<ServerConfig>>,
    address: SocketAddr,
    guard: &Guard,
) -> Option<Shaken> {
    let Some(config) = config else { return Some((Box::pin(stream), None)) };
    let stream = match tokio::time::timeout(HANDSHAKE_LIMIT, TlsAcceptor::from(config).accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            guard.refused(address, "connect", &format!("TLS: {}", chain(&error)));
            return None;
        }
        Err(_) => {
            guard.refused(address, "connect", "TLS: no handshake in time");
            return None;
        }
    };
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let certificate = match shown.map(Certificate::read) {
        None => None,
        Some(Ok(certificate)) => Some(Arc::new(certificate)),
        Some(Err(cause)) => {
            guard.refused(address, "connect", &format!("a certificate that cannot be read: {cause}"));
            return None;
        }
    };
    Some((Box::pin(stream), certificate))
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.io.as_mut().poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.io.as_mut().poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.io.as_mut().poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io.as_mut().poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io.as_mut().poll_shutdown(context)
    }
}
