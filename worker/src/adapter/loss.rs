//! What a merge costs: the loss of the merged model beside that of the adapter on the base that it was
//! trained on.

use std::path::Path;

use tch::{Device, Kind, Tensor};
use tunefleet_proto::ids::Rank;
use tunefleet_proto::job::{DataSpec, FimLevel, Packing, Precision};

use super::Error;
use super::merge::Dequantized;
use crate::data::{Sequences, Split};
use crate::generate::decoder::Decoder;
use crate::model::numerics::Numerics;
use crate::train::batches;

/// What to compare, and on what.
pub struct Request<'a> {
    /// The merged model's directory.
    pub merged: &'a Path,
    /// The base.
    pub base: &'a Path,
    /// The adapter.
    pub adapter: &'a Path,
    /// What training made of the base's linears; absent where it left them alone.
    pub trained_on: Option<&'a Dequantized<'a>>,
    /// Its held-out files are what the loss is of.
    pub dataset: &'a Path,
    /// Tokenizer of its text.
    pub tokenizer: &'a Path,
    /// Most sequences.
    pub sequences: u32,
    /// Tokens of a sequence.
    pub sequence_tokens: Option<u32>,
    /// Where to compute.
    pub device: Device,
    /// In which dtype.
    pub dtype: Precision,
}

/// Mean losses per counted token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Losses {
    /// Of the merged model.
    pub merged: f64,
    /// Of the adapter on the base that it was trained on.
    pub trained: f64,
    /// Tokens that count.
    pub tokens: i64,
}

/// Computes both, one model after the other.
///
/// # Errors
/// Whatever the files break; a dataset without held-out files.
pub fn compare(request: &Request<'_>) -> Result<Losses, Error> {
    let numerics = Numerics::new(request.device, request.dtype);
    let merged = Decoder::load(request.merged, numerics)?;
    let most = u32::try_from(merged.config().max_positions).unwrap_or(u32::MAX);
    let spec = DataSpec {
        sequence_tokens: request.sequence_tokens.unwrap_or(2048).min(most),
        fim_rate: 0.0,
        fim_spm_rate: 0.0,
        fim_level: FimLevel::Window,
        packing: Packing::Continuous,
        metadata_prefix: false,
        document_mask: false,
        chat: None,
        seed: 0,
    };
    let refuse = |error: crate::data::Error| Error::Refused(error.to_string());
    let tokens =
        tempfile::tempdir().map_err(|error| Error::Refused(format!("a temporary directory: {error}")))?;
    let sequences =
        Sequences::open(&spec, request.dataset, request.tokenizer, Split::Validation, tokens.path());
    let sequences = sequences.map_err(refuse)?;
    let (of_merged, tokens) = mean(&merged, &sequences, request)?;
    drop(merged);
    // In fp32: training never rounded the sum of the two.
    let exact = Numerics::new(request.device, Precision::Fp32);
    let trained = Decoder::load_merged(request.base, request.adapter, true, request.trained_on, exact)?;
    let (of_trained, _) = mean(&trained, &sequences, request)?;
    Ok(Losses { merged: of_merged, trained: of_trained, tokens })
}

fn mean(model: &Decoder, sequences: &Sequences, request: &Request<'_>) -> Result<(f64, i64), Error> {
    let mut sum = Tensor::zeros([], (Kind::Double, request.device));
    let mut tokens = 0;
    for round in batches::validation(sequences, request.sequences.into(), 1, Rank::SOLE, request.device) {
        let (batch, counted) = round.map_err(|error| Error::Refused(error.to_string()))?;
        let loss = model.loss_sum(&batch.tokens_bt, &batch.targets_bt, None);
        sum += loss.map_err(|error| Error::Refused(error.to_string()))?;
        tokens += counted;
    }
    if tokens == 0 {
        return Err(Error::Refused(format!("{}: holds no held-out files", request.dataset.display())));
    }
    Ok((sum.double_value(&[]) / tokens as f64, tokens))
}
