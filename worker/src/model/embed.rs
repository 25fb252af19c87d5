//! Token and learned position embeddings, with the backward pass written out: a dense gradient of the
//! vocabulary's size per micro-batch would cost more than the lookup.

use tch::{Device, Kind, Tensor};

/// Where the tokens of a batch stand.
#[derive(Debug, Clone, Copy)]
pub enum Positions<'a> {
    /// In each row one after the other, from here on.
    From(i64),
    /// `[B, T]`, int64: each where this says.
    Each(&'a Tensor),
}

/// A few rows of a table of tokens.
#[derive(Debug)]
pub struct Rows {
    /// `[n]`, int64, ascending.
    ids_n: Tensor,
    /// `[V]`, int64: of each token its place among the rows, and `n` of those that are none.
    places_v: Tensor,
}

impl Rows {
    /// Rows `ids` of a table of `vocabulary`.
    pub fn new(ids: &[u64], vocabulary: u64, device: Device) -> Self {
        let ids: Vec<i64> = ids.iter().map(|id| *id as i64).collect();
        let ids_n = Tensor::from_slice(&ids).to_device(device);
        let places_v = Tensor::full([vocabulary as i64], ids.len() as i64, (Kind::Int64, device));
        let order_n = Tensor::arange(ids.len() as i64, (Kind::Int64, device));
        let _ = places_v.shallow_clone().index_copy_(0, &ids_n, &order_n);
        Rows { ids_n, places_v }
    }

    /// The same rows.
    pub fn shallow_clone(&self) -> Self {
        Rows { ids_n: self.ids_n.shallow_clone(), places_v: self.places_v.shallow_clone() }
    }

    /// Puts `values_nd` into the table.
    pub fn put(&self, values_nd: &Tensor, table_vd: &Tensor) {
        let _ = table_vd.shallow_clone().index_copy_(0, &self.ids_n, &values_nd.to_kind(table_vd.kind()));
    }

    /// Columns of what has one for each token, `[.., V]`.
    pub fn columns(&self, of_tokens: &Tensor) -> Tensor {
        of_tokens.index_select(-1, &self.ids_n)
    }
}

/// Where the gradient of a table of tokens goes: fp32.
#[derive(Debug)]
pub enum TableGrad {
    /// `[V, D]`
    Whole(Tensor),
    /// `[n, D]`, of these rows.
    Rows(Rows, Tensor),
}

/// `wte[tokens] + wpe[positions]`, `[B, T, D]` in the tables' dtype; without the second table, the first's rows.
pub fn forward(
    wte_vd: &Tensor,
    wpe_pd: Option<&Tensor>,
    tokens_bt: &Tensor,
    positions: Positions<'_>,
) -> Tensor {
    placed(Tensor::embedding(wte_vd, tokens_bt, -1, false, false), wpe_pd, positions)
}

/// Rows of tokens, `[B, T, D]`, with those of their positions.
pub fn placed(tokens_btd: Tensor, wpe_pd: Option<&Tensor>, positions: Positions<'_>) -> Tensor {
    let Some(wpe_pd) = wpe_pd else { return tokens_btd };
    let positions = match positions {
        Positions::From(first) => wpe_pd.narrow(0, first, tokens_btd.size()[1]),
        Positions::Each(positions_bt) => Tensor::embedding(wpe_pd, positions_bt, -1, false, false),
    };
    tokens_btd + positions
}

/// Adds the gradients of the fp32 tables, of those that are trained.
pub fn backward(
    dx_btd: &Tensor,
    tokens_bt: &Tensor,
    positions: Positions<'_>,
    dwte_vd: Option<&TableGrad>,
    dwpe_pd: Option<&TableGrad>,
) {
    let (tokens, width) = (dx_btd.size()[1], dx_btd.size()[2]);
    let dx_btd = dx_btd.to_kind(Kind::Float);
    let add_rows = |table: &Tensor, ids_bt: &Tensor| {
        let _ = table.shallow_clone().index_add_(0, &ids_bt.reshape([-1]), &dx_btd.reshape([-1, width]));
    };
    match dwte_vd {
        None => {}
        Some(TableGrad::Whole(dwte_vd)) => add_rows(dwte_vd, tokens_bt),
        Some(TableGrad::Rows(rows, into_nd)) => {
            // One row more, for all tokens that are not trained.
            let count = into_nd.size()[0];
            let sums = Tensor::zeros([count + 1, width], (Kind::Float, dx_btd.device()));
            add_rows(&sums, &rows.places_v.index_select(0, &tokens_bt.reshape([-1])));
            let _ = into_nd.shallow_clone().g_add_(&sums.narrow(0, 0, count));
        }
    }
    match (dwpe_pd, positions) {
        (None | Some(TableGrad::Rows(..)), _) => {}
        (Some(TableGrad::Whole(dwpe_pd)), Positions::Each(positions_bt)) => add_rows(dwpe_pd, positions_bt),
        (Some(TableGrad::Whole(dwpe_pd)), Positions::From(first)) => {
            let _ = dwpe_pd.narrow(0, first, tokens).g_add_(&dx_btd.sum_dim_intlist(0, false, None));
        }
    }
}
