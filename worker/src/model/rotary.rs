//! Turns of the tokens of a batch, made once for all blocks.

use tch::{Kind, Tensor};
use tunefleet_proto::model::{ModelConfig, Positions as ModelPositions};

use super::embed::Positions;

/// Turns of each position of a row, or of each token of a batch, for models with rotary positions.
#[derive(Debug)]
pub struct Turns {
    /// `[R, 2, C / 2]`, fp32: cosines and sines.
    turns: Tensor,
}

impl Turns {
    /// For tokens `[B, T]` at `positions`; `None` for a model that learns its positions.
    pub fn of(config: &ModelConfig, tokens_bt: &Tensor, positions: Positions<'_>) -> Option<Self> {
        let ModelPositions::Rotary(rope) = &config.positions else { return None };
        let device = tokens_bt.device();
        let positions_r = match positions {
            Positions::From(first) => {
                let tokens = tokens_bt.size().last().copied().unwrap_or(0);
                Tensor::arange_start(first, first + tokens, (Kind::Float, device))
            }
            Positions::Each(positions_bt) => positions_bt.reshape([-1]).to_kind(Kind::Float),
        };
        let turns_c = Tensor::from_slice(&rope.inverse_frequencies(config.head_dim())).to_device(device);
        let angles_rc = positions_r.unsqueeze(1) * turns_c.unsqueeze(0);
        let mut turns = Tensor::stack(&[angles_rc.cos(), angles_rc.sin()], 1);
        let factor = rope.attention_factor();
        if factor != 1.0 {
            turns *= factor;
        }
        Some(Turns { turns })
    }

    /// Heads side by side, `[B, T, F]`, turned; differentiable.
    ///
    /// # Panics
    /// Where libtorch fails, as every operation of tch does.
    pub fn turn(&self, heads_btf: &Tensor) -> Tensor {
        tunefleet_kernels::fused::rotate(heads_btf, &self.turns).unwrap_or_else(|error| panic!("{error}"))
    }
}
