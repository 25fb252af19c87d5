//! Notebooks of Jupyter (format 4, and 3 with its worksheets): their code cells, joined by a blank line, or text, code
//! and outputs between the marks that StarCoder learned notebooks by.

use serde::Deserialize;
use serde::de::IgnoredAny;
use tunefleet_proto::dataset::NOTEBOOK_MARKS;

/// Larger notebooks are not parsed. Outputs (pictures) make the bulk of a notebook and are skipped unread.
pub const MAX_BYTES: u64 = 32 << 20;
/// Of an output, this much is kept, as StarCoder's data has it.
const MAX_OUTPUT_CHARS: usize = 1000;
const START: &str = NOTEBOOK_MARKS[0];
const TEXT: &str = NOTEBOOK_MARKS[1];
const CODE: &str = NOTEBOOK_MARKS[2];
const OUTPUT: &str = NOTEBOOK_MARKS[3];
const NO_OUTPUT: &str = NOTEBOOK_MARKS[4];
/// What stands for the rest of an output, and for the text before code that has none.
const ELLIPSIS: &str = "[...]";
const NO_TEXT: &str = "empty";

/// `O` is how outputs are read: [`IgnoredAny`] passes over them.
#[derive(Deserialize)]
struct Notebook<O> {
    cells: Option<Vec<Cell<O>>>,
    /// Format 3.
    worksheets: Option<Vec<Worksheet<O>>>,
}

#[derive(Deserialize)]
struct Worksheet<O> {
    cells: Vec<Cell<O>>,
}

#[derive(Deserialize)]
struct Cell<O> {
    cell_type: String,
    /// `input` is format 3.
    #[serde(alias = "input")]
    source: Option<Source>,
    outputs: Option<O>,
}

/// A strange one spoils nothing.
#[derive(Deserialize)]
#[serde(untagged)]
enum Outputs {
    Known(Vec<Output>),
    Other(IgnoredAny),
}

#[derive(Deserialize)]
struct Output {
    /// Of a stream, and of results in format 3.
    text: Option<Source>,
    /// Of a result, by media type.
    data: Option<Data>,
}

#[derive(Deserialize)]
struct Data {
    #[serde(rename = "text/plain")]
    plain: Option<Source>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Source {
    Text(String),
    Lines(Vec<String>),
    Other(IgnoredAny),
}

impl Source {
    fn text(&self) -> Option<String> {
        match self {
            Source::Text(text) => Some(text.clone()),
            Source::Lines(lines) => Some(lines.concat()),
            Source::Other(_) => None,
        }
    }
}

impl<O> Cell<O> {
    /// What is in it; `None` where that is no text.
    fn text(&self) -> Option<String> {
        match &self.source {
            Some(source) => Some(source.text()?.trim_end_matches(['\n', '\r']).to_owned()),
            None => Some(String::new()),
        }
    }
}

impl Cell<Outputs> {
    /// The first output that is text.
    fn output(&self) -> Option<String> {
        let Some(Outputs::Known(outputs)) = &self.outputs else { return None };
        let of = |output: &Output| {
            let plain = output.data.as_ref().and_then(|data| data.plain.as_ref());
            output.text.as_ref().or(plain)?.text()
        };
        outputs.iter().find_map(of).filter(|text| !text.trim().is_empty())
    }
}

fn cells<'a, O: Deserialize<'a>>(json: &'a str) -> Option<Vec<Cell<O>>> {
    let notebook: Notebook<O> = serde_json::from_str(json).ok()?;
    match (notebook.cells, notebook.worksheets) {
        (Some(cells), _) => Some(cells),
        (None, Some(worksheets)) => Some(worksheets.into_iter().flat_map(|sheet| sheet.cells).collect()),
        (None, None) => None,
    }
}

/// Whether a code cell is left out: one of shell commands, one whose output nobody wants, one with nothing in it.
fn is_left_out(code: &str) -> bool {
    code.is_empty() || code.starts_with('!') || code.contains("%%capture")
}

/// The code of a notebook; `None` if it is not one.
pub fn code(json: &str) -> Option<String> {
    let mut code = String::new();
    for cell in cells::<IgnoredAny>(json)?.iter().filter(|cell| cell.cell_type == "code") {
        let source = cell.text()?;
        if is_left_out(&source) {
            continue;
        }
        if !code.is_empty() {
            code.push_str("\n\n");
        }
        code.push_str(&source);
    }
    Some(code)
}

/// Text, code and output of a notebook, each behind its mark; `None` if it is not one. Cells of one kind in a row are
/// one; text that no code follows is left out; a mark that is spelt out in a cell is broken up.
pub fn structured(json: &str) -> Option<String> {
    let mut out = String::new();
    let mut text = String::new();
    let mut code = String::new();
    let mut output = None;
    for cell in &cells::<Outputs>(json)? {
        match cell.cell_type.as_str() {
            "code" => {
                let source = cell.text()?;
                if is_left_out(&source) {
                    continue;
                }
                append(&mut code, &source);
                // Of cells in a row, what the last one prints.
                output = cell.output();
            }
            "markdown" | "heading" => {
                if !code.is_empty() {
                    end_pair(&mut out, &mut text, &mut code, output.take());
                }
                append(&mut text, &prose(&cell.text()?));
            }
            _ => {}
        }
    }
    if !code.is_empty() {
        end_pair(&mut out, &mut text, &mut code, output);
    }
    Some(out)
}

fn append(to: &mut String, more: &str) {
    if !to.is_empty() && !more.is_empty() {
        to.push('\n');
    }
    to.push_str(more);
}

fn end_pair(out: &mut String, text: &mut String, code: &mut String, output: Option<String>) {
    if out.is_empty() {
        out.push_str(START);
    }
    let shown = if text.is_empty() { NO_TEXT.to_owned() } else { without_marks(text) };
    let output = match output {
        None => NO_OUTPUT.to_owned(),
        Some(output) => {
            let mut shown: String = output.chars().take(MAX_OUTPUT_CHARS).collect();
            if shown.len() < output.len() {
                shown.push_str(ELLIPSIS);
            }
            format!("{OUTPUT}{}", without_marks(&shown))
        }
    };
    out.push_str(&format!("{TEXT}{shown}{CODE}{}{output}", without_marks(code)));
    text.clear();
    code.clear();
}

/// A cell of Markdown without pictures, tags and signs of headings, on one line.
fn prose(markdown: &str) -> String {
    let mut out = String::with_capacity(markdown.len());
    let mut rest = markdown;
    // Pictures: ![words](address).
    while let Some((before, after)) = rest.split_once("![") {
        out.push_str(before);
        rest = match after.split_once("](").and_then(|(_, after)| after.split_once(')')) {
            Some((_, after)) => after,
            None => {
                out.push_str("![");
                after
            }
        };
    }
    out.push_str(rest);
    let mut plain = String::with_capacity(out.len());
    let mut rest = out.as_str();
    while let Some((before, after)) = rest.split_once('<') {
        plain.push_str(before);
        let is_tag = after.starts_with(|c: char| c.is_ascii_alphabetic() || matches!(c, '/' | '!'));
        rest = match after.split_once('>') {
            Some((tag, after)) if is_tag && !tag.contains('\n') => after,
            _ => {
                plain.push('<');
                after
            }
        };
    }
    plain.push_str(rest);
    let lines = plain.lines().map(|line| line.trim_start_matches('#').trim());
    lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

/// With a space in whatever would be a mark.
fn without_marks(text: &str) -> String {
    let mut out = text.to_owned();
    for mark in NOTEBOOK_MARKS {
        if out.contains(mark) {
            out = out.replace(mark, &mark.replacen('<', "< ", 1));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn code_cells_are_joined_by_a_blank_line() {
        let json = r##"{"nbformat": 4, "metadata": {"x": [1, {}]}, "cells": [
            {"cell_type": "markdown", "source": ["# Title"]},
            {"cell_type": "code", "source": ["import a\n", "import b\n"], "outputs": [{"data": {"image/png": "QQ=="}}]},
            {"cell_type": "code", "source": "!pip install a"},
            {"cell_type": "code", "source": ["%%capture\n", "noise()"]},
            {"cell_type": "code", "source": []},
            {"cell_type": "raw", "source": 7},
            {"cell_type": "code", "source": "x = 1\n!ls"}]}"##;
        assert_eq!(code(json).unwrap(), "import a\nimport b\n\nx = 1\n!ls");
    }

    #[test]
    fn the_structured_form_pairs_text_with_the_code_after_it_and_what_that_prints() {
        let long = "x".repeat(MAX_OUTPUT_CHARS + 5);
        let json = serde_json::json!({"cells": [
            {"cell_type": "code", "source": "import a", "outputs": []},
            {"cell_type": "markdown", "source": ["# Title\n", "![a picture](x.png) Some <b>bold</b> a < b text\n"]},
            {"cell_type": "markdown", "source": "More"},
            {"cell_type": "code", "source": "print('<jupyter_code>')", "outputs": [
                {"output_type": "display_data", "data": {"image/png": "QQ=="}},
                {"output_type": "stream", "text": ["one\n", "two"]}, {"output_type": "stream", "text": "not this"}]},
            {"cell_type": "code", "source": "b"},
            {"cell_type": "markdown", "source": ""},
            {"cell_type": "code", "source": "c", "outputs": [{"data": {"text/plain": long}}]},
            {"cell_type": "code", "source": "!ls", "outputs": [{"text": "shell"}]},
            {"cell_type": "markdown", "source": "The end"}]})
        .to_string();
        let expected = [
            "<jupyter_start><jupyter_text>empty<jupyter_code>import a<empty_output>",
            "<jupyter_text>Title Some bold a < b text\nMore<jupyter_code>print('< jupyter_code>')\nb<empty_output>",
            &format!(
                "<jupyter_text>empty<jupyter_code>c<jupyter_output>{}[...]",
                "x".repeat(MAX_OUTPUT_CHARS)
            ),
        ];
        assert_eq!(structured(&json).unwrap(), expected.concat());
        assert_eq!(structured(r#"{"cells": []}"#).as_deref(), Some(""));
        let strange = r#"{"cells": [{"cell_type": "code", "source": "a", "outputs": {"b": [1]}}]}"#;
        assert!(structured(strange).unwrap().ends_with("<jupyter_code>a<empty_output>"));
        assert_eq!(structured("[1]"), None);
    }

    #[test]
    fn the_old_format_is_read() {
        let json = r#"{"nbformat": 3, "worksheets": [{"cells": [{"cell_type": "code", "input": ["a = 1"]}]},
            {"cells": [{"cell_type": "code", "input": "b = 2"}]}]}"#;
        assert_eq!(code(json).unwrap(), "a = 1\n\nb = 2");
    }

    #[test]
    fn what_is_no_notebook_is_refused() {
        let deep = |open: &str| format!(r#"{{"cells": {}"#, open.repeat(200_000));
        let deep_source = format!(r#"{{"cells": [{{"cell_type": "code", "source": {}"#, "[".repeat(200_000));
        for json in [
            "",
            "null",
            "[]",
            "{}",
            r#"{"cells": 3}"#,
            r#"{"cells": [{"source": "x"}]}"#,
            r#"{"cells": [{"cell_type": "code", "source": 7}]}"#,
            r#"{"cells": [{"cell_type": "code", "source": "x"}]"#,
            r#"{"cells": []} trailing"#,
            r#"{"cells": [{"cell_type": "code", "source": "\ud800"}]}"#,
            &deep("["),
            &deep(r#"{"a":"#),
            &deep_source,
        ] {
            assert_eq!(code(json), None, "{:?}", json.get(..40));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let text = String::from_utf8_lossy(&bytes);
            prop_assert_eq!(code(&text).is_some(), structured(&text).is_some());
        }

        #[test]
        fn a_damaged_notebook_never_panics(at in 0usize..120, byte: u8, cut in 0usize..120) {
            let json = r#"{"cells": [{"cell_type": "code", "source": ["a\n", "b"]}, {"cell_type": "code", "source": "c"}]}"#;
            let mut bytes = json.as_bytes().to_vec();
            if let Some(slot) = bytes.get_mut(at) {
                *slot = byte;
            }
            bytes.truncate(cut);
            let text = String::from_utf8_lossy(&bytes);
            prop_assert_eq!(code(&text).is_some(), structured(&text).is_some());
        }

        #[test]
        fn sources_survive_in_either_form(cells in proptest::collection::vec("[a-z =\n]{0,20}", 0..6)) {
            let as_text: Vec<_> = cells.iter()
                .map(|s| serde_json::json!({"cell_type": "code", "source": s})).collect();
            let as_lines: Vec<_> = cells.iter()
                .map(|s| serde_json::json!({"cell_type": "code", "source": s.split_inclusive('\n').collect::<Vec<_>>()}))
                .collect();
            let text = code(&serde_json::json!({"cells": as_text}).to_string());
            let lines = code(&serde_json::json!({"cells": as_lines}).to_string());
            let kept: Vec<_> = cells.iter().map(|s| s.trim_end_matches('\n')).filter(|s| !s.is_empty()).collect();
            let expected = kept.join("\n\n");
            prop_assert_eq!(text.as_deref(), Some(expected.as_str()));
            prop_assert_eq!(text, lines);
        }
    }
}
