//! Texts with what follows them, and where they are to end.

use std::io::Read;
use std::path::Path;

use super::*;

fn ended(shape: Shape, prefix: &str, suffix: &str, text: &str) -> String {
    let rules = Rules::between(shape, Vec::new(), prefix, suffix);
    // However it comes, it ends in the same place.
    let whole = rules.end(text, false);
    let mut first = None;
    for (at, character) in text.char_indices() {
        let so_far = &text[..at + character.len_utf8()];
        if let Some(end) = rules.end(so_far, false) {
            first = Some(&so_far[..end.at]);
            break;
        }
        assert!(rules.settled(so_far) <= so_far.len());
    }
    assert_eq!(first.map(str::len), whole.map(|end| end.at), "{text:?}");
    first.unwrap_or(text).to_owned()
}

#[test]
fn a_line_ends_where_the_line_ends_and_not_inside_of_what_it_has_opened() {
    for (prefix, text, suffix, expected) in [
        ("x = ", "1 + 2\ny = 3\n", "\n", "1 + 2"),
        ("x = ", "f(1,\n      2)\ny = 3\n", "\n", "f(1,\n      2)"),
        ("x = ", "[\n    1,\n]\ny\n", "\n", "[\n    1,\n]"),
        ("s = ", "\"\"\"a\nb (\n\"\"\"\nt = 1\n", "\n", "\"\"\"a\nb (\n\"\"\""),
        ("s = ", "'it ( is'\nt\n", "\n", "'it ( is'"),
        ("s = ", "f'{x} ('\nt\n", "\n", "f'{x} ('"),
        ("s = ", "\"a \\\" (\"\nt\n", "\n", "\"a \\\" (\""),
        ("", "x = 1  # don't (\ny\n", "\n", "x = 1  # don't ("),
        ("let x = ", "foo(&'a str, y); // see (\nlet\n", "\n", "foo(&'a str, y); // see ("),
        ("f(", "x, y)\nz\n", "\n", "x, y)"),
        // The editor has closed the bracket.
        ("f(", "x, y)\nz\n", ")\n", "x, y"),
        ("f(", "g(x), y)\nz\n", ")\n", "g(x), y"),
        ("def f(", "x) -> int:\n    return x\n", ") -> int:\n    pass\n", "x"),
        // A line of its own before others brings its end.
        ("a\n", "    b\n    c\n", "    d\n", "    b\n"),
        ("a\n", "    b\n    c\n", "\n    d\n", "    b"),
        ("a\n", "\n    b\n    c\n", "\n", "\n    b"),
    ] {
        assert_eq!(ended(Shape::Line, prefix, suffix, text), expected, "{prefix:?} {text:?} {suffix:?}");
    }
}

#[test]
fn a_block_ends_with_the_construct_that_the_cursor_is_in() {
    for (prefix, text, suffix, expected) in [
        ("def f(x):\n    ", "y = x\n    return y\n\n\ndef g():\n", "\n", "y = x\n    return y"),
        ("def f(x):", "\n    y = x\n    return y\n\ndef g():\n    pass\n", "\n", "\n    y = x\n    return y"),
        ("if x:", "\n    a()\nelse:\n    b()\nc()\nd()\n", "\n", "\n    a()\nelse:\n    b()"),
        ("fn f() {\n    ", "let x = 1;\n    x\n}\n\nfn g() {\n}\n", "\n", "let x = 1;\n    x\n}"),
        ("fn f() {\n    ", "let x = 1;\n    x\n}\n\nfn g() {\n}\n", "\n}\n", "let x = 1;\n    x"),
        ("fn f() ", "{\n    x\n}\n\nfn g() {}\nfn\n", "\n", "{\n    x\n}"),
    ] {
        assert_eq!(ended(Shape::Block, prefix, suffix, text), expected, "{prefix:?} {text:?} {suffix:?}");
    }
}

#[test]
fn what_stands_after_the_cursor_or_comes_again_is_not_written_once_more() {
    let suffix = "\n    return total\n";
    let text = "a = 1\n    b = 2\n    return total\n    more\n";
    assert_eq!(ended(Shape::Block, "def f():\n    ", suffix, text), "a = 1\n    b = 2");
    let again = "total += 1\n    total += 1\n    total += 1\n    total += 1\n";
    assert_eq!(ended(Shape::Block, "def f():\n    ", "\n", again), "total += 1\n    total += 1");
    let pair = "first()\n    second()\n    first()\n    second()\n    first()\n";
    assert_eq!(ended(Shape::Block, "def f():\n    ", "\n", pair), "first()\n    second()\n    first()");
}

#[test]
fn strings_end_a_text_and_what_may_become_one_is_not_shown() {
    let rules = Rules::strings(vec!["END".to_owned(), String::new(), "\n\n".to_owned()]);
    assert_eq!(rules.end("a END b", false), Some(End { at: 2, string: Some(0) }));
    assert_eq!(rules.end("a\n\nb END", false), Some(End { at: 1, string: Some(1) }));
    assert_eq!(rules.end("a EN", true), None);
    assert_eq!(rules.settled("a EN"), 2);
    assert_eq!(rules.settled("a E"), 2);
    assert_eq!(rules.settled("a \u{e9}"), 4);
    assert_eq!(rules.settled("a b\n"), 3);
}

#[test]
fn the_shape_follows_from_what_is_on_the_line() {
    assert_eq!(Shape::of("def f(", ")\n"), Shape::Line);
    assert_eq!(Shape::of("x = ", "\n"), Shape::Line);
    assert_eq!(Shape::of("def f():\n    ", "\n\nx\n"), Shape::Block);
    assert_eq!(Shape::of("", ""), Shape::Block);
}

/// The single-line infilling tasks, where they are.
fn tasks() -> Vec<[String; 3]> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../shared/data/HumanEval-SingleLineInfilling.jsonl.gz");
    let Ok(packed) = std::fs::File::open(path) else {
        eprintln!("skipped: the single-line infilling tasks are not here");
        return Vec::new();
    };
    let mut text = String::new();
    flate2::read::GzDecoder::new(packed).read_to_string(&mut text).unwrap();
    text.lines()
        .map(|line| {
            let task: serde_json::Value = serde_json::from_str(line).unwrap();
            ["prompt", "suffix", "canonical_solution"].map(|name| task[name].as_str().unwrap().to_owned())
        })
        .collect()
}

#[test]
fn nearly_all_single_lines_with_noise_behind_them_are_cut_exactly_at_their_end() {
    let tasks = tasks();
    let mut missed = Vec::new();
    for (number, [prefix, suffix, solution]) in tasks.iter().enumerate() {
        let [_, _, noise] = &tasks[(number * 7 + 13) % tasks.len()];
        let text = format!("{}\n{noise}    return ((x\n", solution.trim_end_matches('\n'));
        let found = ended(Shape::Line, prefix, suffix, &text);
        if found.trim_end_matches('\n') != solution.trim_end_matches('\n') {
            missed.push((solution, found));
        }
    }
    eprintln!("{} of {} cut elsewhere: {missed:#?}", missed.len(), tasks.len());
    assert!(missed.len() * 50 <= tasks.len(), "more than 2%");
}
