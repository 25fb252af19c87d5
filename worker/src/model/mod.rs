//! One decoder with switches: embeddings -> blocks -> head. Plain functions of tensors: nothing
//! here knows how parameters are sharded or who calls backward.
//!
//! Shapes in names: B sequences, T tokens, D model width, H heads, K key-value heads, C head
//! width, V vocabulary, N = B * T.

/// Dtype and device of the computation, and the products that depend on them.
pub mod numerics;
/// Token and learned position embeddings.
pub mod embed;
/// Rotary positions.
pub mod rotary;
/// Documents that share a row.
pub mod documents;
/// What a token sees.
pub mod attention;
/// Weights that are only multiplied with, quantised or not.
pub mod matrix;
/// One linear, with or without an adapter.
pub mod linear;
/// One transformer block.
pub mod block;
/// Final norm and output head, with the chunked loss.
pub mod head;
