//! The frozen base of an adapter: quantised, sharded over ranks, gathered and dequantised block by
//! block into one scratch buffer that serves the forward pass, the recomputation and the backward pass.
//!
//! Weights are read from a model directory once, quantised as they stream by, and kept on disk as the
//! bytes that are gathered (`cache`); nobody ever holds the unquantised model.

/// Tensors to bytes of a unit and back.
pub mod encode;
/// The quantised base on disk.
pub mod cache;

use tch::{Device, Kind, Tensor};
use tunefleet_kernels::quant;
use tunefleet_proto::base_plan::{BasePlan, BaseTensor, BaseUnit, Encoding};
use tunefleet_proto::job::Residency;

use crate::comm::Communicator;
use crate::model::numerics::Numerics;
use crate::train::units::{EMBED, Gathered};

/// A base on one rank.
pub struct Base {
    plan: BasePlan,
    numerics: Numerics,
    /// This rank's bytes of each unit.
    shards: Vec<Tensor>,
    gathered: Gathered,
    scratch: Scratch,
}

/// Dequantised linears of one block, in the dtype of products.
struct Scratch {
    buffer: Tensor,
    /// Block whose values it holds.
    holds: Option<usize>,
    /// The dynamic code of nested scales.
    code8: Tensor,
}

/// What using a base can meet.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A gather.
    #[error(transparent)]
    Comm(#[from] crate::comm::Error),
    /// Dequantising.
    #[error(transparent)]
    Kernel(#[from] tunefleet_kernels::Error),
}

impl Base {
    /// A base over `shards` of `world` ranks, one per unit of `plan`: [`cache::open`] makes them.
    ///
    /// # Errors
    /// Whatever libtorch refuses.
    pub fn new(
        plan: BasePlan,
        shards: Vec<Tensor>,
        world: u32,
        numerics: Numerics,
        residency: &Residency,
        poison: bool,
    ) -> Result<Self, tunefleet_kernels::Error> {
        let sizes: Vec<u64> = plan.units.iter().map(|unit| unit.padded_bytes(world)).collect();
        let of_shards: Vec<&Tensor> = shards.iter().collect();
        let bytes = (Kind::Uint8, numerics.device);
        let gathered = Gathered::new(&sizes, &of_shards, world, bytes, residency, poison);
        let largest = plan.units.iter().map(BaseUnit::quantized_elements).max().unwrap_or(0);
        let scratch = Scratch {
            buffer: Tensor::zeros([largest as i64], (numerics.product_kind, numerics.device)),
            holds: None,
            code8: quant::dynamic_code(true, numerics.device)?,
        };
        Ok(Base { plan, numerics, shards, gathered, scratch })
    }

    /// Starts to gather a unit, unless it is there.
    ///
    /// # Errors
    /// Whatever the communicator refuses.
    pub fn start(&mut self, unit: usize, comm: &dyn Communicator) -> Result<(), Error> {
        Ok(self.gathered.start(unit, &self.shards[unit], comm)?)
    }

    /// Parameters outside the blocks, in their own dtype.
    ///
    /// # Errors
    /// Whatever the gather meets.
    pub fn embed(&mut self, comm: &dyn Communicator) -> Result<Vec<Tensor>, Error> {
        self.start(EMBED, comm)?;
        let buffer = self.gathered.wait(EMBED)?;
        let tensors = &self.plan.units[EMBED].tensors;
        Ok(tensors.iter().filter_map(|tensor| plain(tensor, buffer)).collect())
    }

    /// Parameters of block `i`, in the dtype of products. The linears lie in a scratch: those of another
    /// block replace them.
    ///
    /// # Errors
    /// Whatever gathering or dequantising meets.
    pub fn block(&mut self, i: usize, comm: &dyn Communicator) -> Result<Vec<Tensor>, Error> {
        let unit = i + 1;
        self.start(unit, comm)?;
        let buffer = self.gathered.wait(unit)?;
        let current = self.scratch.holds.replace(i) == Some(i);
        let mut end = 0;
        let mut out = Vec::with_capacity(self.plan.units[unit].tensors.len());
        for tensor in &self.plan.units[unit].tensors {
            if let Some(values) = plain(tensor, buffer) {
                out.push(values.to_kind(self.numerics.product_kind));
                continue;
            }
            let shape: Vec<i64> = tensor.shape.iter().map(|&n| n as i64).collect();
            let len = tensor.elements() as i64;
            let values = self.scratch.buffer.narrow(0, end, len).view(shape.as_slice());
            // 64 elements, as `BaseUnit::quantized_elements` counts.
            end = (end + len + 63) / 64 * 64;
            if !current {
                encode::dequantize(tensor, self.plan.quantization, buffer, &self.scratch.code8, &values)?;
            }
            out.push(values);
        }
        Ok(out)
    }
}

/// An unquantised tensor of a unit, as a view; `None` for another.
pub fn plain(tensor: &BaseTensor, buffer: &Tensor) -> Option<Tensor> {
    let Encoding::Plain(part) = &tensor.encoding else { return None };
    let shape: Vec<i64> = tensor.shape.iter().map(|&n| n as i64).collect();
    Some(encode::view(buffer, part).view(shape.as_slice()))
}

/// Where bytes are quantised: results of the two differ in a few codes.
pub(crate) fn device_name(device: Device) -> &'static str {
    if device == Device::Cpu { "cpu" } else { "cuda" }
}
