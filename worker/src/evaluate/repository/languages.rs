//! Languages by the ends of file names.

use std::path::Path;

/// Ends of names, and languages.
const BY_EXTENSION: &[(&str, &str)] = &[
    ("c", "C"),
    ("h", "C"),
    ("cc", "C++"),
    ("cpp", "C++"),
    ("cxx", "C++"),
    ("hh", "C++"),
    ("hpp", "C++"),
    ("cu", "CUDA"),
    ("cuh", "CUDA"),
    ("cs", "C#"),
    ("css", "CSS"),
    ("go", "Go"),
    ("html", "HTML"),
    ("java", "Java"),
    ("js", "JavaScript"),
    ("jsx", "JavaScript"),
    ("mjs", "JavaScript"),
    ("json", "JSON"),
    ("ipynb", "Jupyter"),
    ("kt", "Kotlin"),
    ("lua", "Lua"),
    ("md", "Markdown"),
    ("mdx", "Markdown"),
    ("php", "PHP"),
    ("py", "Python"),
    ("pyi", "Python"),
    ("rb", "Ruby"),
    ("rs", "Rust"),
    ("rst", "reStructuredText"),
    ("scala", "Scala"),
    ("sh", "Shell"),
    ("bash", "Shell"),
    ("sql", "SQL"),
    ("swift", "Swift"),
    ("toml", "TOML"),
    ("ts", "TypeScript"),
    ("tsx", "TypeScript"),
    ("txt", "text"),
    ("yaml", "YAML"),
    ("yml", "YAML"),
];

/// The language of a file; its extension where that is none that is known.
pub fn of(file_path: &str) -> String {
    let path = Path::new(file_path);
    let Some(extension) = path.extension().and_then(|extension| extension.to_str()) else {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        return if name.is_empty() { "none".to_owned() } else { name.to_owned() };
    };
    let extension = extension.to_lowercase();
    let known = BY_EXTENSION.iter().find(|(known, _)| *known == extension);
    known.map_or_else(|| format!(".{extension}"), |(_, language)| (*language).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_tell_their_language() {
        let found = ["src/a.rs", "b.PY", "Makefile", "x.zig", ""].map(of);
        assert_eq!(found, ["Rust", "Python", "Makefile", ".zig", "none"]);
    }
}
