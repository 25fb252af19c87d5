//! How much there is to compute: floating-point operations of one micro-batch of a rank.
//!
//! A product of n rows with a weight of K elements is 2nK; its backward pass is twice that, and once that
//! where the weight is frozen. Attention is credited with the half that a causal mask leaves.

use tunefleet_proto::job::JobSpec;
use tunefleet_proto::model::ModelConfig;

/// FLOPs of one micro-batch, by where they are done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Flops {
    /// One block's forward pass.
    pub block_forward: f64,
    /// Its backward pass, without what is computed again.
    pub block_backward: f64,
    /// The output head, forward.
    pub head_forward: f64,
    /// And backward.
    pub head_backward: f64,
    /// Blocks.
    pub blocks: f64,
}

impl Flops {
    /// Of `spec` on `config`.
    pub fn new(spec: &JobSpec, config: &ModelConfig) -> Self {
        let sequence_tokens = f64::from(spec.data.sequence_tokens);
        let tokens = f64::from(spec.train.micro_batch_sequences) * sequence_tokens;
        let d = config.hidden_size as f64;
        let q = d + 2.0 * (config.kv_heads * config.head_dim()) as f64;
        let weights = q * d + d * d + 2.0 * d * config.intermediate_size as f64;
        // Scores and their product with the values.
        let attention = 2.0 * tokens * sequence_tokens * d;
        let products = 2.0 * tokens * weights;
        let frozen = spec.adapter.is_some();
        let backward = if frozen { 1.0 } else { 2.0 };
        let head = 2.0 * tokens * config.vocab_size as f64 * d;
        Flops {
            block_forward: products + attention,
            block_backward: backward * products + 2.0 * attention,
            head_forward: head,
            head_backward: backward * head,
            blocks: config.layers as f64,
        }
    }

    /// What the model needs, whatever is computed again.
    pub fn of_model(&self) -> f64 {
        self.blocks * (self.block_forward + self.block_backward) + self.head_forward + self.head_backward
    }

    /// What an evaluation of as many tokens needs.
    pub fn of_evaluation(&self) -> f64 {
        self.blocks * self.block_forward + self.head_forward
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tunefleet_proto::job;

    use super::*;

    fn flops(more: &str) -> Flops {
        let text = format!("dataset: d\nmodel: {{init: {{preset: starcoder}}}}\n{more}");
        let spec = job::load(Path::new("/j.yaml"), &text, &[], Path::new("/")).unwrap();
        Flops::new(&spec, &ModelConfig::preset("starcoder").unwrap())
    }

    #[test]
    fn starcoder_takes_six_operations_a_parameter_and_token_and_its_adapter_four() {
        let per_token = flops("").of_model() / 2048.0;
        // Without the embeddings' positions, and with 3% for attention.
        let sixes = per_token / (6.0 * 15.517e9);
        assert!((1.02..1.04).contains(&sixes), "{sixes}");
        let fours = flops("adapter: {}\n").of_model() / 2048.0 / (4.0 * 15.517e9);
        assert!((1.02..1.06).contains(&fours), "{fours}");
    }
}
