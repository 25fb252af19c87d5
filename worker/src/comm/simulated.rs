//! Rank r of N with no peers: what one rank of a large job computes and holds, measured on one
//! device. Values of other ranks are made up; memory and order of operations are real.

use std::time::{Duration, Instant};

use tch::Tensor;
use tunefleet_proto::ids::Rank;

use super::{Communicator, Error, Tag, Work};

/// A communicator that plays all peers.
#[derive(Debug, Clone, Copy)]
pub struct Simulated {
    rank: Rank,
    bus_bytes_per_second: Option<f64>,
}

impl Simulated {
    /// Rank `rank.rank` of `rank.world`. With a bandwidth, each operation takes the time that a
    /// ring over such a bus would; without one, none.
    pub fn new(rank: Rank, bus_bytes_per_second: Option<f64>) -> Self {
        Simulated { rank, bus_bytes_per_second }
    }

    /// `tensor`, cut into one part per rank.
    fn parts(&self, tensor: &Tensor) -> Vec<Tensor> {
        tensor.detach().view(-1).chunk(i64::from(self.rank.world), 0)
    }

    /// Done when a ring has passed `passes` x (N - 1) / N of `tensor` over the bus.
    fn work(&self, tensor: &Tensor, passes: f64) -> Box<dyn Work> {
        let world = f64::from(self.rank.world);
        let bytes =
            (tensor.numel() * tensor.kind().elt_size_in_bytes()) as f64 * passes * (world - 1.0) / world;
        let delay = self.bus_bytes_per_second.map_or(0.0, |bandwidth| bytes / bandwidth);
        Box::new(Delayed(Instant::now() + Duration::try_from_secs_f64(delay).unwrap_or_default()))
    }
}

impl Communicator for Simulated {
    fn rank(&self) -> Rank {
        self.rank
    }

    /// Every rank's part becomes this rank's.
    fn all_gather(&self, buffer: &Tensor, _tag: Tag) -> Result<Box<dyn Work>, Error> {
        self.check("all-gather", buffer, None)?;
        let mut parts = self.parts(buffer);
        let mine = parts.swap_remove(self.rank.rank as usize);
        for mut part in parts {
            part.f_copy_(&mine).map_err(backend)?;
        }
        Ok(self.work(buffer, 1.0))
    }

    /// This rank's part alone.
    fn reduce_scatter(&self, input: &Tensor, output: &Tensor, _tag: Tag) -> Result<Box<dyn Work>, Error> {
        self.check("reduce-scatter", input, Some(output))?;
        let mine = self.parts(input).swap_remove(self.rank.rank as usize);
        output.detach().view(-1).f_copy_(&mine).map_err(backend)?;
        Ok(self.work(input, 1.0))
    }

    /// As it is.
    fn all_reduce(&self, tensor: &Tensor, _tag: Tag) -> Result<Box<dyn Work>, Error> {
        Ok(self.work(tensor, 2.0))
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
struct Delayed(Instant);

impl Work for Delayed {
    fn wait(self: Box<Self>) -> Result<(), Error> {
        std::thread::sleep(self.0.saturating_duration_since(Instant::now()));
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
        let buffer = Tensor::zeros([75_000], (tch::Kind::Float, tch::Device::Cpu));
        let began = Instant::now();
        let work = Simulated::new(RANK, Some(1e7)).all_gather(&buffer, TAG).unwrap();
        work.wait().unwrap();
        assert!(began.elapsed() >= Duration::from_millis(20), "{:?}", began.elapsed());
    }

    #[test]
    fn parts_that_are_not_equal_are_refused() {
        let buffer = Tensor::zeros([7], (tch::Kind::Float, tch::Device::Cpu));
        assert!(Simulated::new(RANK, None).all_gather(&buffer, TAG).is_err());
    }
}
