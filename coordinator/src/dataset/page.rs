//! A report as a page: one file, charts included, light or dark as the reader's system is.

use std::fmt::Write as _;

use crate::html::{Escaped, STYLE};

use super::report::{Lengths, Report, Sample, size};

/// Bars of a chart; the rest becomes one.
const BARS: usize = 15;
/// Of a chart, in its own units.
const ROW_HEIGHT: usize = 26;
const LABEL_WIDTH: usize = 190;
const BAR_WIDTH: usize = 430;

/// The page of a dataset called `title`.
pub fn page(title: &str, report: &Report) -> String {
    let title = Escaped(title);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
    );
    facts(&mut out, report);
    let extensions = report.extensions_by_size();
    let name = |name: &str| if name.is_empty() { "(none)".to_owned() } else { format!(".{name}") };
    let by_extension = extensions.iter().map(|(ext, part)| (name(ext), part.content_bytes)).collect();
    chart(&mut out, "Text by extension", by_extension, size);
    let mut repositories: Vec<_> = report.repositories.iter().map(|r| (r.repo_id.clone(), r.bytes)).collect();
    repositories.sort_by_key(|(name, bytes)| (std::cmp::Reverse(*bytes), name.clone()));
    chart(&mut out, "Text by repository", repositories, size);
    let count = |count: u64| count.to_string();
    let mut dropped: Vec<_> = report.dropped.iter().map(|(why, files)| (why.clone(), *files)).collect();
    dropped.sort_by_key(|(why, files)| (std::cmp::Reverse(*files), why.clone()));
    chart(&mut out, "Files left out, by reason", dropped, count);
    let found = report.found.iter().map(|(kind, times)| (kind.clone(), *times)).collect();
    chart(&mut out, "Keys, passwords and addresses", found, count);
    lengths(&mut out, "Bytes of files", &report.file_bytes);
    if let Some(tokens) = &report.file_tokens {
        lengths(&mut out, "Tokens of files", tokens);
    }
    sources(&mut out, report);
    samples(&mut out, &report.samples);
    let _ = write!(
        out,
        "<p class=\"soft\">Written by {}.</p>\n</main>\n</body>\n</html>\n",
        Escaped(&report.written_by)
    );
    out
}

fn facts(out: &mut String, report: &Report) {
    let mut facts = vec![
        ("files to learn from", report.train.files.to_string()),
        ("held out", report.validation.files.to_string()),
        ("text", size(report.train.content_bytes + report.validation.content_bytes)),
        ("repositories", report.repositories.len().to_string()),
        ("files left out", report.dropped.values().sum::<u64>().to_string()),
    ];
    if let Some(tokens) = report.train.tokens {
        facts.insert(3, ("tokens to learn from", tokens.to_string()));
        facts.insert(4, ("tokens held out", report.validation.tokens.unwrap_or(0).to_string()));
    }
    out.push_str("<dl>\n");
    for (what, value) in facts {
        let _ = writeln!(out, "<div><dt>{what}</dt><dd>{value}</dd></div>");
    }
    let _ = write!(out, "</dl>\n<p class=\"soft\">Digest <code>{}</code></p>\n", Escaped(&report.digest));
}

/// Bars, the first first; a reader of screens hears each with its number.
fn chart(out: &mut String, title: &str, mut bars: Vec<(String, u64)>, shown: impl Fn(u64) -> String) {
    if bars.is_empty() {
        return;
    }
    if bars.len() > BARS {
        let rest = bars.split_off(BARS - 1);
        bars.push((format!("{} more", rest.len()), rest.iter().map(|(_, value)| value).sum()));
    }
    let longest = bars.iter().map(|(_, value)| *value).max().unwrap_or(0).max(1);
    let (width, height) = (LABEL_WIDTH + BAR_WIDTH + 100, bars.len() * ROW_HEIGHT);
    let _ = writeln!(
        out,
        "<h2>{title}</h2>\n<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{title}\">"
    );
    for (row, (label, value)) in bars.iter().enumerate() {
        let y = row * ROW_HEIGHT;
        let length = (BAR_WIDTH as f64 * *value as f64 / longest as f64).max(1.0);
        let (text_y, bar_y, value_x) = (y + 17, y + 4, LABEL_WIDTH as f64 + length + 8.0);
        let short: String = match label.chars().count() {
            0..=26 => label.clone(),
            _ => label.chars().take(25).chain(['\u{2026}']).collect(),
        };
        let (label, short, value) = (Escaped(label), Escaped(&short), shown(*value));
        let _ = writeln!(
            out,
            "<g><title>{label}: {value}</title><text x=\"{}\" y=\"{text_y}\" text-anchor=\"end\">{short}</text>\
             <rect x=\"{LABEL_WIDTH}\" y=\"{bar_y}\" width=\"{length:.1}\" height=\"18\" rx=\"2\"/>\
             <text x=\"{value_x:.1}\" y=\"{text_y}\">{value}</text></g>",
            LABEL_WIDTH - 8
        );
    }
    out.push_str("</svg>\n");
}

fn lengths(out: &mut String, title: &str, lengths: &Lengths) {
    let bars = lengths.by_power.iter().map(|(power, files)| (format!("from {}", 1u64 << power), *files));
    chart(out, title, bars.collect(), |files| files.to_string());
    let Lengths { median, p90, p99, longest, .. } = lengths;
    let _ = writeln!(
        out,
        "<p class=\"soft\">median {median}, nine of ten up to {p90}, 99 of 100 up to {p99}, longest {longest}</p>"
    );
}

fn sources(out: &mut String, report: &Report) {
    out.push_str(
        "<h2>Sources</h2>\n<table>\n<thead><tr><th scope=\"col\">repository</th><th scope=\"col\">commit</th>\
         <th scope=\"col\">licences</th><th scope=\"col\" class=\"n\">files</th><th scope=\"col\" class=\"n\">text</th>\
         </tr></thead>\n<tbody>\n",
    );
    for repository in &report.repositories {
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td><code>{}</code></td><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
            Escaped(&repository.repo_id),
            Escaped(repository.commit.get(..12).unwrap_or(&repository.commit)),
            Escaped(&repository.licenses.join(", ")),
            repository.files,
            size(repository.bytes)
        );
    }
    out.push_str("</tbody>\n</table>\n");
}

fn samples(out: &mut String, samples: &[Sample]) {
    if samples.is_empty() {
        return;
    }
    out.push_str("<h2>Samples</h2>\n");
    for sample in samples {
        let more = if sample.is_whole { "" } else { " (beginning)" };
        let _ = write!(
            out,
            "<h3>{} <span class=\"soft\">{}{more}</span></h3>\n<pre tabindex=\"0\">{}</pre>\n",
            Escaped(&sample.file_path),
            Escaped(&sample.repo_id),
            Escaped(&sample.text)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_with_many_bars_sums_up_the_rest() {
        let bars = (0..40u64).map(|n| (format!("kind {n}"), 40 - n)).collect();
        let mut out = String::new();
        chart(&mut out, "Kinds", bars, |value| value.to_string());
        assert_eq!(out.matches("<rect").count(), BARS);
        assert!(out.contains("26 more: 351"), "{out}");
    }
}
