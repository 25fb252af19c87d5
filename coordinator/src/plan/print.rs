//! A plan for people: counts with separators, sizes in binary units, one line per item.

use std::io::{self, Write};

use super::report::{RankShards, Report};

/// Ranks whose shards are printed; `--json` has all.
const RANKS_SHOWN: usize = 16;

/// Prints `report`.
pub fn print(report: &Report, out: &mut impl Write) -> io::Result<()> {
    let Report { config, parameters, tokens, memory, .. } = report;
    let count = |n: u64| count(n);
    writeln!(out, "job         {} -> {}", report.job, report.output.display())?;
    writeln!(out, "model       {}", report.model)?;
    writeln!(
        out,
        "            {} layers, width {}, {} heads ({} key-value), vocabulary {}, {} positions",
        config.layers,
        count(config.hidden_size),
        config.heads,
        config.kv_heads,
        count(config.vocab_size),
        count(config.max_positions),
    )?;
    writeln!(
        out,
        "parameters  {} = {} embeddings + {} blocks x {}",
        count(parameters.total),
        count(parameters.embeddings),
        config.layers,
        count(parameters.per_block),
    )?;
    if let Some(adapter) = &parameters.adapter {
        writeln!(
            out,
            "adapter     {} trainable of {}: {:.4}%, on {} linears, over {}",
            count(adapter.trainable),
            count(adapter.all),
            adapter.percent,
            count(adapter.linears),
            adapter.base,
        )?;
        if !adapter.unmatched.is_empty() {
            writeln!(out, "            nothing matches {}", adapter.unmatched.join(", "))?;
        }
    }
    writeln!(
        out,
        "step        {} ranks x {} micro-batches x {} sequences x {} tokens = {} tokens",
        tokens.ranks,
        tokens.accumulate_micro_batches,
        tokens.micro_batch_sequences,
        count(u64::from(tokens.sequence_tokens)),
        count(tokens.per_step),
    )?;
    writeln!(out, "training    {} steps = {} tokens", count(tokens.steps), count(tokens.total))?;
    writeln!(out, "checkpoint  {}", size(report.checkpoint_bytes))?;
    match report.export_bytes {
        0 => writeln!(out, "export      none")?,
        bytes => writeln!(out, "export      {}", size(bytes))?,
    }

    writeln!(out, "\nshards (of the first block; elements are counted in the flattened parameter)")?;
    for rank in report.ranks.iter().take(RANKS_SHOWN) {
        writeln!(out, "  rank {:<3} {:>15} elements", rank.rank, count(rank.elements))?;
        for (unit, label) in [("embed", "embed"), ("block.0", "block")] {
            writeln!(out, "           {label}  {}", extent(rank, unit))?;
        }
    }
    if let Some(rest) = report.ranks.len().checked_sub(RANKS_SHOWN + 1) {
        writeln!(out, "  and {} more: --json shows all", rest + 1)?;
    }

    writeln!(out, "\nmemory of one rank")?;
    for item in &memory.items {
        writeln!(out, "  {:<36} {:>11}", item.what, size(item.bytes))?;
    }
    writeln!(out, "  {:<36} {:>11}", "total", size(memory.needed_bytes))?;
    if let Some(rule) = parameters.adapter.as_ref().map(|adapter| &adapter.rule_of_thumb)
        && !rule.is_empty()
    {
        let gb = |bytes: u64| format!("{:.2}", bytes as f64 / 1e9);
        let terms: Vec<String> =
            rule.iter().map(|item| format!("{} ({})", gb(item.bytes), item.what)).collect();
        let sum = gb(rule.iter().map(|item| item.bytes).sum());
        writeln!(out, "  rule of thumb, GB, activations apart: {} = {sum}", terms.join(" + "))?;
    }
    let place = if memory.on_gpu { "GPU" } else { "main memory, shared by its ranks" };
    match memory.available_bytes {
        Some(bytes) => writeln!(out, "  {:<36} {:>11}  ({place})", "available", size(bytes))?,
        None => writeln!(out, "  available memory is not known: give --memory-gib to compare")?,
    }
    Ok(())
}

/// Why the job does not fit and what would help; `None` where it fits or nobody knows.
pub fn misfit(report: &Report) -> Option<String> {
    if report.missing_slots > 0 {
        let ranks = report.tokens.ranks;
        return Some(format!(
            "the job needs {ranks} GPUs, this machine has {}: lower train.ranks, or run on a control plane \
             (workers.coordinator)",
            ranks.saturating_sub(report.missing_slots)
        ));
    }
    let available = report.memory.available_bytes.filter(|_| report.fits == Some(false))?;
    Some(format!(
        "a rank needs {}, but can have {}: use more ranks on more machines, a smaller model, or fewer tokens \
         in a micro-batch",
        size(report.memory.needed_bytes),
        size(available)
    ))
}

/// From where to where a rank's pieces of `unit` reach.
fn extent(rank: &RankShards, unit: &str) -> String {
    let mut pieces = rank.pieces.iter().filter(|piece| piece.unit == unit);
    let Some(first) = pieces.next() else { return "padding only".to_owned() };
    match pieces.next_back() {
        None => format!("{}[{}..{}]", first.parameter, first.from, first.to),
        Some(last) => format!("{}[{}..] to {}[..{}]", first.parameter, first.from, last.parameter, last.to),
    }
}

/// `1234567` as `1,234,567`.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Bytes in the largest unit that leaves at least 1.
pub fn size(bytes: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match UNITS.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) => format!("{:.1} {name}", bytes as f64 / *unit as f64),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_easy_to_read() {
        assert_eq!(
            [count(0), count(999), count(1000), count(15_517_456_384)],
            ["0", "999", "1,000", "15,517,456,384"]
        );
        assert_eq!([size(1023), size(1536), size(80 << 30)], ["1023 B", "1.5 KiB", "80.0 GiB"]);
    }
}
