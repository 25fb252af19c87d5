//! What people reckon an adapter's training takes.

use super::Item;

/// What people reckon an adapter's training takes, activations apart: half a byte for each parameter
/// of the base, and for each trained one 2 bytes of weight, 2 of gradient and 12 of optimizer.
pub fn rule_of_thumb(base_parameters: u64, trained: u64) -> Vec<Item> {
    let item = |what, bytes| Item { what, bytes };
    vec![
        item("base at 4 bits", base_parameters / 2),
        item("adapter, 16 bits", 2 * trained),
        item("gradients, 16 bits", 2 * trained),
        item("optimizer, fp32 copy and moments", 12 * trained),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_of_thumb_of_the_published_run_is_9_51_gb() {
        let items = rule_of_thumb(15_517_456_384, 110_428_160);
        let gb: Vec<String> = items.iter().map(|item| format!("{:.2}", item.bytes as f64 / 1e9)).collect();
        assert_eq!(gb, ["7.76", "0.22", "0.22", "1.33"]);
        let total = items.iter().map(|item| item.bytes).sum::<u64>() as f64 / 1e9;
        assert!((total - 9.515).abs() < 0.02, "{total}");
    }
}
