//! One peer: a thread that sends and a thread that receives, so that both directions always run.
//!
//! The receiver sits in a read between operations as well: a peer that dies is noticed at once.
//! A rank that leaves says so in a last frame, and why: peers then name the rank that was lost
//! and not the one that stopped because of it.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use tch::Tensor;
use tunefleet_kernels::bytes::{bytes, bytes_mut};

use super::frame::{HEADER_BYTES, Header, MAX_REASON_BYTES, Op};
use super::group::{End, Group, Operation};
use crate::comm::Error;

/// How long a send may stand still before the sender looks whether the group has ended.
pub const SEND_CHECK: Duration = Duration::from_millis(100);
/// How long a rank that leaves well waits for its last frames to be taken.
const LINGER: Duration = Duration::from_secs(2);

/// A payload to send or to receive.
pub struct Transfer {
    /// What is sent before it; what is expected.
    pub header: Header,
    /// Contiguous, on the CPU; nobody else touches its elements until it is done.
    pub payload: Option<Tensor>,
    /// What it is part of.
    pub operation: Arc<Operation>,
}

/// Body of the sending thread.
pub fn send_all(group: &Group, peer: u32, mut stream: TcpStream, queue: &Receiver<Transfer>) {
    while let Ok(transfer) = queue.recv() {
        if matches!(group.end(), Some(End::Failed(_))) {
            break;
        }
        let payload = match transfer.payload.as_ref().map(bytes).transpose() {
            Ok(payload) => payload.unwrap_or_default(),
            Err(error) => return group.fail(Error::Backend(error.to_string())),
        };
        match send(group, &mut stream, &transfer.header.encode(), payload) {
            Ok(true) => group.transferred(&transfer.operation),
            // Cut off inside a frame: no farewell fits any more.
            Ok(false) => {
                let _ = stream.shutdown(Shutdown::Both);
                return;
            }
            Err(cause) => {
                // The receiver may be about to read why the peer left, which tells more.
                group.wait_for_end(SEND_CHECK);
                return group.lose(peer, transfer.operation.tag.what, cause);
            }
        }
    }
    say_farewell(group, &mut stream);
}

/// Writes header and payload; false when the group ended and the peer takes no more.
fn send(group: &Group, stream: &mut TcpStream, header: &[u8], payload: &[u8]) -> io::Result<bool> {
    let mut slices = [IoSlice::new(header), IoSlice::new(payload)];
    let mut left = &mut slices[..];
    // Drops an empty payload, which would read as the end of the stream below.
    IoSlice::advance_slices(&mut left, 0);
    let mut left_at_end: Option<Instant> = None;
    while !left.is_empty() {
        match stream.write_vectored(left) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => IoSlice::advance_slices(&mut left, n),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => match group.end() {
                None => {}
                Some(End::Failed(_)) => return Ok(false),
                Some(End::Left) => {
                    let since = *left_at_end.get_or_insert_with(Instant::now);
                    if since.elapsed() > LINGER {
                        return Ok(false);
                    }
                }
            },
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

fn say_farewell(group: &Group, stream: &mut TcpStream) {
    let (culprit, reason) = match group.end() {
        Some(End::Failed(Error::PeerGone { peer, cause, .. })) => (Some(peer), cause),
        Some(End::Failed(error)) => (None, error.to_string()),
        Some(End::Left) | None => (None, String::new()),
    };
    let reason = &reason.as_bytes()[..reason.len().min(MAX_REASON_BYTES)];
    let header =
        Header { seq: 0, op: Op::Farewell, kind: None, unit: None, culprit, bytes: reason.len() as u64 };
    // The peer may be gone; it was told if it could be.
    let _ = send(group, stream, &header.encode(), reason);
    let _ = stream.shutdown(Shutdown::Write);
}

/// Body of the receiving thread.
pub fn receive_all(group: &Group, peer: u32, mut stream: TcpStream, queue: &Receiver<Transfer>) {
    loop {
        let mut raw = [0; HEADER_BYTES];
        if let Err(cause) = stream.read_exact(&mut raw) {
            let wanted = queue.try_recv().map_or("no operation", |transfer| transfer.operation.tag.what);
            return group.lose(peer, wanted, told(&cause));
        }
        let theirs = match Header::decode(&raw) {
            Ok(header) => header,
            Err(error) => return group.fail(Error::Backend(format!("rank {peer} sent garbage: {error}"))),
        };
        if theirs.op == Op::Farewell {
            let left = farewell(peer, &mut stream, &theirs);
            return match (left, queue.recv()) {
                // It left well, and nothing more is wanted from it.
                (None, Err(_)) => {}
                (None, Ok(transfer)) => group.lose(peer, transfer.operation.tag.what, "it left the group"),
                (Some(error), _) => group.fail(error),
            };
        }
        // The peer is ahead; this returns once this rank gets there.
        let Ok(mut transfer) = queue.recv() else { return };
        if theirs != transfer.header {
            let (ours, theirs) = (transfer.header.to_string(), theirs.to_string());
            return group.fail(Error::Desynchronised { peer, ours, theirs });
        }
        if let Some(payload) = &mut transfer.payload {
            let received = match bytes_mut(payload) {
                Ok(payload) => stream.read_exact(payload),
                Err(error) => return group.fail(Error::Backend(error.to_string())),
            };
            if let Err(cause) = received {
                return group.lose(peer, transfer.operation.tag.what, told(&cause));
            }
        }
        group.transferred(&transfer.operation);
    }
}

/// Why the peer left; `None` when it left well.
fn farewell(peer: u32, stream: &mut TcpStream, header: &Header) -> Option<Error> {
    let mut reason = vec![0; usize::try_from(header.bytes).unwrap_or(0).min(MAX_REASON_BYTES)];
    // A reason cut short is still a reason.
    let _ = stream.read_exact(&mut reason);
    let reason = String::from_utf8_lossy(&reason).into_owned();
    if reason.is_empty() && header.culprit.is_none() {
        return None;
    }
    let what = "its last operation".to_owned();
    Some(match header.culprit {
        Some(lost) => {
            Error::PeerGone { peer: lost, what, cause: format!("{reason} (as rank {peer} saw it)") }
        }
        None => Error::PeerGone { peer, what, cause: format!("it stopped: {reason}") },
    })
}

/// An end of file in words.
fn told(error: &io::Error) -> String {
    if error.kind() == ErrorKind::UnexpectedEof {
        return "it closed the connection without a farewell".to_owned();
    }
    error.to_string()
}
