//! Ranks as processes: what the others see when one is killed.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tunefleet_proto::ids::{Attempt, JobId, Rank};
use tunefleet_worker::comm::tcp::TcpListener;
use tunefleet_worker::comm::{Communicator, Tag};

/// Set in the processes that this test starts from its own program.
const RANK_VARIABLE: &str = "TUNEFLEET_TEST_RANK";
const WORLD: u32 = 3;
/// Marks our lines among those of the test harness.
const MARK: &str = "@ ";

struct RankProcess {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl RankProcess {
    fn start(rank: u32) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "comm_processes::a_killed_rank_is_named_by_the_others_within_a_second",
                "--nocapture",
            ])
            .env(RANK_VARIABLE, rank.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        RankProcess { child, input, output }
    }

    fn line(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the rank ended without a word");
            // The harness prints the test's name, without a line feed, before our first line.
            if let Some((_, ours)) = line.trim_end().split_once(MARK) {
                return ours.to_owned();
            }
        }
    }
}

impl Drop for RankProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One rank: tells its address, reads all, gathers until something fails, tells what.
fn be_rank(rank: u32) {
    let listener = TcpListener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    println!("{MARK}{}", listener.addr());
    let addrs: Vec<SocketAddr> =
        std::io::stdin().lines().take(WORLD as usize).map(|line| line.unwrap().parse().unwrap()).collect();
    let (deadline, job) = (Instant::now() + Duration::from_secs(20), JobId("test".into()));
    let comm =
        listener.join(Rank { rank, world: WORLD }, &addrs, &[1; 32], &job, Attempt(1), deadline).unwrap();
    println!("{MARK}joined");
    let buffer = Tensor::zeros([i64::from(WORLD) << 20], (Kind::Float, Device::Cpu));
    let error = loop {
        let gathered =
            comm.all_gather(&buffer, Tag { unit: None, what: "gather" }).and_then(|work| work.wait());
        if let Err(error) = gathered {
            break error;
        }
    };
    println!("{MARK}{error}");
}

#[test]
fn a_killed_rank_is_named_by_the_others_within_a_second() {
    if let Ok(rank) = std::env::var(RANK_VARIABLE) {
        return be_rank(rank.parse().unwrap());
    }
    let mut ranks: Vec<_> = (0..WORLD).map(RankProcess::start).collect();
    let addrs: Vec<_> = ranks.iter_mut().map(RankProcess::line).collect();
    for rank in &mut ranks {
        writeln!(rank.input, "{}", addrs.join("\n")).unwrap();
    }
    for rank in &mut ranks {
        assert_eq!(rank.line(), "joined");
    }
    ranks[1].child.kill().unwrap();
    let killed = Instant::now();
    for rank in [0, 2] {
        let error = ranks[rank].line();
        // Seen by itself, or told by the other.
        assert!(error.starts_with("rank 1 is gone during"), "rank {rank}: {error}");
    }
    assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
}
