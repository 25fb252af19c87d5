//! Loss and logits without gradients.

use tch::Tensor;

use super::blocks::Direction;
use super::{Batch, Walk};
use crate::model::block::BlockShape;
use crate::model::{head, numerics};
use crate::train::Error;

impl Walk<'_> {
    /// Sum of the loss over counted targets (fp64 scalar on the device), without dropout or grad.
    ///
    /// # Errors
    /// Whatever a collective meets.
    pub fn evaluate(&mut self, batch: &Batch) -> Result<Tensor, Error> {
        let (h_btd, embed_params) = self.forward(batch)?;
        let width = self.config.hidden_size as i64;
        let head = self.head(&embed_params);
        let (h_nd, targets_n) = (h_btd.reshape([-1, width]), batch.targets_bt.reshape([-1]));
        Ok(tch::no_grad(|| head::loss_sum(self.numerics, head.weight_vd, &h_nd, &targets_n))?)
    }

    /// Logits in fp32, `[B, T, V]`, without dropout or grad.
    ///
    /// # Errors
    /// Whatever a collective meets.
    pub fn logits(&mut self, tokens_bt: &Tensor) -> Result<Tensor, Error> {
        let batch = Batch::new(tokens_bt.shallow_clone(), tokens_bt.shallow_clone());
        let (h_btd, embed_params) = self.forward(&batch)?;
        Ok(tch::no_grad(|| head::logits(self.numerics, self.head(&embed_params).weight_vd, &h_btd)))
    }

    /// Normed states of the last block, and the embeddings' parameters.
    fn forward(&mut self, batch: &Batch) -> Result<(Tensor, Vec<Tensor>), Error> {
        let shape = BlockShape::new(&self.config, false);
        let embed_params = self.gathered_embed()?;
        let (mut x, turns) =
            tch::no_grad(|| (self.embedded(&embed_params, batch), batch.turns(self.rotary.as_ref())));
        for i in 0..self.plan.units.len() - 1 {
            let weights = self.gathered_block(i, Direction::Forward)?;
            let shape = shape.of_block(i);
            let sight = || (turns.as_ref(), batch.documents.as_ref().into());
            x = tch::no_grad(|| self.forward_block(&shape, i, &weights, &x, sight(), false));
        }
        let h = tch::no_grad(|| numerics::norm(&self.head(&embed_params).norm, &x, self.config.norm_epsilon));
        Ok((h, embed_params))
    }
}
