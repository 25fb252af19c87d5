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
        let weights: u64 =
            config.linears().iter().map(|linear| linear.out_features * linear.in_features).sum();
        let weights = weights as f64;
        // Scores and their product with the values.
        let attention = 4.0 * tokens * seen(config, sequence_tokens) * config.attention_width() as f64;
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

/// Tokens that a token of a sequence sees in the mean, over all tokens and blocks.
fn seen(config: &ModelConfig, sequence_tokens: f64) -> f64 {
    let of_block = |block| match config.window_of(block).map(|window| window as f64) {
        Some(window) if window < sequence_tokens => window - window * window / (2.0 * sequence_tokens),
        _ => sequence_tokens / 2.0,
    };
    (0..config.layers).map(of_block).sum::<f64>() / config.layers as f64
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tunefleet_proto::job;

    use super::*;

    fn flops(more: &str) -> Flops {
        of("starcoder", more)
    }

    fn of(preset: &str, more: &str) -> Flops {
        let text = format!("dataset: d\nmodel: {{init: {{preset: {preset}}}}}\n{more}");
        let spec = job::load(Path::new("/j.yaml"), &text, &[], Path::new("/")).unwrap();
        Flops::new(&spec, &ModelConfig::preset(preset).unwrap())
    }

    #[test]
    fn other_families_take_six_operations_a_parameter_and_a_window_saves_attention() {
        // Of DeciCoder all but the table of its tokens is multiplied with.
        let multiplied = 1_113_671_680.0 - 49_152.0 * 2048.0;
        let sixes = of("decicoder-1b", "").of_model() / 2048.0 / (6.0 * multiplied);
        assert!((1.03..1.10).contains(&sixes), "{sixes}");
        let long = |preset| of(preset, "data: {sequence_tokens: 16384}\n").of_model();
        let windowed = long("starcoder2-3b");
        let config = ModelConfig { window: None, ..ModelConfig::preset("starcoder2-3b").unwrap() };
        let text = "dataset: d\nmodel: {init: {preset: starcoder2-3b}}\ndata: {sequence_tokens: 16384}\n";
        let spec = job::load(Path::new("/j.yaml"), text, &[], Path::new("/")).unwrap();
        let saved = Flops::new(&spec, &config).of_model() / windowed;
        assert!((1.15..1.35).contains(&saved), "{saved}");
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
