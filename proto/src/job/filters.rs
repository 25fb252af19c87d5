//! Which files are left out of a dataset unless the job file says otherwise.

use super::spec::FilterSpec;

/// By group: pictures, video, documents, sound, archives, binary formats of tools, fonts and weights. Text formats stay: configuration and documentation are worth completing, too.
const EXCLUDE_EXTENSIONS: [&[&str]; 7] = [
    &["png", "jpg", "jpeg", "gif"],
    &["mp4", "jfif"],
    &["key", "pdf", "docx", "xlsx", "pptx"],
    &["flac", "ogg", "mid", "webm", "wav", "mp3"],
    &["jar", "aar", "gz", "zip", "bz2", "xz"],
    &[
        "npy",
        "index",
        "inv",
        "ds_store",
        "rdb",
        "pack",
        "idx",
        "glb",
        "gltf",
        "len",
        "otf",
        "unitypackage",
        "ttf",
        "pcm",
        "opus",
        "onnx",
        "pickle",
        "model",
        "neuron",
    ],
    // What Xcode keeps in a project's directory.
    &["pbxproj", "xcscheme", "xcworkspacedata"],
];

/// Whole names, so that `.github/` and `.gitignore` stay.
const EXCLUDE_PATH_PARTS: [&str; 2] = [".git", "__pycache__"];

/// Larger text files are mostly generated: they would teach their generator's habits.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// StarCoder's thresholds (BigCode's preprocessing), which the later Personal Copilot scripts have as well: data in the
/// form of code, minified code and encoded bytes are beyond them.
const MAX_LINE_CHARS: u64 = 1000;
const MAX_MEAN_LINE_CHARS: f64 = 100.0;
const MIN_ALPHANUMERIC_FRACTION: f64 = 0.25;

/// The filters of a job file that names none.
pub fn default_filters() -> FilterSpec {
    FilterSpec {
        exclude_extensions: EXCLUDE_EXTENSIONS.iter().copied().flatten().map(|&s| s.to_owned()).collect(),
        exclude_path_parts: EXCLUDE_PATH_PARTS.iter().map(|&s| s.to_owned()).collect(),
        max_file_bytes: MAX_FILE_BYTES,
        max_line_chars: MAX_LINE_CHARS,
        max_mean_line_chars: MAX_MEAN_LINE_CHARS,
        min_alphanumeric_fraction: MIN_ALPHANUMERIC_FRACTION,
        keep_generated: false,
        keep_lock_files: false,
        keep_vendored: false,
    }
}

/// For settings that an earlier version has kept, which had fewer of them.
impl Default for FilterSpec {
    fn default() -> Self {
        default_filters()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_in_the_form_that_is_compared() {
        let filters = default_filters();
        let mut extensions = filters.exclude_extensions.clone();
        extensions.sort();
        extensions.dedup();
        assert_eq!(extensions.len(), filters.exclude_extensions.len(), "an extension comes twice");
        assert!(extensions.iter().all(|entry| *entry == entry.to_lowercase() && !entry.contains(['.', '/'])));
        assert!(filters.exclude_path_parts.iter().all(|entry| !entry.contains('/')));
        for wanted in ["onnx", "pickle", "model", "neuron", "ds_store"] {
            assert!(extensions.iter().any(|entry| entry == wanted), "{wanted}");
        }
        for kept in ["md", "json", "csv", "svg", "ipynb"] {
            assert!(!extensions.iter().any(|entry| entry == kept), "{kept}");
        }
    }
}
