//! A group of some of a group's ranks, with connections of its own, so that its operations keep an order
//! of their own.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use tch::{Device, Kind, Tensor};
use tunefleet_proto::ids::{Attempt, JobId, Rank};

use super::{TcpCommunicator, TcpListener};
use crate::comm::{Communicator, Error, Tag};

/// Room for an address as text.
const ADDRESS_BYTES: usize = 64;

/// What the ranks of an attempt know of each other.
#[derive(Clone)]
pub struct Credentials {
    /// The attempt's secret.
    pub secret: [u8; 32],
    /// Which job.
    pub job: JobId,
    /// Which attempt.
    pub attempt: Attempt,
}

/// Joins those of `world`'s ranks that are `members`, in that order; this rank is one of them. All ranks of
/// `world` call it, each with its own members.
///
/// # Errors
/// Whatever the exchange of addresses or the joining meets.
pub fn join(
    world: &dyn Communicator,
    members: &[u32],
    ip: IpAddr,
    credentials: &Credentials,
    deadline: Instant,
) -> Result<TcpCommunicator, Error> {
    let Rank { rank, world: ranks } = world.rank();
    let listener = TcpListener::bind(ip)?;
    let own = listener.addr().to_string();
    let mut text = vec![0u8; ADDRESS_BYTES * ranks as usize];
    text[ADDRESS_BYTES * rank as usize..][..own.len()].copy_from_slice(own.as_bytes());
    let all = Tensor::from_slice(&text).to_device_(Device::Cpu, Kind::Uint8, false, false);
    world.all_gather(&all, Tag { unit: None, what: "addresses" })?.wait()?;
    let text = Vec::<u8>::try_from(&all).unwrap_or_default();
    let address = |member: &u32| -> Result<SocketAddr, Error> {
        let bytes = text.get(ADDRESS_BYTES * *member as usize..).unwrap_or_default();
        let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        let text = String::from_utf8_lossy(bytes);
        text.parse().map_err(|e| Error::Join(format!("address {text:?} of rank {member}: {e}")))
    };
    let peers = members.iter().map(address).collect::<Result<Vec<_>, _>>()?;
    let place = members.iter().position(|member| *member == rank);
    let place = place.ok_or_else(|| Error::Join(format!("rank {rank} is not in its group")))?;
    let own = Rank { rank: place as u32, world: members.len() as u32 };
    let Credentials { secret, job, attempt } = credentials;
    listener.join(own, &peers, secret, job, *attempt, deadline)
}
