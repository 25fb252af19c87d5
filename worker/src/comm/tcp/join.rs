//! From addresses to a full mesh of links: each rank listens for the ranks above it and connects
//! to those below.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};

use super::handshake::{self, Identity, Refused};
use super::link::SEND_CHECK;
use crate::comm::Error;

/// A connection that has not proved itself by then is closed.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(3);
/// Unproven connections held at once; above it the oldest is closed.
const MAX_UNPROVEN: usize = 64;
/// How often the accept loop looks whether it is still needed.
const ACCEPT_CHECK: Duration = Duration::from_millis(20);
/// Pause before another try to connect.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Longest wait for one connection attempt.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// The outcome of a thread that looks for a peer.
type Found = (u32, Result<TcpStream, String>);

/// One stream per peer, in rank order; `None` at this rank's own place.
///
/// # Errors
/// [`Error::Join`] names the ranks that are missing at the deadline.
pub fn mesh(
    listener: TcpListener,
    me: &Identity,
    peers: &[SocketAddr],
    deadline: Instant,
) -> Result<Vec<Option<TcpStream>>, Error> {
    let (rank, world) = (me.rank.rank, me.rank.world);
    let mut streams: Vec<Option<TcpStream>> = (0..world).map(|_| None).collect();
    let mut failures: Vec<String> = Vec::new();
    let (found, results) = mpsc::channel::<Found>();
    let (stop, stopped) = mpsc::channel::<()>();
    thread::scope(|scope| {
        if rank + 1 < world {
            let found = found.clone();
            scope.spawn(move || accept_loop(&listener, me, deadline, &found, &stopped));
        }
        for (to, &address) in (0..rank).zip(peers) {
            let found = found.clone();
            scope.spawn(move || {
                // Without the receiver the join is over.
                let _ = found.send((to, connect(address, me, to, deadline)));
            });
        }
        drop(found);
        let mut missing = world - 1;
        while missing > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok((peer, result)) = results.recv_timeout(left) else { break };
            match result {
                Ok(stream) => {
                    // A peer that lost the answer to its proof connects again: the newer one holds.
                    if let Some(place) = streams.get_mut(peer as usize)
                        && place.replace(stream).is_none()
                    {
                        missing -= 1;
                    }
                }
                Err(cause) => failures.push(cause),
            }
        }
        drop(stop);
    });
    let missing: Vec<String> = (0..world)
        .zip(&streams)
        .filter(|(peer, stream)| *peer != rank && stream.is_none())
        .map(|(peer, _)| peer.to_string())
        .collect();
    if missing.is_empty() {
        return Ok(streams);
    }
    let causes = if failures.is_empty() { String::new() } else { format!(" ({})", failures.join("; ")) };
    Err(Error::Join(format!("no connection with rank {} within the time limit{causes}", missing.join(", "))))
}

/// Takes connections until `stopped` disconnects. Each proves itself on its own thread: a silent
/// or babbling stranger holds up nobody.
fn accept_loop(
    listener: &TcpListener,
    me: &Identity,
    deadline: Instant,
    found: &Sender<Found>,
    stopped: &mpsc::Receiver<()>,
) {
    // On Linux, this also limits a wait in accept.
    if let Err(e) = SockRef::from(listener).set_read_timeout(Some(ACCEPT_CHECK)) {
        tracing::warn!("cannot accept peers: {e}");
        return;
    }
    let unproven = Unproven::default();
    let (refuse, refused) = mpsc::channel::<(SocketAddr, Refused)>();
    let mut strangers = 0u64;
    thread::scope(|scope| {
        while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) && Instant::now() < deadline {
            for (address, cause) in refused.try_iter() {
                strangers += 1;
                if strangers == 1 {
                    tracing::warn!("refused a connection from {address}: {cause}; more will only be counted");
                }
            }
            let (stream, address) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => continue,
                Err(e) => {
                    // Of this one connection, or out of descriptors: others may still come.
                    tracing::debug!("accepting: {e}");
                    thread::sleep(ACCEPT_CHECK);
                    continue;
                }
            };
            let Ok(handle) = stream.try_clone() else { continue };
            let id = unproven.add(handle);
            let (found, refuse, unproven) = (found.clone(), refuse.clone(), &unproven);
            scope.spawn(move || {
                let mut timed = Timed { stream, deadline: deadline.min(Instant::now() + HANDSHAKE_LIMIT) };
                let accepted = handshake::accept(&mut timed, me);
                unproven.remove(id);
                match accepted {
                    Ok(peer) => drop(found.send((peer, Ok(timed.stream)))),
                    Err(cause) => drop(refuse.send((address, cause))),
                }
            });
        }
        // The scope waits for the handshakes; nobody is left to come.
        unproven.close();
    });
    strangers += refused.try_iter().count() as u64;
    if strangers > 1 {
        tracing::warn!("refused {strangers} connections while the group formed");
    }
}

/// Connections that have not proved themselves yet, oldest first.
#[derive(Default)]
struct Unproven(Mutex<(u64, VecDeque<(u64, TcpStream)>)>);

impl Unproven {
    /// Adds one, closing the oldest when there are too many.
    fn add(&self, stream: TcpStream) -> u64 {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (next, streams) = &mut *held;
        if streams.len() >= MAX_UNPROVEN
            && let Some((_, oldest)) = streams.pop_front()
        {
            let _ = oldest.shutdown(Shutdown::Both);
        }
        *next += 1;
        streams.push_back((*next, stream));
        *next
    }

    fn remove(&self, id: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1.retain(|(held, _)| *held != id);
    }

    /// Closes all.
    fn close(&self) {
        for (_, stream) in self.0.lock().unwrap_or_else(PoisonError::into_inner).1.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Connects to rank `to`, again and again: it may not listen yet.
fn connect(address: SocketAddr, me: &Identity, to: u32, deadline: Instant) -> Result<TcpStream, String> {
    let mut last = "not tried".to_owned();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("rank {to} at {address}: {last}"));
        }
        match TcpStream::connect_timeout(&address, left.min(CONNECT_LIMIT)) {
            Ok(stream) => {
                let mut timed = Timed { stream, deadline: deadline.min(Instant::now() + HANDSHAKE_LIMIT) };
                match handshake::connect(&mut timed, me, to) {
                    Ok(()) => return Ok(timed.stream),
                    Err(cause) => last = cause.to_string(),
                }
            }
            Err(cause) => last = cause.to_string(),
        }
        thread::sleep(RETRY_PAUSE.min(deadline.saturating_duration_since(Instant::now())));
    }
}

/// Makes a proven stream ready for frames.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(Some(SEND_CHECK))?;
    // A peer whose machine vanishes sends no end of file.
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(10)).with_interval(Duration::from_secs(5));
    SockRef::from(stream).set_tcp_keepalive(&keepalive)
}

/// A stream with a deadline for the whole conversation: sending a byte at a time does not help.
struct Timed {
    stream: TcpStream,
    deadline: Instant,
}

impl Timed {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(ErrorKind::TimedOut, "no proof within the time limit"));
        }
        Ok(Some(left))
    }
}

impl Read for Timed {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        match self.stream.read(out) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                Err(io::Error::new(ErrorKind::TimedOut, "no proof within the time limit"))
            }
            other => other,
        }
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
