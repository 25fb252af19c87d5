//! What one block's forward and backward pass take: `worker/src/model/block.rs` tensor by tensor.

use tunefleet_proto::adapter::AdapterPlan;
use tunefleet_proto::model::ModelConfig;

use super::shape::Shape;

/// Tiles of our own attention's backward pass, see `kernels/sys/csrc/attention_cpu.h`.
const ATTENTION_KEYS: f64 = 64.0;
const ATTENTION_QUERIES: f64 = 256.0;
/// Its partial sums at least.
const ATTENTION_PARTS: f64 = 16.0;

/// One block's pass, in bytes; its input and the gradient of its output are counted elsewhere.
#[derive(Debug, Clone, Copy, Default)]
pub struct BlockPass {
    /// Most while it runs without a graph, the output among it.
    pub forward: f64,
    /// Most while it runs with a graph, graph and output among it.
    pub forward_with_graph: f64,
    /// The graph: from the forward to the backward pass, besides input and output.
    pub graph: f64,
    /// Most while its backward pass runs, besides graph, input and output.
    pub backward: f64,
}

/// What stands at one of a block's four linears.
#[derive(Debug, Clone, Copy)]
struct Linear {
    inputs: f64,
    outputs: f64,
    /// Its weight is trained.
    trained: bool,
    /// A pair beside a frozen weight, with this inner width.
    rank: Option<f64>,
    dora: bool,
    /// Dropout before the pair.
    drops: bool,
}

/// The four linears of a block.
struct Linears {
    c_attn: Linear,
    c_proj: Linear,
    c_fc: Linear,
    mlp_proj: Linear,
}

/// The pass of block `block`.
pub fn pass(
    shape: &Shape,
    config: &ModelConfig,
    block: u64,
    adapter: Option<(&AdapterPlan, f64)>,
) -> BlockPass {
    let linears = Linears::new(config, block, adapter);
    let nd = shape.rows(shape.width);
    let ni = shape.rows(shape.inner);
    let nq = shape.rows(shape.qkv_width);
    let kv = 2.0 * shape.rows(shape.kv_width);
    let attention = Attention::new(shape);
    let Linears { c_attn, c_proj, c_fc, mlp_proj } = &linears;
    let parameters = trained_parameters(config, adapter, block);
    let cast = cast(shape, adapter.is_some(), parameters);

    // Kept: normed input, attention's own, sum, normed sum, the MLP before and after its activation.
    let kept_at = |linear: &Linear, input: f64| linear.keeps_input(shape, input) + linear.keeps_more(shape);
    let normed_1 = kept_at(c_attn, nd);
    // Attention keeps its own output, which is what the projection would keep.
    let projected = if c_proj.drops { c_proj.keeps_input(shape, nd) } else { 0.0 };
    let attended = attention.graph + projected + c_proj.keeps_more(shape);
    let normed_2 = kept_at(c_fc, nd);
    let activated = kept_at(mlp_proj, ni);
    // Means and deviations of both norms, fp32. Masks of residual dropout are computed again.
    let stats = 16.0 * shape.tokens;
    let graph = normed_1 + attended + nd + normed_2 + ni + activated + stats + cast;

    // Without a graph, names live to the end of the function: both norms, projection, attention, sum, the
    // MLP before and after its activation; and then its output, and the block's.
    let named = 4.0 * nd + nq + 2.0 * ni;
    let forward = (nd + nq + attention.forward).max(named + 2.0 * nd)
        + cast
        + if shape.is_widened() { shape.rows(shape.width) + shape.stream() } else { 0.0 };
    let unkept = |linear: &Linear, input: f64| (input - linear.keeps_input(shape, input)).max(0.0);
    let forward_with_graph = graph
        + nq
        + unkept(c_attn, nd)
        + unkept(c_fc, nd)
        + unkept(mlp_proj, ni)
        + linears.transient(shape)
        + 2.0 * nd
        + (attention.forward - attention.graph - nd - 2.0 * ni - 3.0 * nd).max(0.0);

    // Backward, moment by moment; what has been used is gone.
    let weight = |linear: &Linear| linear.gradient(shape);
    let residual = if shape.dropout.residual > 0.0 { nd } else { 0.0 };
    let dx = |linear: &Linear, input: f64| if linear.rank.is_some() { 2.0 * input } else { input };
    let (w_2, w_fc, w_proj) = (weight(mlp_proj), weight(c_fc), weight(c_proj));
    let gradients = parameters * shape.product_bytes;
    let moments = [
        residual + dx(mlp_proj, ni) + w_2,
        2.0 * ni + w_2 - activated,
        ni + dx(c_fc, nd) + w_2 + w_fc - activated,
        3.0 * nd + w_2 + w_fc - activated - ni - normed_2,
        nd + residual + dx(c_proj, nd) + w_2 + w_fc + w_proj - activated - ni - normed_2 - nd,
        2.0 * nd + attention.backward + w_2 + w_fc + w_proj - activated - ni - normed_2 - nd,
        // Gradients of the three parts of the projection, each as wide as the whole.
        2.0 * nd + kv + 2.0 * nq + w_2 + w_fc + w_proj - activated - ni - normed_2 - nd - attended,
        3.0 * nd + gradients - (graph - normed_1 - cast),
        2.0 * nd + gradients - (graph - cast),
    ];
    let backward = moments.into_iter().fold(0.0, f64::max);
    BlockPass { forward, forward_with_graph, graph, backward }
}

/// Attention's own, in bytes.
struct Attention {
    /// Most in the forward pass, q, k, v and its output among it.
    forward: f64,
    /// What its graph keeps.
    graph: f64,
    /// Most in the backward pass besides the graph.
    backward: f64,
}

impl Attention {
    fn new(shape: &Shape) -> Self {
        let nd = shape.rows(shape.width);
        let kv = 2.0 * shape.rows(shape.kv_width);
        // fp32 logarithms of the sums.
        let lse = 4.0 * shape.tokens * shape.heads;
        if shape.dropout.attention > 0.0 && !shape.machine.on_gpu {
            // libtorch's plain path, in fp32: softmax, noise and their product, [B, H, T, T] each, q, k and v
            // of all heads, and the output in rows.
            let matrix = 4.0 * shape.sequences * shape.heads * shape.sequence_tokens.powi(2);
            let wide = 4.0 * shape.tokens * shape.width;
            let graph = 3.0 * matrix + 3.0 * wide + nd;
            return Attention { forward: graph + nd + kv + wide, graph, backward: matrix + 3.0 * wide };
        }
        let graph = 2.0 * nd + kv + lse;
        let packed = if shape.has_own_attention() { 2.0 * nd } else { 0.0 };
        let own = if shape.has_own_attention() { own_backward(shape) } else { 0.0 };
        Attention { forward: graph + packed, graph, backward: nd + kv + own }
    }
}

/// Packed operands and partial sums.
fn own_backward(shape: &Shape) -> f64 {
    let tiles = |len: f64, tile: f64| (len / tile).ceil();
    let groups = shape.sequences * shape.kv_heads;
    let key_tiles = tiles(shape.sequence_tokens, ATTENTION_KEYS);
    let units = shape.heads / shape.kv_heads * tiles(shape.sequence_tokens, ATTENTION_QUERIES);
    let parts = units.min(tiles(ATTENTION_PARTS, groups));
    let tile = ATTENTION_KEYS * shape.head_width;
    groups * key_tiles * tile * (3.0 * 2.0 + parts * 2.0 * 4.0)
}

impl Linears {
    fn new(config: &ModelConfig, block: u64, adapter: Option<(&AdapterPlan, f64)>) -> Self {
        let d = config.hidden_size as f64;
        let q = d + 2.0 * (config.kv_heads * config.head_dim()) as f64;
        let i = config.intermediate_size as f64;
        let linear = |name: &str, outputs: f64, inputs: f64| {
            let plain = Linear { inputs, outputs, trained: true, rank: None, dora: false, drops: false };
            let Some((plan, dropout)) = adapter else { return plain };
            let saved = plan.saved_blocks.get(block as usize);
            let weight = format!("{name}.weight");
            if saved.is_some_and(|saved| saved.iter().any(|parameter| parameter.name == weight)) {
                return plain;
            }
            let pair = plan.linears.iter().find(|linear| linear.block == block && linear.name == name);
            let rank = pair.map(|pair| pair.rank as f64);
            let (dora, drops) = (plan.dora && rank.is_some(), dropout > 0.0 && rank.is_some());
            Linear { trained: false, rank, dora, drops, ..plain }
        };
        Linears {
            c_attn: linear("attn.c_attn", q, d),
            c_proj: linear("attn.c_proj", d, d),
            c_fc: linear("mlp.c_fc", i, d),
            mlp_proj: linear("mlp.c_proj", d, i),
        }
    }

    /// The most that one of them has besides input, output and graph.
    fn transient(&self, shape: &Shape) -> f64 {
        let all = [&self.c_attn, &self.c_proj, &self.c_fc, &self.mlp_proj];
        all.into_iter().map(|linear| linear.transient(shape)).fold(0.0, f64::max)
    }
}

impl Linear {
    /// Of its `input`: a frozen weight needs none of it for its gradients.
    fn keeps_input(&self, shape: &Shape, input: f64) -> f64 {
        match (self.trained, self.rank, self.drops) {
            (true, ..) | (_, Some(_), false) => input,
            // The noise, and what it leaves.
            (_, Some(_), true) => input + shape.noise(self.inputs),
            (false, None, _) => 0.0,
        }
    }

    /// Besides: the pair's inner values, and what a magnitude scales.
    fn keeps_more(&self, shape: &Shape) -> f64 {
        let Some(rank) = self.rank else { return 0.0 };
        let scaled = match (self.dora, self.drops) {
            (false, _) => 0.0,
            (true, false) => 1.0,
            (true, true) => 2.0,
        };
        shape.rows(rank) + scaled * shape.rows(self.outputs)
    }

    /// Rows of the adapted weight in fp32, and the scaled output twice: DoRA's alone.
    fn transient(&self, shape: &Shape) -> f64 {
        if !self.dora {
            return 0.0;
        }
        (12.0 * self.inputs * self.outputs).max(8.0 * shape.tokens * self.outputs)
    }

    /// The gradients of what is trained of it.
    fn gradient(&self, shape: &Shape) -> f64 {
        let elements = match (self.trained, self.rank) {
            (true, _) => self.inputs * self.outputs,
            (false, Some(rank)) => rank * (self.inputs + self.outputs),
            (false, None) => 0.0,
        };
        elements * shape.product_bytes
    }
}

/// The parameters of a block in the dtype of products, where they are gathered in another one: an adapter's
/// are in fp32.
fn cast(shape: &Shape, is_adapter: bool, parameters: f64) -> f64 {
    let gathered = if is_adapter { 4.0 } else { shape.kind_bytes };
    if gathered == shape.product_bytes { 0.0 } else { parameters * shape.product_bytes }
}

/// Elements of a block's parameters that are trained.
fn trained_parameters(config: &ModelConfig, adapter: Option<(&AdapterPlan, f64)>, block: u64) -> f64 {
    let parameters = match adapter {
        Some((plan, _)) => plan.block_parameters(block),
        None => config.block_parameters(block),
    };
    parameters.iter().map(|parameter| parameter.elements() as f64).sum()
}
