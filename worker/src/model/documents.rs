//! Documents that share a row, each by itself: no token sees another document, and positions begin anew. A document is
//! attended to as a row of its own, so that nothing is computed that a mask would throw away.

use tch::{Device, Kind, Tensor};

use super::attention::causal;

/// Where documents lie in the rows of a batch.
#[derive(Debug)]
pub struct Documents {
    /// For each row, the first token and the tokens of each document; they fill the row.
    runs: Vec<Vec<(i64, i64)>>,
    /// `[B, T]`, int64: the place of each token in its document.
    positions_bt: Tensor,
}

impl Documents {
    /// The documents of rows of equal length, by the tokens of each document.
    pub fn new<'a>(rows: impl Iterator<Item = &'a [u32]>, device: Device) -> Self {
        let (mut runs, mut positions) = (Vec::new(), Vec::new());
        for row in rows {
            let mut begin = 0;
            let run = row.iter().map(|tokens| {
                let tokens = i64::from(*tokens);
                positions.extend(0..tokens);
                begin += tokens;
                (begin - tokens, tokens)
            });
            runs.push(run.collect::<Vec<_>>());
        }
        let host = Tensor::from_slice(&positions).view([runs.len() as i64, -1]);
        let positions_bt = match device {
            Device::Cpu => host,
            // From pinned memory the copy is only queued.
            _ => host.pin_memory(device).to_device_(device, Kind::Int64, true, false),
        };
        Documents { runs, positions_bt }
    }

    /// `[B, T]`, int64: the place of each token in its document.
    pub fn positions_bt(&self) -> &Tensor {
        &self.positions_bt
    }

    /// [`causal`] attention within each document.
    pub fn attention(
        &self,
        q_bhtc: &Tensor,
        k_bktc: &Tensor,
        v_bktc: &Tensor,
        window: Option<i64>,
        dropout: f64,
    ) -> Tensor {
        let row = |(row, runs): (usize, &Vec<(i64, i64)>)| {
            let document = |&(begin, tokens): &(i64, i64)| {
                let part = |x: &Tensor| x.narrow(0, row as i64, 1).narrow(2, begin, tokens);
                causal(&part(q_bhtc), &part(k_bktc), &part(v_bktc), window, dropout)
            };
            Tensor::cat(&runs.iter().map(document).collect::<Vec<_>>(), 2)
        };
        Tensor::cat(&self.runs.iter().enumerate().map(row).collect::<Vec<_>>(), 0)
    }
}
