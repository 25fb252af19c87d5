//! What stands before the first block and behind the last: embeddings, final norm, head and loss.

use tch::Tensor;

use super::{Batch, MicroPosition, Walk};
use crate::model::block::Norm;
use crate::model::embed::{self, TableGrad};
use crate::model::head::{self, HeadParams};
use crate::model::numerics;
use crate::train::Error;
use crate::train::units::{self, EMBED};

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

    /// Embeddings without dropout.
    pub(super) fn embedded(&self, params: &[Tensor], batch: &Batch) -> Tensor {
        let layout = self.config.embed_layout();
        let positions = layout.positions.map(|at| &params[at]);
        embed::forward(&params[layout.tokens], positions, &batch.tokens_bt, batch.positions())
    }

    /// Embeddings and their dropout mask.
    pub(super) fn embed(
        &self,
        params: &[Tensor],
        batch: &Batch,
        position: MicroPosition,
    ) -> (Tensor, Option<Tensor>) {
        let x = self.embedded(params, batch);
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
        let (grads, layout) = (self.embed_grads(), self.config.embed_layout());
        let positions = layout.positions.and_then(|at| grads[at].as_ref());
        embed::backward(&dx, &batch.tokens_bt, batch.positions(), grads[layout.tokens].as_ref(), positions);
    }

    pub(super) fn loss_and_dx(
        &mut self,
        embed_params: &[Tensor],
        x: &Tensor,
        batch: &Batch,
        scale: &Tensor,
    ) -> Result<(Tensor, Tensor), Error> {
        let leaf = |t: &Tensor| t.detach().set_requires_grad(true);
        let wide = |t: &Tensor| leaf(&t.to_kind(self.numerics.product_kind));
        let (head, layout) = (self.head(embed_params), self.config.embed_layout());
        let leaves: Vec<Tensor> =
            [Some(x), Some(head.norm.weight), head.norm.bias].into_iter().flatten().map(wide).collect();
        let final_norm = Norm { weight: &leaves[1], bias: leaves.get(2) };
        let h_btd = numerics::norm(&final_norm, &leaves[0], self.config.norm_epsilon);
        let grads = self.embed_grads();
        let mut scratch = std::mem::take(&mut self.head_scratch);
        let (loss, dh_nd) = tch::no_grad(|| {
            head::loss_sum_and_grads(
                self.numerics,
                head.weight_vd,
                &h_btd.detach().reshape([-1, self.config.hidden_size as i64]),
                &batch.targets_bt.reshape([-1]),
                scale,
                grads[layout.head].as_ref(),
                &mut scratch,
            )
        })?;
        let dh_btd = dh_nd.view_as(&h_btd);
        let mut dnorm = tunefleet_kernels::autograd::grad(&h_btd, &dh_btd, &leaves)?;
        let dx = dnorm.remove(0);
        tch::no_grad(|| {
            let into = [Some(layout.norm_weight), layout.norm_bias].into_iter().flatten();
            for (at, grad) in into.zip(&dnorm) {
                if let Some(TableGrad::Whole(into)) = &grads[at] {
                    let _ = into.shallow_clone().g_add_(grad);
                }
            }
        });
        self.head_scratch = scratch;
        Ok((loss, dx))
    }

    /// Of each of the embeddings' parameters the gradient so far, where it is trained.
    fn embed_grads(&self) -> Vec<Option<TableGrad>> {
        let grads = units::views(&self.plan.units[EMBED], &self.embed_grad);
        match &self.frozen {
            None => grads.into_iter().map(|grad| Some(TableGrad::Whole(grad))).collect(),
            Some(frozen) => frozen.wiring.embed_grads(&grads),
        }
    }

    /// The head among the embeddings' tensors.
    pub(super) fn head<'t>(&self, embed: &'t [Tensor]) -> HeadParams<'t> {
        HeadParams::of(&self.config.embed_layout(), embed)
    }
}
