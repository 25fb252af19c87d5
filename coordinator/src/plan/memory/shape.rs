//! The sizes that memory is counted in.
//!
//! Letters: n tokens of a micro-batch, D width of the model, A of all query heads, I of the MLP's inner layer, V of the vocabulary, C of a head, T tokens of a sequence; c bytes of an element between blocks,
//! p of one in products. Sizes are bytes, and whole numbers below 2^53, which f64 holds exactly: no shape
//! that a config may state makes it overflow.

use tunefleet_proto::job::{JobSpec, Precision};
use tunefleet_proto::model::{Dropout, ModelConfig, Positions};

/// Where a rank computes, as far as memory depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// On a GPU.
    pub on_gpu: bool,
    /// The CPU multiplies in bf16; else bf16 jobs multiply in fp32 there.
    pub bf16_products: bool,
}

/// Shape of a micro-batch and of the model that it passes.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// n.
    pub tokens: f64,
    /// B.
    pub sequences: f64,
    /// T.
    pub sequence_tokens: f64,
    /// D.
    pub width: f64,
    /// A.
    pub attention_width: f64,
    /// Width of keys, and of values.
    pub kv_width: f64,
    /// I.
    pub inner: f64,
    /// Query heads.
    pub heads: f64,
    /// Key-value heads.
    pub kv_heads: f64,
    /// C.
    pub head_width: f64,
    /// V.
    pub vocabulary: f64,
    /// p.
    pub product_bytes: f64,
    /// c.
    pub kind_bytes: f64,
    /// In training.
    pub dropout: Dropout,
    /// Where.
    pub machine: Machine,
}

impl Shape {
    /// Of `spec`'s micro-batches.
    pub fn new(spec: &JobSpec, config: &ModelConfig, machine: Machine) -> Self {
        let sequences = f64::from(spec.train.micro_batch_sequences);
        let sequence_tokens = f64::from(spec.data.sequence_tokens);
        let kind_bytes = bytes_of(spec.train.precision) as f64;
        let native = machine.on_gpu || machine.bf16_products;
        let overridden = |p| Dropout { attention: p, embedding: p, residual: p };
        Shape {
            tokens: sequences * sequence_tokens,
            sequences,
            sequence_tokens,
            width: config.hidden_size as f64,
            attention_width: config.attention_width() as f64,
            kv_width: config.kv_width() as f64,
            inner: config.intermediate_size as f64,
            heads: config.heads as f64,
            kv_heads: config.kv_heads as f64,
            head_width: config.head_dim() as f64,
            vocabulary: config.vocab_size as f64,
            product_bytes: if native { kind_bytes } else { 4.0 },
            kind_bytes,
            dropout: spec.train.dropout.map_or(config.dropout, overridden),
            machine,
        }
    }

    /// `width` values for each token, in the dtype of products.
    pub fn rows(&self, width: f64) -> f64 {
        self.tokens * width * self.product_bytes
    }

    /// Cosines and sines of a micro-batch, fp32, of a model whose positions are rotary.
    pub fn turns(&self, config: &ModelConfig) -> f64 {
        match config.positions {
            Positions::Rotary(_) => 4.0 * self.sequence_tokens * self.head_width,
            Positions::Learned => 0.0,
        }
    }

    /// The residual stream between two blocks, n x D.
    pub fn stream(&self) -> f64 {
        self.tokens * self.width * self.kind_bytes
    }

    /// Whether products want another dtype than what lies between blocks.
    pub fn is_widened(&self) -> bool {
        self.product_bytes != self.kind_bytes
    }

    /// What libtorch's dropout keeps of `width` values for each token: the noise in their dtype, on a GPU a mask.
    pub fn noise(&self, width: f64) -> f64 {
        if self.machine.on_gpu { self.tokens * width } else { self.rows(width) }
    }

    /// Whether attention runs in our own backward pass (see `kernels::fused::attention`).
    pub fn has_own_attention(&self) -> bool {
        let Machine { on_gpu, bf16_products } = self.machine;
        !on_gpu
            && bf16_products
            && self.product_bytes == 2.0
            && self.head_width % 32.0 == 0.0
            && self.head_width <= 256.0
            && self.sequence_tokens >= 16.0
    }
}

/// Bytes of one element.
pub fn bytes_of(precision: Precision) -> u64 {
    match precision {
        Precision::Fp32 => 4,
        Precision::Bf16 => 2,
    }
}
