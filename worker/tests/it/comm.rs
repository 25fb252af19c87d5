//! The TCP communicator from outside: threads as ranks on loopback.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use half::bf16;
use tch::{Device, Kind, Tensor};
use tunefleet_proto::ids::{Attempt, JobId, Rank};
use tunefleet_worker::comm::recorder::{Record, Recorded};
use tunefleet_worker::comm::tcp::{TcpCommunicator, TcpListener};
use tunefleet_worker::comm::{Communicator, Error, Tag};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const SECRET: [u8; 32] = [42; 32];
const WORLDS: [u32; 4] = [2, 3, 4, 8];

fn tag(what: &'static str) -> Tag {
    Tag { unit: Some(3), what }
}

fn listeners(world: u32) -> (Vec<TcpListener>, Vec<SocketAddr>) {
    let listeners: Vec<_> = (0..world).map(|_| TcpListener::bind(LOOPBACK).unwrap()).collect();
    let addrs = listeners.iter().map(TcpListener::addr).collect();
    (listeners, addrs)
}

fn join(
    listener: TcpListener,
    (rank, world): (u32, u32),
    addrs: &[SocketAddr],
    secret: [u8; 32],
    limit: Duration,
) -> Result<TcpCommunicator, Error> {
    let job = JobId("test".into());
    listener.join(Rank { rank, world }, addrs, &secret, &job, Attempt(1), Instant::now() + limit)
}

/// Runs `body` as every rank of a group and returns the results in rank order.
fn as_ranks<T: Send>(world: u32, body: impl Fn(TcpCommunicator) -> T + Sync) -> Vec<T> {
    let (listeners, addrs) = listeners(world);
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .zip(listeners)
            .map(|(rank, listener)| {
                let (addrs, body) = (&addrs, &body);
                let join = move || join(listener, (rank, world), addrs, SECRET, Duration::from_secs(20));
                scope.spawn(move || body(join().unwrap()))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Numbers whose sum depends on the order of addition.
fn values(rank: u32, salt: u32, len: usize) -> Vec<f32> {
    let mut state = (u64::from(rank) << 32 | u64::from(salt)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let mantissa = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
        mantissa * 2f32.powi((state % 24) as i32 - 12)
    };
    (0..len).map(|_| next()).collect()
}

/// What the ranks must get at `range`: added one by one in rank order, in fp32.
fn fixed_order_sum(parts: &[Vec<f32>], range: Range<usize>) -> Vec<f32> {
    range.map(|i| parts[1..].iter().fold(parts[0][i], |sum, part| sum + part[i])).collect()
}

fn tensor(values: &[f32], kind: Kind) -> Tensor {
    Tensor::from_slice(values).to_kind(kind)
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(&tensor.to_kind(Kind::Float)).unwrap()
}

fn zeros(len: usize) -> Tensor {
    Tensor::zeros([len as i64], (Kind::Float, Device::Cpu))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&x| bf16::from_f32(x).to_f32()).collect()
}

fn position(comm: &TcpCommunicator) -> (usize, usize) {
    let Rank { rank, world } = comm.rank();
    (rank as usize, world as usize)
}

#[test]
fn every_rank_gathers_every_part_in_place() {
    for world in WORLDS {
        let cases = [1, 3, 1023, 300_001].map(|n| [(n, Kind::Float), (n, Kind::BFloat16)]);
        let gathered = as_ranks(world, |comm| {
            let (rank, world) = position(&comm);
            cases
                .as_flattened()
                .iter()
                .map(|&(n, kind)| {
                    let buffer = zeros(world * n).to_kind(kind);
                    buffer
                        .narrow(0, (rank * n) as i64, n as i64)
                        .copy_(&tensor(&values(rank as u32, 1, n), kind));
                    comm.all_gather(&buffer, tag("gather")).unwrap().wait().unwrap();
                    bits(&floats(&buffer))
                })
                .collect::<Vec<_>>()
        });
        for (at, &(n, kind)) in cases.as_flattened().iter().enumerate() {
            let expected: Vec<f32> =
                (0..world).flat_map(|rank| floats(&tensor(&values(rank, 1, n), kind))).collect();
            for got in &gathered {
                assert!(got[at] == bits(&expected), "world {world}, n {n}, {kind:?}");
            }
        }
    }
}

#[test]
fn a_reduce_scatter_equals_the_fixed_order_sum_bit_for_bit() {
    for world in WORLDS {
        for n in [1, 3, 1023, 100_001] {
            let inputs: Vec<_> = (0..world).map(|rank| values(rank, 2, n * world as usize)).collect();
            let exact_in_bf16: Vec<_> = inputs.iter().map(|input| rounded(input)).collect();
            let kinds =
                [(Kind::Float, Kind::Float), (Kind::BFloat16, Kind::BFloat16), (Kind::BFloat16, Kind::Float)];
            let results = as_ranks(world, |comm| {
                let (rank, _) = position(&comm);
                kinds.map(|(from, to)| {
                    let input = tensor(&inputs[rank], from);
                    let output = Tensor::full([n as i64], f64::NAN, (to, Device::Cpu));
                    comm.reduce_scatter(&input, &output, tag("reduce")).unwrap().wait().unwrap();
                    floats(&output)
                })
            });
            for (rank, [fp32, bf16, mixed]) in results.iter().enumerate() {
                let mine = rank * n..(rank + 1) * n;
                assert_eq!(bits(fp32), bits(&fixed_order_sum(&inputs, mine.clone())), "world {world}, n {n}");
                let wide = fixed_order_sum(&exact_in_bf16, mine);
                assert_eq!(bits(mixed), bits(&wide), "bf16 into fp32: world {world}, n {n}");
                assert_eq!(bits(bf16), bits(&rounded(&wide)), "bf16: world {world}, n {n}");
            }
        }
    }
}

#[test]
fn every_rank_gets_the_same_bits_from_an_all_reduce() {
    for world in WORLDS {
        let inputs: Vec<_> = (0..world).map(|rank| values(rank, 3, 7)).collect();
        let expected = fixed_order_sum(&inputs, 0..7);
        let results = as_ranks(world, |comm| {
            let (rank, _) = position(&comm);
            let singles = tensor(&inputs[rank], Kind::Float);
            let doubles = Tensor::from_slice(&[0.1f64 * rank as f64, 1e300]);
            let integers = Tensor::from_slice(&[rank as i64, i64::from(u32::MAX)]);
            let scalar = Tensor::from(rank as f64);
            for tensor in [&singles, &doubles, &integers, &scalar] {
                comm.all_reduce(tensor, tag("reduce")).unwrap().wait().unwrap();
            }
            let doubles = Vec::<f64>::try_from(&doubles).unwrap();
            let integers = Vec::<i64>::try_from(&integers).unwrap();
            (floats(&singles), doubles, integers, scalar.double_value(&[]))
        });
        let n = i64::from(world);
        for (singles, doubles, integers, scalar) in &results {
            assert_eq!(bits(singles), bits(&expected));
            assert_eq!(doubles, &results[0].1);
            assert_eq!(integers, &[n * (n - 1) / 2, n * i64::from(u32::MAX)]);
            assert_eq!(*scalar, (n * (n - 1) / 2) as f64);
        }
    }
}

#[test]
fn results_are_bit_identical_however_ranks_are_delayed() {
    const N: usize = 5003;
    let run = |delayed: bool| {
        as_ranks(4, |comm| {
            let (rank, world) = position(&comm);
            let round = |round: usize| {
                if delayed {
                    // The delay is what is tested; another rank is last in each round.
                    thread::sleep(Duration::from_millis((round + rank) as u64 % 4 * 2));
                }
                let input = tensor(&values(rank as u32, 4, N * world), Kind::Float);
                let buffer = zeros(N * world);
                let output = buffer.narrow(0, (rank * N) as i64, N as i64);
                comm.reduce_scatter(&input, &output, tag("reduce")).unwrap().wait().unwrap();
                comm.all_gather(&buffer, tag("gather")).unwrap().wait().unwrap();
                comm.barrier().unwrap();
                bits(&floats(&buffer))
            };
            (0..20).map(round).collect::<Vec<_>>()
        })
    };
    let (prompt, delayed) = (run(false), run(true));
    let first = &prompt[0][0];
    assert!(prompt.iter().chain(&delayed).flatten().all(|bits| bits == first));
}

#[test]
fn operations_larger_than_the_socket_buffers_run_in_both_directions_at_once() {
    // 64 MB per rank and operation, four under way, none waited for before all are started.
    const N: usize = 8 << 20;
    let results = as_ranks(2, |comm| {
        let (rank, world) = position(&comm);
        let gathered = [0, 2].map(|salt| {
            let buffer = zeros(world * N);
            let _ = buffer.narrow(0, (rank * N) as i64, N as i64).fill_((rank + salt) as f64);
            buffer
        });
        let input = Tensor::ones([(world * N) as i64], (Kind::Float, Device::Cpu));
        let reduced = [zeros(N), zeros(N)];
        let mut works = Vec::new();
        for (buffer, output) in gathered.iter().zip(&reduced) {
            works.push(comm.all_gather(buffer, tag("gather")).unwrap());
            works.push(comm.reduce_scatter(&input, output, tag("reduce")).unwrap());
        }
        for work in works {
            work.wait().unwrap();
        }
        let sums = gathered.iter().chain(&reduced).map(|t| t.sum(Kind::Double).double_value(&[]));
        sums.collect::<Vec<_>>()
    });
    let n = N as f64;
    assert!(results.iter().all(|sums| *sums == [n, 5.0 * n, 2.0 * n, 2.0 * n]), "{results:?}");
}

#[test]
fn tensors_that_do_not_fit_are_refused_and_nothing_is_sent() {
    let refusals = as_ranks(2, |comm| {
        let matrix = zeros(8).view([4, 2]);
        let odd = comm.all_gather(&zeros(3), tag("gather")).err().unwrap();
        let strided = comm.all_gather(&matrix.transpose(0, 1), tag("gather")).err().unwrap();
        let short = comm.reduce_scatter(&zeros(4), &zeros(3), tag("reduce")).err().unwrap();
        let whole = zeros(4);
        let aliased = comm.reduce_scatter(&whole, &whole.narrow(0, 0, 2), tag("reduce")).err().unwrap();
        let halves = comm.all_reduce(&zeros(2).to_kind(Kind::Half), tag("reduce")).err().unwrap();
        // The group is still whole.
        comm.barrier().unwrap();
        [odd, strided, short, aliased, halves].map(|error| error.to_string())
    });
    for [odd, strided, short, aliased, halves] in refusals {
        assert!(
            odd.starts_with("all-gather: the tensor must be of world x n elements, got Float [3]"),
            "{odd}"
        );
        assert!(strided.contains("contiguous"), "{strided}");
        assert!(short.contains("world x the output's elements"), "{short}");
        assert!(aliased.contains("apart from the output"), "{aliased}");
        assert!(halves.contains("Half"), "{halves}");
    }
}

#[test]
fn ranks_out_of_step_are_told_what_each_side_was_doing() {
    let errors = as_ranks(2, |comm| {
        let (rank, _) = position(&comm);
        let work = if rank == 0 {
            comm.all_gather(&zeros(8), Tag { unit: Some(5), what: "gather" })
        } else {
            comm.reduce_scatter(&zeros(8), &zeros(4), Tag { unit: Some(6), what: "reduce" })
        };
        work.unwrap().wait().unwrap_err().to_string()
    });
    // The other one may hear it from its peer first, in the same words.
    for error in &errors {
        assert!(error.contains("ranks are out of step"), "{error}");
        assert!(error.contains("all-gather of unit 5"), "{error}");
        assert!(error.contains("reduce-scatter of unit 6"), "{error}");
    }
}

#[test]
fn a_rank_that_leaves_early_is_named_by_the_others() {
    let results = as_ranks(3, |comm| {
        let (rank, world) = position(&comm);
        if rank == 2 {
            return None;
        }
        let began = Instant::now();
        let gathered = comm.all_gather(&zeros((1 << 20) * world), tag("gather")).and_then(|work| work.wait());
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        Some(gathered.unwrap_err())
    });
    for error in results.iter().flatten() {
        assert!(matches!(error, Error::PeerGone { peer: 2, .. }), "{error}");
    }
}

#[test]
fn an_operation_ends_in_the_record_when_all_ranks_have_begun_it_though_nobody_waits() {
    let seen = Barrier::new(2);
    as_ranks(2, |comm| {
        let rank = comm.rank().rank;
        let record = Arc::new(Record::new(vec!["embed".to_owned()]));
        let comm = Recorded::new(comm, record.clone());
        let buffer = Tensor::full([4], f64::from(rank), (Kind::Float, Device::Cpu));
        if rank == 1 {
            seen.wait();
        }
        let work = comm.all_gather(&buffer, tag("gather")).unwrap();
        if rank == 0 {
            let oldest = record.oldest_unfinished().unwrap();
            assert_eq!((oldest.sequence, record.about(oldest.tag).as_str()), (1, "gather of unit 3"));
            seen.wait();
        }
        let began = Instant::now();
        while record.oldest_unfinished().is_some() {
            assert!(began.elapsed() < Duration::from_secs(20), "it never ends");
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(record.snapshot().last_finished.map(|last| last.sequence), Some(1));
        work.wait().unwrap();
    });
}

#[test]
fn an_abort_unblocks_the_waiter_and_tells_the_peers_why() {
    let aborted = Barrier::new(2);
    let errors = as_ranks(2, |comm| {
        let (rank, _) = position(&comm);
        let buffer = zeros(4 << 20);
        if rank == 1 {
            aborted.wait();
            return comm.all_gather(&buffer, tag("gather")).and_then(|work| work.wait()).unwrap_err();
        }
        let work = comm.all_gather(&buffer, tag("gather")).unwrap();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| work.wait().unwrap_err());
            let began = Instant::now();
            comm.abort("the daemon says so");
            let error = waiter.join().unwrap();
            assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
            aborted.wait();
            assert!(comm.barrier().is_err(), "an aborted group must refuse all that follows");
            error
        })
    });
    assert_eq!(errors[0].to_string(), "aborted: the daemon says so");
    let told = errors[1].to_string();
    assert!(told.starts_with("rank 0 is gone"), "{told}");
}

#[test]
fn strangers_are_refused_while_the_group_forms() {
    let (mut listeners, addrs) = listeners(2);
    let (second, first) = (listeners.pop().unwrap(), listeners.pop().unwrap());
    let limit = Duration::from_secs(20);
    thread::scope(|scope| {
        let began = Instant::now();
        let first = scope.spawn(|| join(first, (0, 2), &addrs, SECRET, limit).unwrap());

        let mut silent: Vec<_> = (0..100).map(|_| TcpStream::connect(addrs[0]).unwrap()).collect();
        let mut babbling = TcpStream::connect(addrs[0]).unwrap();
        babbling.write_all(&[0x55; 4096]).unwrap();
        assert!(is_closed(&mut babbling), "garbage must be refused");
        // Too many silent ones: the oldest had to go.
        assert!(is_closed(&mut silent[0]));

        let impostor = TcpListener::bind(LOOPBACK).unwrap();
        let error = join(impostor, (1, 2), &addrs, [0; 32], limit / 40).err().unwrap().to_string();
        assert!(error.starts_with("joining the group: no connection with rank 0"), "{error}");

        let second = join(second, (1, 2), &addrs, SECRET, limit).unwrap();
        let first = first.join().unwrap();
        // The silent ones did not hold it up either.
        assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
        assert!(is_closed(silent.last_mut().unwrap()));
        assert!(TcpStream::connect(addrs[0]).is_err(), "the port must be closed once the group has formed");

        let other = scope.spawn(move || second.barrier());
        first.barrier().unwrap();
        other.join().unwrap().unwrap();
    });
}

/// Whether the other side closes the connection; a reset is a close as well.
fn is_closed(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    match stream.read(&mut [0; 64]) {
        Ok(n) => n == 0,
        Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn a_rank_that_never_comes_is_named_at_the_deadline() {
    let (mut listeners, addrs) = listeners(3);
    drop(listeners.pop());
    let limit = Duration::from_secs(2);
    thread::scope(|scope| {
        let addrs = &addrs;
        let ranks: Vec<_> = (0..2)
            .zip(listeners)
            .map(|(rank, l)| scope.spawn(move || join(l, (rank, 3), addrs, SECRET, limit).err().unwrap()))
            .collect();
        for rank in ranks {
            let error = rank.join().unwrap().to_string();
            assert!(error.contains("no connection with rank 2"), "{error}");
        }
    });
}

#[test]
fn a_world_of_one_needs_no_peers() {
    let (mut listeners, addrs) = listeners(1);
    let comm = join(listeners.remove(0), (0, 1), &addrs, SECRET, Duration::from_secs(5)).unwrap();
    let input = Tensor::from_slice(&[1f32, 2.0]);
    let output = zeros(2);
    comm.reduce_scatter(&input, &output, tag("reduce")).unwrap().wait().unwrap();
    comm.all_gather(&output, tag("gather")).unwrap().wait().unwrap();
    comm.all_reduce(&output, tag("reduce")).unwrap().wait().unwrap();
    comm.barrier().unwrap();
    assert_eq!(floats(&output), [1.0, 2.0]);
}
