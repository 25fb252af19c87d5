//! A plan for people: counts with separators, sizes in binary units, one line per item.

use std::io::{self, Write};

use super::report::{RankShards, Report};

/// Ranks whose shards are printed; `--json` has all.
const RANKS_SHOWN: usize = 16;

/// Prints `report`.
pub fn print(report: &Report, out: &mut impl Write) -> io::Result<()> {
    let Report { config, parameters, tokens, .. } = report;
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

    memory_table(report, out)?;
    times(report, out)?;
    disk(report, out)
}

fn memory_table(report: &Report, out: &mut impl Write) -> io::Result<()> {
    let Report { parameters, memory, .. } = report;
    if let Some(chosen) = &report.chosen {
        writeln!(out, "\nmemory budget: {chosen}")?;
    }
    let what = if memory.on_gpu { "GPU memory of one rank" } else { "memory of one rank" };
    writeln!(out, "\n{what}, at its peak: {}", memory.when)?;
    for item in &memory.items {
        line(out, item.what, item.bytes, "")?;
    }
    line(out, "total", memory.needed_bytes, "")?;
    if let Some(rule) = parameters.adapter.as_ref().map(|adapter| &adapter.rule_of_thumb)
        && !rule.is_empty()
    {
        let gb = |bytes: u64| format!("{:.2}", bytes as f64 / 1e9);
        let terms: Vec<String> =
            rule.iter().map(|item| format!("{} ({})", gb(item.bytes), item.what)).collect();
        let sum = gb(rule.iter().map(|item| item.bytes).sum());
        writeln!(out, "  rule of thumb, GB, activations apart: {} = {sum}", terms.join(" + "))?;
    }
    if let Some(measurement) = &report.measurement {
        line(out, "tensors, worked out", memory.tensor_bytes, "")?;
        line(out, "tensors, measured", measurement.peak_bytes, "")?;
    }
    let place = if memory.on_gpu { "GPU" } else { "main memory, shared by its ranks" };
    match memory.available_bytes {
        Some(bytes) => line(out, "available", bytes, &format!("  ({place})"))?,
        None => writeln!(out, "  available memory is not known: give --memory-gib to compare")?,
    }
    let Some(host) = &memory.host else { return Ok(()) };
    writeln!(out, "\nhost memory of one rank")?;
    for item in &host.items {
        line(out, item.what, item.bytes, "")?;
    }
    line(out, "total", host.rank_bytes, "")?;
    line(out, "of a machine", host.machine_bytes, &format!("  ({} ranks on it)", host.ranks))?;
    match memory.host_available_bytes {
        Some(bytes) => line(out, "available", bytes, "  (this machine)"),
        None => Ok(()),
    }
}

fn times(report: &Report, out: &mut impl Write) -> io::Result<()> {
    let Some(times) = &report.times else {
        return writeln!(out, "\ntime is not known: --measure takes it on this machine");
    };
    writeln!(out, "\ntime, {}", times.basis)?;
    let entry = |out: &mut dyn Write, what: &str, value: String, more: String| {
        writeln!(out, "  {what:<42} {value:>11}{more}")
    };
    let traffic = match times.gather_seconds + times.reduce_seconds {
        0.0 => String::new(),
        _ => format!(
            "  ({} of gathers, {} of reductions, {} not hidden)",
            seconds(times.gather_seconds),
            seconds(times.reduce_seconds),
            seconds(times.exposed_seconds)
        ),
    };
    entry(out, "one step", seconds(times.step_seconds), traffic)?;
    entry(out, "  of it the update", seconds(times.update_seconds), String::new())?;
    let rate = format!("{}/s", count(times.tokens_per_second as u64));
    let used = times.model_flops_utilization.map(|share| format!("  (MFU {:.0}%)", share * 100.0));
    entry(out, "tokens", rate, used.unwrap_or_default())?;
    if times.evaluations > 0 {
        let how_often = format!("  (x {})", times.evaluations);
        entry(out, "one evaluation", seconds(times.evaluation_seconds), how_often)?;
    }
    let how_often = format!("  (x {} at most)", times.checkpoints);
    entry(out, "one checkpoint, training stands still", seconds(times.pause_seconds), how_often)?;
    entry(out, "one checkpoint, until it is written", seconds(times.write_seconds), String::new())?;
    let cost = report.cost.map(|cost| format!("  (cost {cost:.2})"));
    entry(out, "training", seconds(times.training_seconds), cost.unwrap_or_default())
}

fn disk(report: &Report, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "\ndisk of the output")?;
    for item in &report.disk.items {
        line(out, item.what, item.bytes, "")?;
    }
    line(out, "total", report.disk.needed_bytes, "")?;
    match report.disk.free_bytes {
        Some(bytes) => line(out, "free", bytes, ""),
        None => Ok(()),
    }
}

fn line(out: &mut impl Write, what: &str, bytes: u64, more: &str) -> io::Result<()> {
    writeln!(out, "  {what:<42} {:>11}{more}", size(bytes))
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
    if report.fits != Some(false) {
        return None;
    }
    let needed = report.memory.most_bytes(report.measurement.as_ref());
    if let Some(available) = report.memory.available_bytes.filter(|available| needed > *available) {
        return Some(format!(
            "a rank needs {}, but can have {}: use more ranks on more machines, a smaller model, or fewer tokens \
             in a micro-batch",
            size(needed),
            size(available)
        ));
    }
    let (host, available) = report.memory.host.as_ref().zip(report.memory.host_available_bytes)?;
    Some(format!(
        "{} ranks need {} of this machine's main memory, which is {}: set train.checkpoints_async: false, offload \
         less, or use more machines",
        host.ranks,
        size(host.machine_bytes),
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

/// A duration in the unit that suits it.
pub fn seconds(seconds: f64) -> String {
    match seconds {
        s if s < 0.001 => format!("{:.0} us", s * 1e6),
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
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
        let said = [0.0, 0.0123, 1.0, 119.96, 600.0, 36_000.0].map(seconds);
        assert_eq!(said, ["0 us", "12 ms", "1.0 s", "120.0 s", "10 min", "10.0 h"]);
    }
}
