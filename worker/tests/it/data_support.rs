//! Datasets, tokenizers and Python references for the tests of `data`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use arrow::array::{ArrayRef, LargeStringArray, RecordBatch, StringArray, UInt64Array};
use arrow::ipc::CompressionType;
use arrow::ipc::writer::{FileWriter, IpcWriteOptions};
use tempfile::TempDir;
use tunefleet_proto::dataset::{MANIFEST_FILE, MANIFEST_VERSION, Manifest, Segment};
use tunefleet_proto::digest_hex;
use tunefleet_proto::job::{DataSpec, FimLevel, Packing, SegmentFormat};
use tunefleet_worker::data::train_tokenizer;

/// A dataset and a tokenizer in a temporary directory.
pub struct Workshop {
    pub dir: TempDir,
}

impl Workshop {
    /// `train` and `validation` documents, three to a segment, and a tokenizer trained on the former.
    pub fn new(train: &[String], validation: &[String], format: SegmentFormat) -> Self {
        let workshop = Workshop { dir: tempfile::tempdir().unwrap() };
        std::fs::create_dir(workshop.dataset()).unwrap();
        let write = |split, texts: &[String]| -> Vec<Segment> {
            let parts = texts.chunks(3).enumerate();
            parts.map(|(i, part)| write_segment(&workshop.dataset(), split, i, part, format)).collect()
        };
        let manifest = Manifest {
            version: MANIFEST_VERSION,
            written_by: "test".to_owned(),
            settings: serde_json::Value::Null,
            repositories: Vec::new(),
            train: write("train", train),
            validation: write("validation", validation),
            dropped: Default::default(),
            found: Default::default(),
        };
        workshop.write_manifest(&manifest);
        train_tokenizer::train(train.iter().cloned(), 320, &workshop.tokenizer()).unwrap();
        workshop
    }

    /// 23 and 12 documents of many lengths.
    pub fn standard() -> Self {
        Self::new(&documents(23, 1), &documents(12, 2), SegmentFormat::Arrow)
    }

    pub fn dataset(&self) -> PathBuf {
        self.dir.path().join("dataset")
    }

    pub fn tokenizer(&self) -> PathBuf {
        self.dir.path().join("tokenizer")
    }

    pub fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    pub fn manifest(&self) -> Manifest {
        let text = std::fs::read(self.dataset().join(MANIFEST_FILE)).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    pub fn write_manifest(&self, manifest: &Manifest) {
        let text = serde_json::to_vec(manifest).unwrap();
        std::fs::write(self.dataset().join(MANIFEST_FILE), text).unwrap();
    }
}

fn write_segment(dir: &Path, split: &str, i: usize, texts: &[String], format: SegmentFormat) -> Segment {
    let strings = |value: &str| Arc::new(StringArray::from(vec![value; texts.len()])) as ArrayRef;
    let paths = (0..texts.len()).map(|row| format!("src/{}.rs", i * 3 + row));
    let sizes = texts.iter().map(|text| text.len() as u64).collect::<Vec<_>>();
    let batch = RecordBatch::try_from_iter_with_nullable([
        ("repo_id", strings("org/name"), false),
        ("file_path", Arc::new(StringArray::from_iter_values(paths)) as ArrayRef, false),
        ("content", Arc::new(LargeStringArray::from_iter_values(texts)) as ArrayRef, false),
        ("commit", strings(&"0".repeat(40)), false),
        ("size_bytes", Arc::new(UInt64Array::from(sizes)) as ArrayRef, false),
    ])
    .unwrap();
    let extension = if format == SegmentFormat::Arrow { "arrow" } else { "parquet" };
    let file = format!("{split}-{i:05}.{extension}");
    let out = File::create(dir.join(&file)).unwrap();
    if format == SegmentFormat::Arrow {
        let options = IpcWriteOptions::default().try_with_compression(Some(CompressionType::ZSTD)).unwrap();
        let mut writer = FileWriter::try_new_with_options(out, &batch.schema(), options).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
    } else {
        let mut writer = parquet::arrow::ArrowWriter::try_new(out, batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }
    let bytes = std::fs::read(dir.join(&file)).unwrap();
    Segment { file, rows: texts.len() as u64, bytes: bytes.len() as u64, sha256: digest_hex(&bytes) }
}

/// Code-like texts of 0 to about 600 characters, some beyond ASCII; the same for the same seed.
pub fn documents(count: u64, seed: u64) -> Vec<String> {
    const WORDS: [&str; 12] = [
        "def ",
        "return ",
        "self.",
        "value",
        "\n    ",
        " = ",
        "(x, y)",
        "gr\u{f6}\u{df}e",
        "12345",
        "# \u{6ce8}\u{91ca}\n",
        "\t\t",
        "\u{1f999}",
    ];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = |bound: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % bound
    };
    (0..count)
        .map(|i| {
            let words = if i == 5 { 0 } else { next(120) };
            (0..words).map(|_| WORDS[next(WORDS.len() as u64) as usize]).collect()
        })
        .collect()
}

/// Settings with a short sequence, so that documents are cut and joined.
pub fn spec(packing: Packing, fim_level: FimLevel) -> DataSpec {
    DataSpec {
        sequence_tokens: 48,
        fim_rate: 0.5,
        fim_spm_rate: 0.5,
        fim_level,
        packing,
        metadata_prefix: false,
        document_mask: false,
        chat: None,
        seed: 7,
    }
}

/// Runs a script of `tests/parity/data` and returns what it printed. None, with the reason printed,
/// where there is no Python environment; CI must have one.
pub fn python(script: &str, arguments: &[&str]) -> Option<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let python = root.join(".venv/bin/python");
    if !python.exists() {
        assert!(std::env::var_os("CI").is_none(), "CI needs the Python environment of `make setup`");
        eprintln!("skipped: {} is absent; `make setup` makes it", python.display());
        return None;
    }
    let script = root.join("tests/parity/data").join(script);
    let output = Command::new(python).arg(script).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "the reference failed: {errors}");
    Some(String::from_utf8(output.stdout).unwrap())
}

/// A file of the shared test data; None, with the reason printed, where it is absent.
pub fn shared_data(name: &str) -> Option<PathBuf> {
    let beside_repository = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    let dir = std::env::var_os("TUNEFLEET_SHARED_DATA").map_or_else(beside_repository, PathBuf::from);
    let path = dir.join(name);
    if !path.exists() {
        eprintln!("skipped: {} is absent", path.display());
        return None;
    }
    Some(path)
}
