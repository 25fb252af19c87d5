//! What the loss takes: `worker/src/model/head.rs` group by group.

use super::shape::Shape;

/// Rows whose gradients of the logits exist at once: the worker's, on CPUs and GPUs alike.
const GROUP_ROWS: f64 = 1024.0;

/// The gradients of a group's logits, kept from step to step.
pub fn scratch(shape: &Shape) -> f64 {
    shape.tokens.min(GROUP_ROWS) * shape.vocabulary * shape.product_bytes
}

/// Most while loss and gradients are made of the last block's output, the gradient of that among it.
/// `trains_head`: the output embedding is trained.
pub fn loss(shape: &Shape, trains_head: bool) -> f64 {
    let p = shape.product_bytes;
    let rows = shape.tokens.min(GROUP_ROWS);
    let group = rows * shape.width;
    let weight = shape.vocabulary * shape.width;
    let nd = shape.rows(shape.width);
    // Of all groups but one, when the last one is made.
    let before = nd - group * p;
    let wide = if p < 4.0 { 8.0 * group } else { 4.0 * group };
    let trained = match (trains_head, p < 4.0) {
        (false, _) => 0.0,
        // In place.
        (true, false) => wide,
        // libtorch adds bf16 to fp32 on a CPU through a copy in fp32, and on a GPU without.
        (true, true) => {
            let widened = if shape.machine.on_gpu { 0.0 } else { 4.0 * weight };
            wide.max(group * p + p * weight + widened)
        }
    };
    let last = before + trained.max(2.0 * group * p);
    // Joined, and then through the final norm.
    let inside = last.max(2.0 * nd);
    let widened_head = if shape.is_widened() { p * weight + nd } else { 0.0 };
    nd + widened_head + inside
}
