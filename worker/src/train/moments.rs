//! AdamW's moments: in fp32, in memory that a GPU pages from the host, or in 8 bits block by block
//! (Dettmers et al. 2022).
//!
//! Checkpoints hold them in fp32 whatever they are here. A block's scale is its largest value with its
//! sign, which is exact, and so quantising what was dequantised gives the same codes again.

use tch::{Device, Kind, Tensor};
use tunefleet_kernels::quant::{self, DOUBLE_BLOCK};
use tunefleet_kernels::{Error, device};
use tunefleet_proto::job::Optimizer;

use super::units::Run;

/// Weights that share a scale.
const BLOCK: i64 = DOUBLE_BLOCK;

/// The moments of one shard.
pub enum Moments {
    /// In fp32.
    Fp32 {
        /// First moment.
        exp_avg: Tensor,
        /// Second moment.
        exp_avg_sq: Tensor,
    },
    /// In 8 bits; blocks begin anew with each run.
    Bits8 {
        /// Elements of the shard.
        len: i64,
        /// In the order of the shard.
        runs: Vec<Run8>,
    },
}

/// One run in 8 bits.
pub struct Run8 {
    /// Which elements.
    pub run: Run,
    /// First moment.
    pub exp_avg: Coded,
    /// Second moment.
    pub exp_avg_sq: Coded,
}

/// Codes and the scales of their blocks.
pub struct Coded {
    /// A byte per element.
    pub codes: Tensor,
    /// fp32, one per block: its largest value, with its sign.
    pub scales: Tensor,
    /// The dynamic code that the bytes refer to.
    pub code8: Tensor,
}

impl Moments {
    /// All zero, for a shard of `len` elements.
    ///
    /// # Errors
    /// Where memory of that kind is not to be had.
    pub fn zeros(len: i64, runs: &[Run], device: Device, optimizer: Optimizer) -> Result<Self, Error> {
        let zeros = || Tensor::zeros([len], (Kind::Float, device));
        match (optimizer, device) {
            // There is no managed memory of no size.
            (Optimizer::AdamWPaged, Device::Cuda(index)) if len > 0 => Ok(Moments::Fp32 {
                exp_avg: device::managed_zeros(len, index)?,
                exp_avg_sq: device::managed_zeros(len, index)?,
            }),
            (Optimizer::AdamW | Optimizer::AdamWPaged, _) => {
                Ok(Moments::Fp32 { exp_avg: zeros(), exp_avg_sq: zeros() })
            }
            (Optimizer::AdamW8bit, _) => {
                let signed = quant::dynamic_code(true, device)?;
                let unsigned = quant::dynamic_code(false, device)?;
                let run8 = |run: &Run| {
                    let coded = |code8: &Tensor| Coded::zeros(run.end - run.begin, device, code8);
                    Ok(Run8 { run: *run, exp_avg: coded(&signed)?, exp_avg_sq: coded(&unsigned)? })
                };
                Ok(Moments::Bits8 { len, runs: runs.iter().map(run8).collect::<Result<_, Error>>()? })
            }
        }
    }

    /// Both moments in fp32: the tensors themselves where they are that.
    ///
    /// # Errors
    /// Whatever dequantising meets.
    pub fn to_fp32(&self) -> Result<[Tensor; 2], Error> {
        match self {
            Moments::Fp32 { exp_avg, exp_avg_sq } => {
                Ok([exp_avg.shallow_clone(), exp_avg_sq.shallow_clone()])
            }
            Moments::Bits8 { len, runs } => {
                let device = runs.first().map_or(Device::Cpu, |run| run.exp_avg.codes.device());
                let out = [(); 2].map(|()| Tensor::zeros([*len], (Kind::Float, device)));
                for Run8 { run, exp_avg, exp_avg_sq } in runs {
                    for (coded, out) in [exp_avg, exp_avg_sq].into_iter().zip(&out) {
                        let part = out.narrow(0, run.begin, run.end - run.begin);
                        quant::dequantize_8bit(&coded.codes, &coded.scales, &coded.code8, BLOCK, &part)?;
                    }
                }
                Ok(out)
            }
        }
    }

    /// Takes both moments from fp32 tensors; those of [`Moments::to_fp32`] may have been written to.
    ///
    /// # Errors
    /// Whatever quantising meets.
    pub fn restore(&self, [from_avg, from_avg_sq]: &[Tensor; 2]) -> Result<(), Error> {
        match self {
            Moments::Fp32 { exp_avg, exp_avg_sq } => {
                for (own, from) in [(exp_avg, from_avg), (exp_avg_sq, from_avg_sq)] {
                    if own.data_ptr() != from.data_ptr() {
                        own.shallow_clone().copy_(from);
                    }
                }
                Ok(())
            }
            Moments::Bits8 { runs, .. } => {
                for Run8 { run, exp_avg, exp_avg_sq } in runs {
                    for (coded, from) in [(exp_avg, from_avg), (exp_avg_sq, from_avg_sq)] {
                        coded.set(&from.narrow(0, run.begin, run.end - run.begin))?;
                    }
                }
                Ok(())
            }
        }
    }
}

impl Coded {
    fn zeros(len: i64, device: Device, code8: &Tensor) -> Result<Self, Error> {
        let blocks = quant::blocks(len, BLOCK);
        let coded = Coded {
            codes: Tensor::zeros([len], (Kind::Uint8, device)),
            scales: Tensor::zeros([blocks], (Kind::Float, device)),
            code8: code8.shallow_clone(),
        };
        Ok(coded)
    }

    /// The nearest code of each value. On the CPU, whose codes the GPU's arithmetic has as well.
    fn set(&self, values: &Tensor) -> Result<(), Error> {
        let there = |t: &Tensor| t.to_device(Device::Cpu);
        let (values, code8) = (there(values).contiguous(), there(&self.code8));
        let (codes, scales) = (there(&self.codes).copy(), there(&self.scales).copy());
        quant::quantize_8bit_signed(&values, &code8, BLOCK, &codes, &scales)?;
        self.codes.shallow_clone().copy_(&codes);
        self.scales.shallow_clone().copy_(&scales);
        Ok(())
    }
}
