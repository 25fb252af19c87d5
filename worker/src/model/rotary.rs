//! Rotary positions: turns of the tokens of a batch, made once for all blocks.

use tch::{Device, Kind, Tensor};
use tunefleet_proto::model::{ModelConfig, Positions as ModelPositions};

use super::embed::Positions;

/// How a model's positions turn its heads.
#[derive(Debug)]
pub struct Rotary {
    /// Of each pair from one position to the next, `[C / 2]`, fp32, on the device: nothing is brought there in a step.
    inverse_frequencies: Tensor,
    /// What sines and cosines are multiplied by.
    factor: f64,
}

/// Turns of each position of a row, or of each token of a batch.
#[derive(Debug)]
pub struct Turns {
    /// `[R, 2, C / 2]`, fp32: cosines and sines.
    turns: Tensor,
}

impl Rotary {
    /// Of `config`'s positions; `None` where they are learned.
    pub fn new(config: &ModelConfig, device: Device) -> Option<Self> {
        let ModelPositions::Rotary(rope) = &config.positions else { return None };
        let inverse_frequencies = Tensor::from_slice(&rope.inverse_frequencies(config.head_dim()));
        let inverse_frequencies = inverse_frequencies.to_device(device);
        Some(Rotary { inverse_frequencies, factor: rope.attention_factor() })
    }

    /// For tokens `[B, T]` at `positions`.
    pub fn turns(&self, tokens_bt: &Tensor, positions: Positions<'_>) -> Turns {
        let positions_r = match positions {
            Positions::From(first) => {
                let tokens = tokens_bt.size().last().copied().unwrap_or(0);
                Tensor::arange_start(first, first + tokens, (Kind::Float, tokens_bt.device()))
            }
            Positions::Each(positions_bt) => positions_bt.reshape([-1]).to_kind(Kind::Float),
        };
        let angles_rc = positions_r.unsqueeze(1) * self.inverse_frequencies.unsqueeze(0);
        let mut turns = Tensor::stack(&[angles_rc.cos(), angles_rc.sin()], 1);
        if self.factor != 1.0 {
            turns *= self.factor;
        }
        Turns { turns }
    }
}

impl Turns {
    /// Heads side by side, `[B, T, F]`, turned; differentiable.
    ///
    /// # Panics
    /// Where libtorch fails, as every operation of tch does.
    pub fn turn(&self, heads_btf: &Tensor) -> Tensor {
        tunefleet_kernels::fused::rotate(heads_btf, &self.turns).unwrap_or_else(|error| panic!("{error}"))
    }
}
