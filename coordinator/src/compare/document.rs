//! A report as blocks, and the two forms that it is written in: a page that is one file, and Markdown with its figures
//! beside it.

use std::fmt::Write as _;

use super::plot::Plot;
use crate::html::{Escaped, STYLE};

/// What only reports have.
const MORE_STYLE: &str = "
body { max-width: 84rem; } figure { margin: 1rem 0; }
@media (min-width: 60rem) { figure { display: inline-block; width: 49%; } } .wide { overflow-x: auto; } td:first-child { white-space: nowrap; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: .8rem; }
.sides pre { margin: .2rem 0; white-space: pre-wrap; } .sides h4 { margin: 0; font-size: .9rem; }
.right { border-color: #1a7f37; } mark { background: none; color: inherit; font-weight: 600; text-decoration: underline; }
";

/// A part of a report.
#[derive(Debug, Clone, PartialEq)]
pub enum Block {
    /// A heading of the second level.
    Heading(String),
    /// A heading of the third.
    Subheading(String),
    /// A paragraph.
    Text(String),
    /// A table; the first column is names, the others are numbers.
    Table {
        /// Names of the columns.
        head: Vec<String>,
        /// Its rows.
        rows: Vec<Vec<String>>,
    },
    /// A figure.
    Figure(Plot),
    /// A place in a file, and what was made of it.
    Sample(Sample),
}

/// A hole and the completions of several models.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Where it is.
    pub title: String,
    /// What stands before and after it.
    pub before: String,
    /// See `before`.
    pub after: String,
    /// Who made what, what stood there first; and whether it is that.
    pub sides: Vec<(String, String, bool)>,
}

/// Everything as a page.
pub fn page(title: &str, blocks: &[Block]) -> String {
    let title = Escaped(title);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>{STYLE}{MORE_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
    );
    for block in blocks {
        let _ = match block {
            Block::Heading(text) => writeln!(out, "<h2>{}</h2>", Escaped(text)),
            Block::Subheading(text) => writeln!(out, "<h3>{}</h3>", Escaped(text)),
            Block::Text(text) => writeln!(out, "<p>{}</p>", Escaped(text)),
            Block::Table { head, rows } => html_table(&mut out, head, rows),
            Block::Figure(plot) => {
                let caption = Escaped(&plot.title);
                writeln!(out, "<figure>\n<figcaption>{caption}</figcaption>\n{}</figure>", plot.svg())
            }
            Block::Sample(sample) => html_sample(&mut out, sample),
        };
    }
    out.push_str("</main>\n</body>\n</html>\n");
    out
}

/// Everything as Markdown; figures are files of [`Plot::file_name`].
pub fn markdown(title: &str, blocks: &[Block]) -> String {
    let mut out = format!("# {}\n", plain(title));
    for block in blocks {
        out.push('\n');
        let _ = match block {
            Block::Heading(text) => writeln!(out, "## {}", plain(text)),
            Block::Subheading(text) => writeln!(out, "### {}", plain(text)),
            Block::Text(text) => writeln!(out, "{}", plain(text)),
            Block::Table { head, rows } => {
                let row = |cells: &[String]| {
                    format!("| {} |", cells.iter().map(|cell| plain(cell)).collect::<Vec<_>>().join(" | "))
                };
                let rule: Vec<&str> =
                    (0..head.len()).map(|column| if column == 0 { "---" } else { "---:" }).collect();
                let _ = writeln!(out, "{}\n| {} |", row(head), rule.join(" | "));
                rows.iter().try_for_each(|cells| writeln!(out, "{}", row(cells)))
            }
            Block::Figure(plot) => writeln!(out, "![{}]({})", plain(&plot.title), plot.file_name()),
            Block::Sample(sample) => markdown_sample(&mut out, sample),
        };
    }
    out
}

fn html_table(out: &mut String, head: &[String], rows: &[Vec<String>]) -> std::fmt::Result {
    out.push_str(
        "<div class=\"wide\" tabindex=\"0\" role=\"region\" aria-label=\"table\">\n<table>\n<thead><tr>",
    );
    for (column, name) in head.iter().enumerate() {
        let class = if column == 0 { "" } else { " class=\"n\"" };
        write!(out, "<th scope=\"col\"{class}>{}</th>", Escaped(name))?;
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    for row in rows {
        out.push_str("<tr>");
        for (column, cell) in row.iter().enumerate() {
            let class = if column == 0 { "" } else { " class=\"n\"" };
            write!(out, "<td{class}>{}</td>", Escaped(cell))?;
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody>\n</table>\n</div>\n");
    Ok(())
}

fn html_sample(out: &mut String, sample: &Sample) -> std::fmt::Result {
    let Sample { title, before, after, sides } = sample;
    write!(
        out,
        "<h3>{}</h3>\n<pre tabindex=\"0\">{}<mark>\u{2592}\u{2592}\u{2592}</mark>{}</pre>\n<div class=\"sides\">\n",
        Escaped(title),
        Escaped(before),
        Escaped(after)
    )?;
    for (who, text, is_right) in sides {
        let (class, note) = if *is_right { (" class=\"right\"", " (as it stood there)") } else { ("", "") };
        writeln!(
            out,
            "<div><h4>{}{note}</h4><pre{class} tabindex=\"0\">{}</pre></div>",
            Escaped(who),
            Escaped(text)
        )?;
    }
    out.push_str("</div>\n");
    Ok(())
}

fn markdown_sample(out: &mut String, sample: &Sample) -> std::fmt::Result {
    let Sample { title, before, after, sides } = sample;
    writeln!(out, "### {}\n\n{}", plain(title), fenced(&format!("{before}<HERE>{after}")))?;
    for (who, text, is_right) in sides {
        let note = if *is_right { " (as it stood there)" } else { "" };
        writeln!(out, "\n{}{note}:\n\n{}", plain(who), fenced(text))?;
    }
    Ok(())
}

/// Text between fences that are longer than any in it.
fn fenced(text: &str) -> String {
    let mut longest = 0;
    let mut run = 0;
    for c in text.chars() {
        run = if c == '`' { run + 1 } else { 0 };
        longest = longest.max(run);
    }
    let fence = "`".repeat((longest + 1).max(3));
    let end = if text.ends_with('\n') { "" } else { "\n" };
    format!("{fence}text\n{text}{end}{fence}")
}

/// Text on one line, in which nothing is markup.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\r' => out.push(' '),
            '|' | '<' | '>' | '*' | '`' | '[' | ']' | '\\' | '#' => {
                out.push('\\');
                out.push(c);
            }
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_model_says_becomes_markup() {
        let hostile = "</pre><script>alert(1)</script>```` | \n# x";
        let sample = Sample {
            title: hostile.to_owned(),
            before: hostile.to_owned(),
            after: hostile.to_owned(),
            sides: vec![(hostile.to_owned(), hostile.to_owned(), true)],
        };
        let table = Block::Table { head: vec!["a".to_owned()], rows: vec![vec![hostile.to_owned()]] };
        let blocks = [Block::Sample(sample), table];
        let (page, text) = (page(hostile, &blocks), markdown(hostile, &blocks));
        assert!(!page.contains("<script"), "{page}");
        assert!(text.contains("`````text\n</pre>"), "{text}");
        assert!(
            text.lines().filter(|line| line.starts_with('|')).all(|line| line.matches(" | ").count() < 2),
            "{text}"
        );
    }
}
