//! What stands before the first block and behind the last: embeddings, final norm, head and loss.

use tch::Tensor;

use super::{Batch, MicroPosition, Walk};
use crate::model::embed;
use crate::model::head::{self, HeadParams};
use crate::train::Error;
use crate::train::units::{self, EMBED};

/// The head's gradients, of what is trained.
struct HeadGrads<'t> {
    norm_weight: Option<&'t Tensor>,
    norm_bias: Option<&'t Tensor>,
    weight_vd: Option<&'t Tensor>,
}

impl Walk<'_> {
    /// The embeddings' parameters, of whatever origin.
    pub(super) fn gathered_embed(&mut self) -> Result<Vec<Tensor>, Error> {
        let trained = self.gather_now(EMBED)?;
        Ok(match &mut self.frozen {
            None => trained,
            Some(frozen) => {
                let trained: Vec<Tensor> = trained.iter().map(|t| t.to_kind(self.numerics.kind)).collect();
                frozen.wiring.embed(&frozen.base.embed(self.mesh.shards)?, &trained)
            }
        })
    }

    /// Embeddings and their dropout mask.
    pub(super) fn embed(
        &self,
        params: &[Tensor],
        batch: &Batch,
        position: MicroPosition,
    ) -> (Tensor, Option<Tensor>) {
        let x = embed::forward(&params[0], &params[1], &batch.tokens_bt, batch.positions());
        let dropout = self.config.dropout.embedding;
        if dropout == 0.0 {
            return (x, None);
        }
        let _ = self.seed(position, EMBED);
        let (x, mask) = x.native_dropout(dropout, true);
        (x, Some(mask))
    }

    pub(super) fn embed_backward(&self, dx: Tensor, mask: Option<Tensor>, batch: &Batch) {
        let dx = match mask {
            Some(mask) => {
                let scale = 1.0 / (1.0 - self.config.dropout.embedding);
                Tensor::native_dropout_backward(&dx, &mask, scale)
            }
            None => dx,
        };
        let grads = self.embed_grads();
        embed::backward(&dx, &batch.tokens_bt, batch.positions(), grads[0].as_ref(), grads[1].as_ref());
    }

    pub(super) fn loss_and_dx(
        &mut self,
        embed_params: &[Tensor],
        x: &Tensor,
        batch: &Batch,
        scale: &Tensor,
    ) -> Result<(Tensor, Tensor), Error> {
        let leaf = |t: &Tensor| t.detach().set_requires_grad(true);
        let head = self.head(embed_params);
        let wide = |t: &Tensor| leaf(&t.to_kind(self.numerics.product_kind));
        let (x, norm_weight, norm_bias) = (wide(x), wide(head.norm_weight), wide(head.norm_bias));
        let with_leaves =
            HeadParams { norm_weight: &norm_weight, norm_bias: &norm_bias, weight_vd: head.weight_vd };
        let h_btd = head::norm(&with_leaves, &x, self.config.norm_epsilon);
        let grads = self.embed_grads();
        let dhead = self.head_grads(&grads);
        let mut scratch = std::mem::take(&mut self.head_scratch);
        let (loss, dh_nd) = tch::no_grad(|| {
            head::loss_sum_and_grads(
                self.numerics,
                head.weight_vd,
                &h_btd.detach().reshape([-1, self.config.hidden_size as i64]),
                &batch.targets_bt.reshape([-1]),
                scale,
                dhead.weight_vd,
                &mut scratch,
            )
        })?;
        let dh_btd = dh_nd.view_as(&h_btd);
        let mut dnorm = tunefleet_kernels::autograd::grad(&h_btd, &dh_btd, &[x, norm_weight, norm_bias])?;
        let dx = dnorm.remove(0);
        tch::no_grad(|| {
            for (into, grad) in [dhead.norm_weight, dhead.norm_bias].into_iter().zip(&dnorm) {
                if let Some(into) = into {
                    let _ = into.shallow_clone().g_add_(grad);
                }
            }
        });
        self.head_scratch = scratch;
        Ok((loss, dx))
    }

    /// Of each of the embeddings' parameters the gradient so far, where it is trained.
    fn embed_grads(&self) -> Vec<Option<Tensor>> {
        let grads = units::views(&self.plan.units[EMBED], &self.embed_grad);
        match &self.frozen {
            None => grads.into_iter().map(Some).collect(),
            Some(frozen) => frozen.wiring.embed_grads(&grads),
        }
    }

    /// The head among the embeddings' tensors, see `ModelConfig::embed_parameters`.
    pub(super) fn head<'t>(&self, embed: &'t [Tensor]) -> HeadParams<'t> {
        let [weight_vd, norm_weight, norm_bias] = self.head_indices(embed.len()).map(|i| &embed[i]);
        HeadParams { norm_weight, norm_bias, weight_vd }
    }

    fn head_grads<'t>(&self, embed: &'t [Option<Tensor>]) -> HeadGrads<'t> {
        let [weight_vd, norm_weight, norm_bias] = self.head_indices(embed.len()).map(|i| embed[i].as_ref());
        HeadGrads { norm_weight, norm_bias, weight_vd }
    }

    /// Where the output embedding and the final norm stand.
    fn head_indices(&self, parameters: usize) -> [usize; 3] {
        [if self.config.tied_head { 0 } else { 2 }, parameters - 2, parameters - 1]
    }
}
