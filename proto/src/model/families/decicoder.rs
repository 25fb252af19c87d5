//! DeciCoder: a Llama in all but its name. What is exported says `llama`, which transformers loads without code of the
//! model's own.

use super::super::keys::Keys;
use super::super::{Error, ModelConfig};
use super::llama;

/// Its own keys (`naive_attention_*`) choose between ways to the same result.
pub fn read(keys: Keys<'_>) -> Result<ModelConfig, Error> {
    llama::read(keys)
}
