//! Token and position embeddings, with the backward pass written out: a dense gradient of the
//! vocabulary's size per micro-batch would cost more than the lookup.

use tch::{Kind, Tensor};

/// `wte[tokens] + wpe[first_position..]`, `[B, T, D]` in the tables' dtype.
pub fn forward(wte_vd: &Tensor, wpe_pd: &Tensor, tokens_bt: &Tensor, first_position: i64) -> Tensor {
    let positions = wpe_pd.narrow(0, first_position, tokens_bt.size()[1]);
    Tensor::embedding(wte_vd, tokens_bt, -1, false, false) + positions
}

/// Adds the gradients of the fp32 tables, of those that are trained.
pub fn backward(dx_btd: &Tensor, tokens_bt: &Tensor, dwte_vd: Option<&Tensor>, dwpe_pd: Option<&Tensor>) {
    let (tokens, width) = (dx_btd.size()[1], dx_btd.size()[2]);
    let dx_btd = dx_btd.to_kind(Kind::Float);
    if let Some(dwte_vd) = dwte_vd {
        let rows = dx_btd.reshape([-1, width]);
        let _ = dwte_vd.shallow_clone().index_add_(0, &tokens_bt.reshape([-1]), &rows);
    }
    if let Some(dwpe_pd) = dwpe_pd {
        let _ = dwpe_pd.narrow(0, 0, tokens).g_add_(&dx_btd.sum_dim_intlist(0, false, None));
    }
}
