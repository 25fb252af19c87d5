//! Which moment of a step takes most: the walk over the blocks (`worker/src/train/walk`), with what lives
//! at each of its moments.

use tunefleet_proto::job::Residency;

use super::block::BlockPass;
use super::shape::Shape;

/// What lives at a moment besides what is held throughout, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Live {
    /// Inputs of blocks, the last one's output, and the mask of the embeddings.
    pub inputs: f64,
    /// Graphs of blocks that are not computed again.
    pub graphs: f64,
    /// What the moment itself takes.
    pub passing: f64,
    /// Parts of sums over copies of the weights.
    pub sums: f64,
}

impl Live {
    /// All.
    pub fn bytes(&self) -> f64 {
        self.inputs + self.graphs + self.passing + self.sums
    }
}

/// The moment that takes most.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Peak {
    /// When.
    pub when: &'static str,
    /// What lives then.
    pub live: Live,
}

/// What the walk does besides the blocks' own passes.
pub struct Surroundings {
    /// Most while the loss is made.
    pub loss: f64,
    /// Below this block nothing is trained.
    pub lowest: usize,
    /// Whether the embeddings are trained.
    pub trains_embeddings: bool,
    /// Of each block, the part of a sum over copies that stays until the update.
    pub sum_of_block: Vec<f64>,
}

/// The largest moment of a step over blocks that pass as `passes` says.
pub fn peak(shape: &Shape, residency: &Residency, passes: &[BlockPass], around: &Surroundings) -> Peak {
    let (stream, wide) = (shape.stream(), shape.rows(shape.width));
    let mut peak = Peak { when: "the update", live: Live::default() };
    let mut see = |when, live: Live| {
        if live.bytes() > peak.live.bytes() {
            peak = Peak { when, live };
        }
    };
    let mask = if shape.dropout.embedding > 0.0 { shape.tokens * shape.width } else { 0.0 };
    see("the embeddings", Live { passing: 2.0 * stream + mask, ..Live::default() });

    let recomputed = |i: usize| i < around.lowest || residency.recomputed.get(i).copied().unwrap_or(false);
    // In products' own dtype an input is a tensor of its own; so is then the output of a kept block.
    let widened = if shape.is_widened() { wide } else { 0.0 };
    let input = |i: usize| match recomputed(i) {
        false if shape.is_widened() => wide,
        _ => stream,
    };
    let mut live = Live { inputs: mask + stream, ..Live::default() };
    for (i, pass) in passes.iter().enumerate() {
        if recomputed(i) {
            see("the forward pass", Live { passing: pass.forward, ..live });
        } else {
            live.inputs += input(i) - stream;
            see("the forward pass", Live { passing: pass.forward_with_graph + widened, ..live });
            live.graphs += pass.graph + widened;
        }
        live.inputs += stream;
    }
    see("the loss", Live { passing: around.loss, ..live });

    let gradient = wide;
    for (i, pass) in passes.iter().enumerate().skip(around.lowest).rev() {
        let graph = pass.graph + widened;
        if recomputed(i) {
            // Its output lies beside the one that the next block had.
            let again = wide + if shape.is_widened() { wide } else { 0.0 };
            let forward = pass.forward_with_graph + widened;
            see("a block computed again", Live { passing: gradient + forward, ..live });
            let passing = gradient + graph + again + pass.backward;
            see("a block's backward pass", Live { passing, ..live });
            // Its gradients are in their buffers; a kept neighbour's output goes with it.
        } else {
            live.graphs -= graph;
            let passing = gradient + graph + pass.backward;
            see("a block's backward pass", Live { passing, ..live });
        }
        live.inputs -= input(i);
        live.sums += around.sum_of_block.get(i).copied().unwrap_or(0.0);
    }
    if around.trains_embeddings {
        let fp32 = 4.0 * shape.tokens * shape.width;
        see("the embeddings' gradient", Live { passing: gradient + fp32, ..live });
    }
    peak
}

#[cfg(test)]
mod tests {
    use tunefleet_proto::job::Recompute;
    use tunefleet_proto::model::Dropout;

    use super::super::shape::Machine;
    use super::*;

    fn shape() -> Shape {
        Shape {
            tokens: 10.0,
            sequences: 1.0,
            sequence_tokens: 10.0,
            width: 10.0,
            attention_width: 10.0,
            kv_width: 10.0,
            inner: 40.0,
            heads: 1.0,
            kv_heads: 1.0,
            head_width: 10.0,
            vocabulary: 100.0,
            product_bytes: 4.0,
            kind_bytes: 4.0,
            dropout: Dropout::NONE,
            machine: Machine { on_gpu: false, bf16_products: false },
        }
    }

    fn at(recompute: Recompute, loss: f64) -> Peak {
        let pass = BlockPass { forward: 1000.0, forward_with_graph: 5000.0, graph: 4000.0, backward: 2500.0 };
        let around = Surroundings { loss, lowest: 0, trains_embeddings: true, sum_of_block: Vec::new() };
        peak(&shape(), &Residency::new(recompute, 0, 1, 4), &[pass; 4], &around)
    }

    #[test]
    fn the_last_blocks_backward_pass_takes_most_unless_the_loss_does() {
        // Five states of 400 bytes, the graph, the gradient of the output and the pass itself.
        let all = at(Recompute::All, 0.0);
        assert_eq!(
            (all.when, all.live.bytes()),
            ("a block's backward pass", 2000.0 + 400.0 + 4000.0 + 2500.0)
        );
        let none = at(Recompute::None, 0.0);
        assert_eq!(none.live.bytes(), all.live.bytes() + 3.0 * 4000.0);
        let lossy = at(Recompute::All, 9000.0);
        assert_eq!((lossy.when, lossy.live.bytes()), ("the loss", 2000.0 + 4000.0 + 9000.0));
    }

    #[test]
    fn every_block_that_is_computed_again_saves_its_graph() {
        let some = at(Recompute::Every(2), 0.0);
        assert_eq!(some.live.graphs, 2.0 * 4000.0);
    }
}
