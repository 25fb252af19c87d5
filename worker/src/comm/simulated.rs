//! Rank r of N with no peers: what one rank of a large job computes and holds, measured on one
//! device. Values of other ranks are made up; memory and order of operations are real.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tunefleet_proto::ids::Rank;

use super::tcp::{Pool, is_summed_in_parts};
use super::{Communicator, Error, Tag, Work};

/// Sums over copies whose incoming parts are in memory at once: one travels while the next one begins.
const SUMS_UNDER_WAY: usize = 2;

/// A communicator that plays all peers. On a CPU it holds the buffers that the TCP communicator would.
pub struct Simulated {
    rank: Rank,
    bus_bytes_per_second: Option<f64>,
    gathered_bytes: AtomicU64,
    reduced_bytes: AtomicU64,
    pool: Arc<Pool>,
    sums: Mutex<VecDeque<Tensor>>,
}

/// What has come and gone over the simulated bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// Brought by gathers, bytes.
    pub gathered_bytes: u64,
    /// Sent for reductions, bytes.
    pub reduced_bytes: u64,
}

impl Simulated {
    /// Rank `rank.rank` of `rank.world`. With a bandwidth, each operation takes the time that a
    /// ring over such a bus would; without one, none.
    pub fn new(rank: Rank, bus_bytes_per_second: Option<f64>) -> Self {
        Simulated {
            rank,
            bus_bytes_per_second,
            gathered_bytes: AtomicU64::new(0),
            reduced_bytes: AtomicU64::new(0),
            pool: Arc::default(),
            sums: Mutex::default(),
        }
    }

    /// Traffic since the last call.
    pub fn take_traffic(&self) -> Traffic {
        Traffic {
            gathered_bytes: self.gathered_bytes.swap(0, Ordering::Relaxed),
            reduced_bytes: self.reduced_bytes.swap(0, Ordering::Relaxed),
        }
    }

    /// `tensor`, cut into one part per rank.
    fn parts(&self, tensor: &Tensor) -> Vec<Tensor> {
        tensor.detach().view(-1).chunk(i64::from(self.rank.world), 0)
    }

    /// Done when a ring has passed `passes` x (N - 1) / N of `tensor` over the bus, which `counter` counts.
    fn work(&self, tensor: &Tensor, passes: u64, counter: &AtomicU64, held: Vec<Tensor>) -> Box<dyn Work> {
        let world = u64::from(self.rank.world);
        let bytes =
            (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64 * passes * (world - 1) / world;
        counter.fetch_add(bytes, Ordering::Relaxed);
        let delay = self.bus_bytes_per_second.map_or(0.0, |bandwidth| bytes as f64 / bandwidth);
        let ready = Instant::now() + Duration::try_from_secs_f64(delay).unwrap_or_default();
        Box::new(Delayed { ready, pool: self.pool.clone(), held })
    }

    /// A buffer for what peers send of `whole`.
    fn incoming(&self, whole: &Tensor) -> Result<Option<Tensor>, Error> {
        if whole.device() != Device::Cpu || self.rank.world == 1 {
            return Ok(None);
        }
        self.pool.take(whole.kind(), whole.numel() as i64, Device::Cpu).map(Some)
    }

    fn sums(&self) -> MutexGuard<'_, VecDeque<Tensor>> {
        // No critical section leaves the list half-changed.
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Communicator for Simulated {
    fn rank(&self) -> Rank {
        self.rank
    }

    /// Every rank's part becomes this rank's; bytes of a quantised base stay as they are: this rank's codes
    /// are no scales.
    fn all_gather(&self, buffer: &Tensor, _tag: Tag) -> Result<Box<dyn Work>, Error> {
        self.check("all-gather", buffer, None)?;
        let mut parts = self.parts(buffer);
        let mine = parts.swap_remove(self.rank.rank as usize);
        if buffer.kind() != Kind::Uint8 {
            for mut part in parts {
                part.f_copy_(&mine).map_err(backend)?;
            }
        }
        Ok(self.work(buffer, 1, &self.gathered_bytes, Vec::new()))
    }

    /// This rank's part alone.
    fn reduce_scatter(&self, input: &Tensor, output: &Tensor, _tag: Tag) -> Result<Box<dyn Work>, Error> {
        self.check("reduce-scatter", input, Some(output))?;
        let incoming = self.incoming(input)?;
        let mine = self.parts(input).swap_remove(self.rank.rank as usize);
        output.detach().view(-1).f_copy_(&mine).map_err(backend)?;
        Ok(self.work(input, 1, &self.reduced_bytes, incoming.into_iter().collect()))
    }

    /// As it is.
    fn all_reduce(&self, tensor: &Tensor, _tag: Tag) -> Result<Box<dyn Work>, Error> {
        let mut held = Vec::new();
        if is_summed_in_parts(tensor)
            && let Some(incoming) = self.incoming(tensor)?
        {
            let part = tensor.numel() as i64 / i64::from(self.rank.world);
            held.push(self.pool.take(tensor.kind(), part, Device::Cpu)?);
            let mut sums = self.sums();
            sums.push_back(incoming);
            if sums.len() >= SUMS_UNDER_WAY
                && let Some(done) = sums.pop_front()
            {
                self.pool.put(done);
            }
        }
        Ok(self.work(tensor, 2, &self.reduced_bytes, held))
    }

    fn barrier(&self) -> Result<(), Error> {
        Ok(())
    }

    fn abort(&self, _reason: &str) {}
}

impl Simulated {
    fn check(&self, op: &'static str, whole: &Tensor, part: Option<&Tensor>) -> Result<(), Error> {
        let world = self.rank.world as usize;
        let fits = match part {
            Some(part) => part.numel() * world == whole.numel(),
            None => whole.numel().is_multiple_of(world),
        };
        if fits && whole.is_contiguous() && self.rank.rank < self.rank.world {
            return Ok(());
        }
        let rule = format!("the tensor must be contiguous, of {world} equal parts");
        Err(Error::Tensor { op, rule, got: format!("{:?}", whole.size()) })
    }
}

/// Ready at an instant.
struct Delayed {
    ready: Instant,
    pool: Arc<Pool>,
    /// What the operation keeps until it is waited for.
    held: Vec<Tensor>,
}

impl Work for Delayed {
    fn wait(self: Box<Self>) -> Result<(), Error> {
        std::thread::sleep(self.ready.saturating_duration_since(Instant::now()));
        for tensor in self.held {
            self.pool.put(tensor);
        }
        Ok(())
    }
}

fn backend(error: tch::TchError) -> Error {
    Error::Backend(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAG: Tag = Tag { unit: None, what: "test" };
    const RANK: Rank = Rank { rank: 1, world: 3 };

    fn floats(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor).unwrap()
    }

    #[test]
    fn a_gather_repeats_this_ranks_part() {
        let buffer = Tensor::from_slice(&[0f32, 0.0, 1.0, 2.0, 0.0, 0.0]);
        Simulated::new(RANK, None).all_gather(&buffer, TAG).unwrap().wait().unwrap();
        assert_eq!(floats(&buffer), [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]);
    }

    #[test]
    fn a_reduce_scatter_takes_this_ranks_part() {
        let input = Tensor::from_slice(&[0f32, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let output = Tensor::from_slice(&[9f32, 9.0]);
        Simulated::new(RANK, None).reduce_scatter(&input, &output, TAG).unwrap().wait().unwrap();
        assert_eq!(floats(&output), [2.0, 3.0]);
    }

    #[test]
    fn an_operation_takes_as_long_as_the_bus_would() {
        // 2/3 of 300 kB at 10 MB/s.
        let buffer = Tensor::zeros([75_000], (Kind::Float, Device::Cpu));
        let began = Instant::now();
        let work = Simulated::new(RANK, Some(1e7)).all_gather(&buffer, TAG).unwrap();
        work.wait().unwrap();
        assert!(began.elapsed() >= Duration::from_millis(20), "{:?}", began.elapsed());
    }

    #[test]
    fn parts_that_are_not_equal_are_refused() {
        let buffer = Tensor::zeros([7], (Kind::Float, Device::Cpu));
        assert!(Simulated::new(RANK, None).all_gather(&buffer, TAG).is_err());
    }

    #[test]
    fn traffic_is_counted_as_a_ring_would_send_it() {
        let comm = Simulated::new(RANK, None);
        let whole = Tensor::zeros([3 * 6000], (Kind::Float, Device::Cpu));
        let part = Tensor::zeros([6000], (Kind::Float, Device::Cpu));
        comm.all_gather(&whole, TAG).unwrap().wait().unwrap();
        comm.reduce_scatter(&whole, &part, TAG).unwrap().wait().unwrap();
        comm.all_reduce(&whole, TAG).unwrap().wait().unwrap();
        // Two thirds of 72 kB once, and of as much again three times.
        assert_eq!(comm.take_traffic(), Traffic { gathered_bytes: 48_000, reduced_bytes: 144_000 });
        assert_eq!(comm.take_traffic(), Traffic { gathered_bytes: 0, reduced_bytes: 0 });
    }
}
