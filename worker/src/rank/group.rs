//! How a rank meets its peers: which communicator serves which device.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tunefleet_proto::ids::{Attempt, JobId, Rank};
use tunefleet_proto::rpc::{Assignment, StartRanks};

use super::Error;
use crate::comm::tcp::TcpListener;
use crate::comm::{Communicator, Solo};

/// How long the ranks of an attempt wait for each other.
const JOIN_TIMEOUT: Duration = Duration::from_secs(120);

/// A rank that is ready to meet its peers.
pub(super) enum Listener {
    /// A world of one meets nobody.
    Solo,
    /// Peers connect over TCP; tensors of a GPU are staged through the host.
    Tcp(TcpListener),
}

impl Listener {
    /// Opens what peers connect to.
    pub fn open(assignment: &Assignment) -> Result<Self, Error> {
        if assignment.world <= 1 {
            return Ok(Listener::Solo);
        }
        let ip: IpAddr = assignment
            .listen_address
            .parse()
            .map_err(|e| Error::Assignment(format!("listen address {:?}: {e}", assignment.listen_address)))?;
        Ok(Listener::Tcp(TcpListener::bind(ip).map_err(Error::Join)?))
    }

    /// Where peers connect to; empty in a world of one.
    pub fn address(&self) -> String {
        match self {
            Listener::Solo => String::new(),
            Listener::Tcp(listener) => listener.addr().to_string(),
        }
    }

    /// Meets all peers.
    pub fn join(self, assignment: &Assignment, start: &StartRanks) -> Result<Arc<dyn Communicator>, Error> {
        let listener = match self {
            Listener::Solo => return Ok(Arc::new(Solo)),
            Listener::Tcp(listener) => listener,
        };
        let peers: Vec<SocketAddr> = start
            .peers
            .iter()
            .map(|peer| peer.parse().map_err(|e| Error::Assignment(format!("peer address {peer:?}: {e}"))))
            .collect::<Result<_, _>>()?;
        let secret: [u8; 32] =
            start.secret.as_slice().try_into().map_err(|_| {
                Error::Assignment(format!("secret of {} bytes, expected 32", start.secret.len()))
            })?;
        let task = start.task.clone().unwrap_or_default();
        let rank = Rank { rank: assignment.rank, world: assignment.world };
        let deadline = Instant::now() + JOIN_TIMEOUT;
        let communicator = listener
            .join(rank, &peers, &secret, &JobId(task.job), Attempt(task.attempt), deadline)
            .map_err(Error::Join)?;
        Ok(Arc::new(communicator))
    }
}
