//! What is known of the machine: name, slots, GPUs, cores, memory, address.

use std::net::{IpAddr, Ipv4Addr, ToSocketAddrs, UdpSocket};

use tunefleet_proto::rpc::Gpu;

use super::{Args, Error, io};

/// One machine, as its daemon tells the coordinator.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub name: String,
    pub slots: u32,
    pub gpus: u32,
    /// As the driver shows them; empty where it does not.
    pub devices: Vec<Gpu>,
    pub cores: u32,
    pub memory_bytes: u64,
    pub address: IpAddr,
    /// Tells this start of the daemon from another.
    pub incarnation: String,
}

impl Node {
    /// Looks around. The command line wins over what is found.
    pub fn inspect(args: &Args) -> Result<Self, Error> {
        let gpus = if args.cpu { 0 } else { gpus() };
        let name = match &args.name {
            Some(name) => name.clone(),
            None => host_name(),
        };
        Ok(Node {
            name,
            slots: args.slots.unwrap_or(if gpus > 0 { gpus } else { args.cpu_slots }),
            gpus,
            devices: if gpus > 0 { super::examine::gpus::listed() } else { Vec::new() },
            cores: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
            memory_bytes: memory_bytes(),
            address: match args.advertise {
                Some(address) => address,
                None => address_towards(&args.coordinator)?,
            },
            incarnation: tunefleet_proto::hex(&rand::random::<[u8; 8]>()),
        })
    }
}

fn host_name() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if text.trim().is_empty() { "worker".to_owned() } else { text.trim().to_owned() }
}

/// GPUs that ranks started here would see.
pub(super) fn gpus() -> u32 {
    if let Ok(visible) = std::env::var("CUDA_VISIBLE_DEVICES") {
        return visible.split(',').filter(|id| !id.trim().is_empty() && id.trim() != "-1").count() as u32;
    }
    let Ok(entries) = std::fs::read_dir("/dev") else { return 0 };
    let is_gpu = |name: &str| {
        name.strip_prefix("nvidia")
            .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
    };
    entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(is_gpu)).count() as u32
}

fn memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// The address of the interface that leads to the coordinator. Nothing is sent: connecting a
/// datagram socket only looks up the route.
fn address_towards(url: &str) -> Result<IpAddr, Error> {
    let authority = url.split("://").last().unwrap_or(url).trim_end_matches('/');
    let route = || -> std::io::Result<IpAddr> {
        let mut found = authority.to_socket_addrs()?;
        let peer = found.next().ok_or(std::io::ErrorKind::AddrNotAvailable)?;
        let any: IpAddr = if peer.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            std::net::Ipv6Addr::UNSPECIFIED.into()
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(peer)?;
        Ok(socket.local_addr()?.ip())
    };
    // Any other answer would be taken for this worker's address as long as it lives.
    route().map_err(io(&format!("finding this machine's address towards {url}; give it by --advertise IP")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_of_a_local_coordinator_is_reached_locally() {
        let found = address_towards("http://127.0.0.1:7070").unwrap();
        assert_eq!(found, IpAddr::from(Ipv4Addr::LOCALHOST));
        let error = address_towards("not an address").unwrap_err().to_string();
        assert!(error.contains("--advertise"), "{error}");
    }
}
