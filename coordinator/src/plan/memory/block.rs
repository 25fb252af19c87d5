//! What one block's forward and backward pass take: `worker/src/model/block.rs` tensor by tensor.

use tunefleet_proto::adapter::AdapterPlan;
use tunefleet_proto::model::{LinearRole, LinearShape, ModelConfig, Positions, Qkv};

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

/// What stands at one of a block's linears.
#[derive(Debug, Clone, Copy)]
struct Linear {
    role: LinearRole,
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

/// The linears of a block that read the same input.
struct Linears(Vec<Linear>);

/// The pass of block `block`.
pub fn pass(
    shape: &Shape,
    config: &ModelConfig,
    block: u64,
    adapter: Option<(&AdapterPlan, f64)>,
) -> BlockPass {
    use LinearRole::{AttentionOut, Gate, Key, MlpIn, MlpOut, Query, Value};
    let all = Linears::new(config, block, adapter);
    let qkv = all.of(&[LinearRole::Qkv, Query, Key, Value]);
    let out = all.of(&[AttentionOut]);
    let into = all.of(&[Gate, MlpIn]);
    let mlp_out = all.of(&[MlpOut]);
    let (nd, na, ni) = (shape.rows(shape.width), shape.rows(shape.attention_width), shape.rows(shape.inner));
    let nk = shape.rows(shape.kv_width);
    let nq = na + 2.0 * nk;
    let is_fused = config.qkv != Qkv::Split;
    // Queries and keys before they are turned, or each head's three before they are put in order.
    let unturned = match (config.positions, config.qkv) {
        (Positions::Rotary(_), _) => na + nk,
        (_, Qkv::FusedByHead) => nq,
        _ => 0.0,
    };
    let fused = if is_fused { nq } else { 0.0 };
    // What the activation reads.
    let inner = ni * into.0.len() as f64;
    let attention = Attention::new(shape);
    let parameters = trained_parameters(config, adapter, block);
    let cast = cast(shape, adapter.is_some(), parameters);

    // Kept: normed input, attention's own, sum, normed sum, the MLP before and after its activation.
    let normed_1 = qkv.kept(shape, nd);
    // Attention keeps its own output, which is what the projection would keep.
    let projected = if out.drops() { out.keeps_input(shape, na) } else { 0.0 };
    let attended = attention.graph + projected + out.keeps_more(shape);
    let normed_2 = into.kept(shape, nd);
    let activated = mlp_out.kept(shape, ni);
    // Means and deviations of both norms, fp32. Masks of residual dropout are computed again.
    let stats = 16.0 * shape.tokens;
    let graph = normed_1 + attended + nd + normed_2 + inner + activated + stats + cast;

    // Without a graph, names live to the end of the function: both norms, what attention found, the sum, what the
    // activation reads, unless it has two inputs, and makes; and then the MLP's output, and the block's.
    let named_inner = if into.0.len() == 1 { inner + ni } else { ni };
    let named = 3.0 * nd + na;
    let projecting = nd + nq + unturned;
    let attending = nd + fused + attention.forward;
    let forward = projecting.max(attending).max(named + inner + ni).max(named + named_inner + 2.0 * nd)
        + cast
        + if shape.is_widened() { shape.rows(shape.width) + shape.stream() } else { 0.0 };
    let unkept = |linears: &Linears, input: f64| (input - linears.keeps_input(shape, input)).max(0.0);
    let transient = all.transient(shape);
    let early = cast + stats + normed_1 + unkept(&qkv, nd) + transient;
    let forward_with_graph =
        (graph + unkept(&qkv, nd) + unkept(&into, nd) + unkept(&mlp_out, ni) + transient + 2.0 * nd)
            .max(early + attending - nd)
            .max(early + projecting - nd);

    // Backward, moment by moment; what has been used is gone.
    let residual = if shape.dropout.residual > 0.0 { nd } else { 0.0 };
    let (w_2, w_in, w_out) = (mlp_out.gradients(shape), into.gradients(shape), out.gradients(shape));
    let gradients = parameters * shape.product_bytes;
    let behind_mlp = w_2 + w_in - activated - inner - normed_2;
    let moments = [
        residual + mlp_out.dx(ni) + w_2,
        ni + inner + w_2 - activated,
        inner + into.dx(nd) + w_2 + w_in - activated,
        3.0 * nd + behind_mlp,
        nd + residual + out.dx(na) + w_out + behind_mlp - nd,
        nd + na + attention.backward + w_out + behind_mlp - nd,
        if is_fused {
            // Gradients of the three parts of the projection, each as wide as the whole.
            2.0 * nd + 2.0 * nk + 2.0 * nq + w_out + behind_mlp - nd - attended
        } else {
            2.0 * nd + nq + unturned + w_out + behind_mlp - nd - attended
        },
        3.0 * nd + gradients + if is_fused { 0.0 } else { nd } - (graph - normed_1 - cast),
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
        let nd = shape.rows(shape.attention_width);
        let kv = 2.0 * shape.rows(shape.kv_width);
        // fp32 logarithms of the sums.
        let lse = 4.0 * shape.tokens * shape.heads;
        if shape.dropout.attention > 0.0 && !shape.machine.on_gpu {
            // libtorch's plain path, in fp32: softmax, noise and their product, [B, H, T, T] each, q, k and v
            // of all heads, and the output in rows.
            let matrix = 4.0 * shape.sequences * shape.heads * shape.sequence_tokens.powi(2);
            let wide = 4.0 * shape.tokens * shape.attention_width;
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
        let linear = |of: LinearShape| {
            let (outputs, inputs) = (of.out_features as f64, of.in_features as f64);
            let role = of.role;
            let plain =
                Linear { role, inputs, outputs, trained: true, rank: None, dora: false, drops: false };
            let Some((plan, dropout)) = adapter else { return plain };
            let saved = plan.saved_blocks.get(block as usize);
            let weight = format!("{}.weight", of.name);
            if saved.is_some_and(|saved| saved.iter().any(|parameter| parameter.name == weight)) {
                return plain;
            }
            let pair = plan.linears.iter().find(|linear| linear.block == block && linear.name == of.name);
            let rank = pair.map(|pair| pair.rank as f64);
            let (dora, drops) = (plan.dora && rank.is_some(), dropout > 0.0 && rank.is_some());
            Linear { trained: false, rank, dora, drops, ..plain }
        };
        Linears(config.linears().into_iter().map(linear).collect())
    }

    fn of(&self, roles: &[LinearRole]) -> Self {
        Linears(self.0.iter().filter(|linear| roles.contains(&linear.role)).copied().collect())
    }

    fn drops(&self) -> bool {
        self.0.iter().any(|linear| linear.drops)
    }

    /// Of their one `input`, which all that need it share; what dropout leaves each has for itself.
    fn keeps_input(&self, shape: &Shape, input: f64) -> f64 {
        let dropped = self.0.iter().filter(|linear| linear.drops);
        let shared = self.0.iter().any(|linear| !linear.drops && linear.needs_input());
        let own: f64 = dropped.map(|linear| input + shape.noise(linear.inputs)).sum();
        own + if shared { input } else { 0.0 }
    }

    fn keeps_more(&self, shape: &Shape) -> f64 {
        self.0.iter().map(|linear| linear.keeps_more(shape)).sum()
    }

    fn kept(&self, shape: &Shape, input: f64) -> f64 {
        self.keeps_input(shape, input) + self.keeps_more(shape)
    }

    /// While gradients of their `input` are made: one after the other is added to the sum.
    fn dx(&self, input: f64) -> f64 {
        let pairs = self.0.iter().any(|linear| linear.rank.is_some());
        input * if pairs || self.0.len() > 1 { 2.0 } else { 1.0 }
    }

    fn gradients(&self, shape: &Shape) -> f64 {
        self.0.iter().map(|linear| linear.gradient(shape)).sum()
    }

    /// The most that one of them has besides input, output and graph.
    fn transient(&self, shape: &Shape) -> f64 {
        self.0.iter().map(|linear| linear.transient(shape)).fold(0.0, f64::max)
    }
}

impl Linear {
    /// A frozen weight alone needs none of it for its gradients.
    fn needs_input(&self) -> bool {
        self.trained || self.rank.is_some()
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
