//! Attention of a block: what a token sees, in training and over what its sequence was shown before.

use tch::{Device, Kind, Tensor};
use tunefleet_kernels::cached_attention;
use tunefleet_proto::model::ModelConfig;

use super::documents::Documents;
use super::numerics::{Numerics, attention};

/// New tokens of one sequence that a kernel attends for without products; more are worth products.
const FEW_TOKENS: i64 = 16;

/// Heads, and how far they see.
#[derive(Debug, Clone, Copy)]
pub struct HeadShape {
    /// Query heads.
    pub heads: i64,
    /// Key-value heads.
    pub kv_heads: i64,
    /// C.
    pub head_dim: i64,
    /// A token sees itself and those before it, so many in all.
    pub window: Option<i64>,
    /// On attention weights; 0 in evaluation.
    pub dropout: f64,
}

/// Keys and values of the tokens that one sequence has been shown: two tensors `[K, S, C]`, longer than what is used.
#[derive(Debug)]
pub struct KvCache {
    k_ksc: Tensor,
    v_ksc: Tensor,
}

/// Some tokens of one sequence in a row of several, and those that came before them.
#[derive(Debug)]
pub struct Run<'a> {
    /// Of the sequence; these tokens are added to it.
    pub cache: &'a mut KvCache,
    /// Tokens of it that count.
    pub cached_tokens: i64,
    /// New tokens.
    pub tokens: i64,
}

/// Which tokens a token sees, besides itself.
pub enum Sight<'a> {
    /// Those before it in its row.
    Row,
    /// Those before it in its document.
    Document(&'a Documents),
    /// Those before it in its sequence: the row holds runs of several, one behind the other.
    Cached(&'a mut [Run<'a>]),
}

impl<'a> From<Option<&'a Documents>> for Sight<'a> {
    fn from(documents: Option<&'a Documents>) -> Self {
        documents.map_or(Sight::Row, Sight::Document)
    }
}

/// Queries, keys and values of all heads.
pub enum Projected {
    /// Side by side in one tensor `[B, T, (H + 2K) C]`: all queries, then keys, then values.
    Fused(Tensor),
    /// Each by itself, `[B, T, F]`.
    Split([Tensor; 3]),
}

impl Projected {
    /// Queries `[B, H, T, C]`, keys and values `[B, K, T, C]`.
    fn heads(&self, shape: &HeadShape) -> [Tensor; 3] {
        let counts = [shape.heads, shape.kv_heads, shape.kv_heads];
        let of = |part_btf: &Tensor, count: i64| {
            let (batch, tokens) = (part_btf.size()[0], part_btf.size()[1]);
            part_btf.view([batch, tokens, count, shape.head_dim]).transpose(1, 2)
        };
        match self {
            Projected::Split(parts) => [0, 1, 2].map(|at| of(&parts[at], counts[at])),
            Projected::Fused(qkv_btf) => {
                let mut first = 0;
                counts.map(|count| {
                    let width = count * shape.head_dim;
                    first += width;
                    of(&qkv_btf.narrow(2, first - width, width).contiguous(), count)
                })
            }
        }
    }

    /// As [`Projected::Fused`], of one row, `[T, F]`.
    fn fused_row(&self) -> Tensor {
        match self {
            Projected::Fused(qkv_1tf) => qkv_1tf.squeeze_dim(0),
            Projected::Split(parts) => Tensor::cat(parts, 2).squeeze_dim(0),
        }
    }

    fn rows(&self, first: i64, count: i64) -> Projected {
        match self {
            Projected::Fused(qkv_btf) => Projected::Fused(qkv_btf.narrow(1, first, count)),
            Projected::Split(parts) => {
                Projected::Split([0, 1, 2].map(|at| parts[at].narrow(1, first, count).contiguous()))
            }
        }
    }

    fn size(&self) -> (i64, i64) {
        let (Projected::Fused(any) | Projected::Split([any, ..])) = self;
        (any.size()[0], any.size()[1])
    }
}

/// What all heads find, side by side, `[B, T, H C]`; differentiable but for cached sight.
pub fn attend(shape: &HeadShape, projected: &Projected, sight: Sight<'_>) -> Tensor {
    let (batch, tokens) = projected.size();
    let attended_bhtc = match sight {
        Sight::Row => {
            let [q_bhtc, k_bktc, v_bktc] = projected.heads(shape);
            causal(&q_bhtc, &k_bktc, &v_bktc, shape.window, shape.dropout)
        }
        Sight::Document(documents) => {
            let [q_bhtc, k_bktc, v_bktc] = projected.heads(shape);
            documents.attention(&q_bhtc, &k_bktc, &v_bktc, shape.window, shape.dropout)
        }
        Sight::Cached(runs) => return attend_cached(shape, projected, runs),
    };
    attended_bhtc.transpose(1, 2).reshape([batch, tokens, shape.heads * shape.head_dim])
}

/// [`attention`] to oneself and what came before, within `window`; differentiable.
pub fn causal(
    q_bhtc: &Tensor,
    k_bktc: &Tensor,
    v_bktc: &Tensor,
    window: Option<i64>,
    dropout: f64,
) -> Tensor {
    let tokens = q_bhtc.size()[2];
    let Some(window) = window.filter(|window| *window < tokens) else {
        return attention(q_bhtc, k_bktc, v_bktc, true, dropout);
    };
    // As many queries at once as the window is wide: they see at most twice as many keys.
    let mut parts = Vec::new();
    let mut first = 0;
    while first < tokens {
        let count = window.min(tokens - first);
        let seen_from = (first + 1 - window).max(0);
        let keys = first + count - seen_from;
        let part = |x: &Tensor, from: i64, len: i64| x.narrow(2, from, len);
        let mask = visible(count, keys, first - seen_from, Some(window), q_bhtc);
        parts.push(Tensor::scaled_dot_product_attention(
            &part(q_bhtc, first, count),
            &part(k_bktc, seen_from, keys),
            &part(v_bktc, seen_from, keys),
            Some(&mask),
            dropout,
            false,
            None,
            true,
        ));
        first += count;
    }
    Tensor::cat(&parts, 2)
}

/// A mask to add to scores, `[T, S]`: 0 where query `t`, which stands at key `t + offset`, sees key `s`, else minus infinity.
fn visible(queries: i64, keys: i64, offset: i64, window: Option<i64>, like: &Tensor) -> Tensor {
    let hidden = |value: &Tensor| {
        let later = value.triu(offset + 1);
        match window {
            None => later,
            Some(window) => later + value.tril(offset - window),
        }
    };
    let ones = Tensor::ones([queries, keys], (Kind::Float, like.device()));
    let zeros = Tensor::zeros([queries, keys], (like.kind(), like.device()));
    zeros.masked_fill(&hidden(&ones).to_kind(Kind::Bool), f64::NEG_INFINITY)
}

impl KvCache {
    /// Room for `tokens`; more is made as it is needed.
    pub fn new(config: &ModelConfig, numerics: Numerics, tokens: i64) -> Self {
        let size = [config.kv_heads as i64, tokens, config.head_dim() as i64];
        let zeros = || Tensor::zeros(size, (numerics.product_kind, numerics.device));
        KvCache { k_ksc: zeros(), v_ksc: zeros() }
    }

    fn reserve(&mut self, tokens: i64) {
        let now = self.k_ksc.size()[1];
        if tokens <= now {
            return;
        }
        let more = tokens.max(now + now / 2) - now;
        for cache in [&mut self.k_ksc, &mut self.v_ksc] {
            let mut size = cache.size();
            size[1] = more;
            *cache =
                Tensor::cat(&[&*cache, &Tensor::zeros(size.as_slice(), (cache.kind(), cache.device()))], 1);
        }
    }
}

impl Run<'_> {
    /// What the run's queries `[1, H, T, C]` find among the keys and values of its sequence, the new ones included, for
    /// which there is room.
    fn attention(&mut self, shape: &HeadShape, [q_1htc, k_1ktc, v_1ktc]: &[Tensor; 3]) -> Tensor {
        let Run { cache, cached_tokens, tokens } = self;
        let (cached, tokens) = (*cached_tokens, *tokens);
        let seen = cached + tokens;
        cache.k_ksc.narrow(1, cached, tokens).copy_(&k_1ktc.squeeze_dim(0));
        cache.v_ksc.narrow(1, cached, tokens).copy_(&v_1ktc.squeeze_dim(0));
        if cached == 0 && tokens > 1 {
            return causal(q_1htc, k_1ktc, v_1ktc, shape.window, 0.0);
        }
        // What the first of them sees is what all of them need.
        let first = shape.window.map_or(0, |window| (cached + 1 - window).max(0));
        let window = shape.window.filter(|window| *window < seen - first);
        let (k_ksc, v_ksc) =
            (cache.k_ksc.narrow(1, first, seen - first), cache.v_ksc.narrow(1, first, seen - first));
        let mask = || visible(tokens, seen - first, cached - first, window, q_1htc);
        if tokens > 1 && q_1htc.device() == Device::Cpu {
            let (k, v) = (k_ksc.unsqueeze(0), v_ksc.unsqueeze(0));
            return Tensor::scaled_dot_product_attention(
                q_1htc,
                &k,
                &v,
                Some(&mask()),
                0.0,
                false,
                None,
                true,
            );
        }
        let (heads, head_dim, kv_heads) = (shape.heads, shape.head_dim, shape.kv_heads);
        let group = heads / kv_heads;
        // Query heads that share keys are rows of one product: nothing is repeated for each of them.
        let q_knc = q_1htc.reshape([kv_heads, group * tokens, head_dim]);
        let scores_kns = q_knc.bmm(&k_ksc.transpose(1, 2)) * (1.0 / (head_dim as f64).sqrt());
        let scores_kns = if tokens == 1 { scores_kns } else { scores_kns + mask().repeat([group, 1]) };
        let weights_kns = scores_kns.softmax(-1, Kind::Float).to_kind(v_ksc.kind());
        weights_kns.bmm(&v_ksc).view([1, heads, tokens, head_dim])
    }
}

/// Runs of few tokens in one call where there is a kernel for them, others one by one: `[1, T, H C]`.
fn attend_cached(shape: &HeadShape, projected: &Projected, runs: &mut [Run<'_>]) -> Tensor {
    let mut firsts = Vec::with_capacity(runs.len());
    let mut rows = 0;
    for run in &mut *runs {
        run.cache.reserve(run.cached_tokens + run.tokens);
        firsts.push(rows);
        rows += run.tokens;
    }
    // The kernel sees all of a sequence.
    let is_few = |run: &Run<'_>| {
        let seen = run.cached_tokens + run.tokens;
        run.tokens <= FEW_TOKENS && shape.window.is_none_or(|window| seen <= window)
    };
    let few = runs.iter().zip(&firsts).filter(|(run, _)| is_few(run));
    let few: Vec<_> = few
        .map(|(run, first)| cached_attention::Run {
            k_ksc: &run.cache.k_ksc,
            v_ksc: &run.cache.v_ksc,
            cached: run.cached_tokens,
            first: *first,
            tokens: run.tokens,
        })
        .collect();
    let attended = match few.is_empty() {
        true => None,
        false => cached_attention::attend(&projected.fused_row(), shape.heads, shape.kv_heads, &few)
            .unwrap_or_else(|error| panic!("{error}")),
    };
    let (Projected::Fused(like) | Projected::Split([like, ..])) = projected;
    let out_td = attended.as_ref().map_or_else(
        || Tensor::empty([rows, shape.heads * shape.head_dim], (like.kind(), like.device())),
        Tensor::shallow_clone,
    );
    for (run, first) in runs.iter_mut().zip(firsts) {
        if attended.is_some() && is_few(run) {
            continue;
        }
        let tokens = run.tokens;
        let heads = projected.rows(first, tokens).heads(shape);
        let attended_1htc = run.attention(shape, &heads);
        let attended_td = attended_1htc.transpose(1, 2).reshape([tokens, shape.heads * shape.head_dim]);
        out_td.narrow(0, first, tokens).copy_(&attended_td);
    }
    out_td.unsqueeze(0)
}
