//! Ranks as processes: what the others see when one is killed.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tunefleet_proto::ids::{Attempt, JobId, Rank};
use tunefleet_worker::comm::tcp::TcpListener;
use tunefleet_worker::comm::{Communicator, Tag};

/// Set in the processes that a test starts from its own program.
const RANK_VARIABLE: &str = "TUNEFLEET_TEST_RANK";
/// Marks our lines among those of the test harness.
const MARK: &str = "@ ";

/// The rank that this process is to be, where a test has started it.
pub fn own_rank() -> Option<u32> {
    std::env::var(RANK_VARIABLE).ok().map(|rank| rank.parse().unwrap())
}

/// A process that runs a test of this program as a rank.
pub struct RankProcess {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl RankProcess {
    /// `world` processes that run `test` (its whole name), each told the addresses of all.
    pub fn start_all(test: &str, world: u32) -> Vec<Self> {
        let mut ranks: Vec<_> = (0..world).map(|rank| RankProcess::start(test, rank)).collect();
        let addrs: Vec<_> = ranks.iter_mut().map(RankProcess::line).collect();
        for rank in &mut ranks {
            writeln!(rank.input, "{}", addrs.join("\n")).unwrap();
        }
        ranks
    }

    fn start(test: &str, rank: u32) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(RANK_VARIABLE, rank.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        RankProcess { child, input, output }
    }

    /// The next line that the rank [`say`]s.
    pub fn line(&mut self) -> String {
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

/// Tells the test that started this process.
pub fn say(line: impl std::fmt::Display) {
    println!("{MARK}{line}");
}

/// Joins the others of [`RankProcess::start_all`].
pub fn join(rank: u32, world: u32) -> impl Communicator {
    let listener = TcpListener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    say(listener.addr());
    let addrs: Vec<SocketAddr> =
        std::io::stdin().lines().take(world as usize).map(|line| line.unwrap().parse().unwrap()).collect();
    let (deadline, job) = (Instant::now() + Duration::from_secs(20), JobId("test".into()));
    listener.join(Rank { rank, world }, &addrs, &[1; 32], &job, Attempt(1), deadline).unwrap()
}

/// One rank: gathers until something fails, tells what.
fn gather_until_something_fails(rank: u32, world: u32) {
    let comm = join(rank, world);
    say("joined");
    let buffer = Tensor::zeros([i64::from(world) << 20], (Kind::Float, Device::Cpu));
    let error = loop {
        let gathered =
            comm.all_gather(&buffer, Tag { unit: None, what: "gather" }).and_then(|work| work.wait());
        if let Err(error) = gathered {
            break error;
        }
    };
    say(error);
}

#[test]
fn a_killed_rank_is_named_by_the_others_within_a_second() {
    const WORLD: u32 = 3;
    if let Some(rank) = own_rank() {
        return gather_until_something_fails(rank, WORLD);
    }
    let test = "comm_processes::a_killed_rank_is_named_by_the_others_within_a_second";
    let mut ranks = RankProcess::start_all(test, WORLD);
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
