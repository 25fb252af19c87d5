//! Code cells of Jupyter notebooks (format 4, and 3 with its worksheets), joined by a blank line.

use serde::Deserialize;
use serde::de::IgnoredAny;

/// Larger notebooks are not parsed. Outputs (pictures) make the bulk of a notebook and are skipped unread.
pub const MAX_BYTES: u64 = 32 << 20;

#[derive(Deserialize)]
struct Notebook {
    cells: Option<Vec<Cell>>,
    /// Format 3.
    worksheets: Option<Vec<Worksheet>>,
}

#[derive(Deserialize)]
struct Worksheet {
    cells: Vec<Cell>,
}

#[derive(Deserialize)]
struct Cell {
    cell_type: String,
    /// `input` is format 3.
    #[serde(alias = "input")]
    source: Option<Source>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Source {
    Text(String),
    Lines(Vec<String>),
    Other(IgnoredAny),
}

/// The code of a notebook; `None` if it is not one. A cell that starts with `!` (shell) or holds `%%capture`
/// is left out, as is a cell with nothing in it.
pub fn code(json: &str) -> Option<String> {
    let notebook: Notebook = serde_json::from_str(json).ok()?;
    let cells = match (notebook.cells, notebook.worksheets) {
        (Some(cells), _) => cells,
        (None, Some(worksheets)) => worksheets.into_iter().flat_map(|sheet| sheet.cells).collect(),
        (None, None) => return None,
    };
    let mut code = String::new();
    for cell in cells.into_iter().filter(|cell| cell.cell_type == "code") {
        let source = match cell.source {
            Some(Source::Text(text)) => text,
            Some(Source::Lines(lines)) => lines.concat(),
            Some(Source::Other(_)) => return None,
            None => continue,
        };
        let source = source.trim_end_matches(['\n', '\r']);
        if source.is_empty() || source.starts_with('!') || source.contains("%%capture") {
            continue;
        }
        if !code.is_empty() {
            code.push_str("\n\n");
        }
        code.push_str(source);
    }
    Some(code)
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
            let _ = code(&String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn a_damaged_notebook_never_panics(at in 0usize..120, byte: u8, cut in 0usize..120) {
            let json = r#"{"cells": [{"cell_type": "code", "source": ["a\n", "b"]}, {"cell_type": "code", "source": "c"}]}"#;
            let mut bytes = json.as_bytes().to_vec();
            if let Some(slot) = bytes.get_mut(at) {
                *slot = byte;
            }
            bytes.truncate(cut);
            let _ = code(&String::from_utf8_lossy(&bytes));
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
