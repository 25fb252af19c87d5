//! Strangers who knock at every door of a running job.

use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;
use tunefleet_tests::job::Job;
use tunefleet_tests::process::Process;

/// How long a stranger waits for an answer.
const LISTEN: Duration = Duration::from_millis(20);

/// What a stranger says: nothing sensible, a web request, a gRPC connection without a token.
const WORDS: [&[u8]; 3] = [
    &[0x55; 4096],
    b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
];

#[test]
fn strangers_at_every_port_and_socket_disturb_nothing() {
    let job = Job::builder().steps(30).build();
    let twin = job.twin();
    let mut launch = job.launch(&[]);
    let (mut tcp, mut unix) = (HashSet::new(), HashSet::new());
    let mut silent = Vec::new();
    let mut ended = false;
    // A rank listens for its peers until all are there: one of them is held up until the other's
    // port has been knocked at.
    let (mut held, mut rank_port_found) = (None, false);
    while !ended {
        let ranks = launch.ranks();
        if held.is_none() && ranks.len() == 2 {
            ranks[1].signal(Signal::SIGSTOP);
            held = Some(ranks[1].pid);
        }
        let doors = Doors::of(&launch.processes());
        for &port in &doors.tcp {
            if tcp.insert(port) {
                // One that stays and says nothing.
                silent.extend(TcpStream::connect((Ipv4Addr::LOCALHOST, port)));
            }
            for words in WORDS {
                if let Ok(stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
                    stream.set_read_timeout(Some(LISTEN)).unwrap();
                    knock(stream, words);
                }
            }
        }
        for path in doors.unix {
            if let Ok(stream) = UnixStream::connect(&path) {
                stream.set_read_timeout(Some(LISTEN)).unwrap();
                knock(stream, WORDS[2]);
            }
            unix.insert(path);
        }
        if let Some(pid) = held
            && !rank_port_found
            && ranks
                .iter()
                .any(|rank| rank.pid != pid && !Doors::of(std::slice::from_ref(rank)).tcp.is_empty())
        {
            // Seen open after the knocks of this round: the next round's knocks come before it goes on.
            rank_port_found = true;
        } else if rank_port_found {
            for rank in &ranks {
                rank.signal(Signal::SIGCONT);
            }
        }
        ended = launch.has_ended();
    }
    launch.wait().expect(0);
    assert!(rank_port_found, "no rank was seen listening");
    // The coordinator's, its metrics', the worker's metrics', and at least one rank's.
    assert!(tcp.len() >= 4, "only {tcp:?} were open");
    assert!(!unix.is_empty(), "ranks connect to their daemon by a socket");

    twin.run(&[]).expect(0);
    assert_eq!(job.metrics().losses(), twin.metrics().losses());
}

/// Says `words` and listens for a moment; being cut off is what a stranger must expect.
fn knock(mut stream: impl Read + Write, words: &[u8]) {
    let _ = stream.write_all(words);
    let _ = stream.read(&mut [0; 1024]);
}

/// Where a job's processes listen.
struct Doors {
    tcp: Vec<u16>,
    unix: Vec<PathBuf>,
}

impl Doors {
    fn of(processes: &[Process]) -> Self {
        let mut inodes = HashSet::new();
        for process in processes {
            let descriptors = fs::read_dir(format!("/proc/{}/fd", process.pid)).into_iter().flatten();
            for descriptor in descriptors.filter_map(Result::ok) {
                let Ok(target) = fs::read_link(descriptor.path()) else { continue };
                let target = target.to_string_lossy();
                if let Some(inode) = target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')) {
                    inodes.insert(inode.to_owned());
                }
            }
        }
        let table = |name: &str| fs::read_to_string(format!("/proc/net/{name}")).unwrap_or_default();
        // Columns: number, local address, remote address, state (0A is listening), ..., inode.
        let listening = |line: &str| -> Option<u16> {
            let columns: Vec<_> = line.split_whitespace().collect();
            let mine = columns.get(3) == Some(&"0A") && inodes.contains(*columns.get(9)?);
            let (_, port) = columns.get(1)?.rsplit_once(':')?;
            if mine { u16::from_str_radix(port, 16).ok() } else { None }
        };
        // Columns: address, references, protocol, flags (0x10000 is listening), type, state, inode, path.
        let accepting = |line: &str| -> Option<PathBuf> {
            let columns: Vec<_> = line.split_whitespace().collect();
            let mine = columns.get(3) == Some(&"00010000") && inodes.contains(*columns.get(6)?);
            if mine { columns.get(7).map(PathBuf::from) } else { None }
        };
        Doors {
            tcp: table("tcp").lines().filter_map(listening).collect(),
            unix: table("unix").lines().filter_map(accepting).collect(),
        }
    }
}
