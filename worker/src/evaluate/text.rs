//! How like two texts are, and where a completion is cut.

/// Longer texts are compared up to here: the time grows with the square.
const MAX_COMPARED_CHARS: usize = 4000;

/// Whether a completion is what stood there, white space at both ends aside.
pub fn is_exact(completion: &str, truth: &str) -> bool {
    completion.trim() == truth.trim()
}

/// 1 - edits / length of the longer (Levenshtein 1966), white space at both ends aside.
pub fn similarity(completion: &str, truth: &str) -> f64 {
    let short = |text: &str| text.trim().chars().take(MAX_COMPARED_CHARS).collect::<String>();
    strsim::normalized_levenshtein(&short(completion), &short(truth))
}

/// Up to the end of the first line that is not blank, which stays with its end.
pub fn first_line(completion: &str) -> &str {
    let begin = completion.len() - completion.trim_start().len();
    let rest = completion.get(begin..).unwrap_or_default();
    let end = rest.find('\n').map_or(completion.len(), |at| begin + at + 1);
    completion.get(..end).unwrap_or(completion)
}

/// Up to the bracket that closes what was open before the completion.
pub fn to_closing_bracket(completion: &str) -> &str {
    let mut depth = 0usize;
    let mut quote = None;
    let mut is_escaped = false;
    for (at, c) in completion.char_indices() {
        match (quote, c) {
            (Some(_), _) if is_escaped => is_escaped = false,
            (Some(_), '\\') => is_escaped = true,
            (Some(open), c) if c == open || c == '\n' => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'' | '`') => quote = Some(c),
            (None, '(' | '[' | '{') => depth += 1,
            (None, ')' | ']' | '}') => match depth.checked_sub(1) {
                Some(less) => depth = less,
                None => return completion.get(..at).unwrap_or(completion),
            },
            (None, _) => {}
        }
    }
    completion
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_alike_by_their_edits() {
        assert_eq!(similarity("return a\n", "return a"), 1.0);
        assert!((similarity("return a + b", "return a - b") - 11.0 / 12.0).abs() < 1e-12);
        assert_eq!((similarity("", "abc"), similarity("", "")), (0.0, 1.0));
        assert!(is_exact(" x = 1\n", "x = 1") && !is_exact("x = 2", "x = 1"));
        assert!(similarity(&"a".repeat(100_000), &"b".repeat(100_000)) == 0.0);
    }

    #[test]
    fn a_completion_is_cut_where_its_hole_ends() {
        assert_eq!(first_line("\n\n  x = 1\ny = 2\n"), "\n\n  x = 1\n");
        assert_eq!((first_line("x"), first_line(""), first_line("\n\n")), ("x", "", "\n\n"));
        assert_eq!(to_closing_bracket("a, f(b), \")\") + 1"), "a, f(b), \")\"");
        assert_eq!(to_closing_bracket("a, 'it\\')s', [b])"), "a, 'it\\')s', [b]");
        assert_eq!(to_closing_bracket("no end"), "no end");
    }
}
