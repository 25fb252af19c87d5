//! Token and learned position embeddings, with the backward pass written out: a dense gradient of the
//! vocabulary's size per micro-batch would cost more than the lookup.

use tch::{Kind, Tensor};

/// Where the tokens of a batch stand.
#[derive(Debug, Clone, Copy)]
pub enum Positions<'a> {
    /// In each row one after the other, from here on.
    From(i64),
    /// `[B, T]`, int64: each where this says.
    Each(&'a Tensor),
}

/// `wte[tokens] + wpe[positions]`, `[B, T, D]` in the tables' dtype; without the second table, the first's rows.
pub fn forward(
    wte_vd: &Tensor,
    wpe_pd: Option<&Tensor>,
    tokens_bt: &Tensor,
    positions: Positions<'_>,
) -> Tensor {
    let tokens = Tensor::embedding(wte_vd, tokens_bt, -1, false, false);
    let Some(wpe_pd) = wpe_pd else { return tokens };
    let positions = match positions {
        Positions::From(first) => wpe_pd.narrow(0, first, tokens_bt.size()[1]),
        Positions::Each(positions_bt) => Tensor::embedding(wpe_pd, positions_bt, -1, false, false),
    };
    tokens + positions
}

/// Adds the gradients of the fp32 tables, of those that are trained.
pub fn backward(
    dx_btd: &Tensor,
    tokens_bt: &Tensor,
    positions: Positions<'_>,
    dwte_vd: Option<&Tensor>,
    dwpe_pd: Option<&Tensor>,
) {
    let (tokens, width) = (dx_btd.size()[1], dx_btd.size()[2]);
    let dx_btd = dx_btd.to_kind(Kind::Float);
    let add_rows = |table: &Tensor, ids_bt: &Tensor| {
        let _ = table.shallow_clone().index_add_(0, &ids_bt.reshape([-1]), &dx_btd.reshape([-1, width]));
    };
    if let Some(dwte_vd) = dwte_vd {
        add_rows(dwte_vd, tokens_bt);
    }
    match (dwpe_pd, positions) {
        (None, _) => {}
        (Some(dwpe_pd), Positions::Each(positions_bt)) => add_rows(dwpe_pd, positions_bt),
        (Some(dwpe_pd), Positions::From(first)) => {
            let _ = dwpe_pd.narrow(0, first, tokens).g_add_(&dx_btd.sum_dim_intlist(0, false, None));
        }
    }
}
