//! A sound segment with changed bytes, or any bytes, under a manifest that knows them: rows or an error, no panic.
#![no_main]

use std::path::Path;
use std::sync::{Arc, LazyLock, Once};

use arrow::array::{ArrayRef, LargeStringArray, RecordBatch, StringArray, UInt64Array};
use arrow::ipc::CompressionType;
use arrow::ipc::writer::{FileWriter, IpcWriteOptions};
use libfuzzer_sys::fuzz_target;
use parquet::arrow::ArrowWriter;
use tempfile::TempDir;
use tunefleet_proto::dataset::{MANIFEST_FILE, MANIFEST_VERSION, Manifest, Segment};
use tunefleet_worker::data::Split;
use tunefleet_worker::data::documents::Dataset;

const ROWS: u64 = 3;

/// Two sound segments, and a place for what is made of them.
struct Place {
    dir: TempDir,
    arrow: Vec<u8>,
    parquet: Vec<u8>,
}

static PLACE: LazyLock<Place> = LazyLock::new(|| {
    let text = |texts: [&str; 3]| Arc::new(StringArray::from(texts.to_vec())) as ArrayRef;
    let columns: [(&str, ArrayRef); 5] = [
        ("repo_id", text(["a", "a", "b"])),
        ("file_path", text(["x.py", "y.rs", "z.c"])),
        ("content", Arc::new(LargeStringArray::from(vec!["x = 1\n", "fn y() {}\n", "int z;\n"]))),
        ("commit", text(["0", "0", "1"])),
        ("size_bytes", Arc::new(UInt64Array::from(vec![6, 10, 7]))),
    ];
    let batch = RecordBatch::try_from_iter(columns).expect("columns of one length");
    let (mut arrow, mut parquet) = (Vec::new(), Vec::new());
    let options = IpcWriteOptions::default().try_with_compression(Some(CompressionType::ZSTD));
    let mut writer =
        FileWriter::try_new_with_options(&mut arrow, &batch.schema(), options.expect("zstd is there"))
            .expect("memory can be written");
    writer.write(&batch).and_then(|()| writer.finish()).expect("memory can be written");
    drop(writer);
    let mut writer = ArrowWriter::try_new(&mut parquet, batch.schema(), None).expect("memory can be written");
    writer.write(&batch).expect("memory can be written");
    writer.close().expect("memory can be written");
    Place { dir: tempfile::tempdir().expect("a temporary directory"), arrow, parquet }
});

/// Writes a dataset of one segment; whether it can be read.
fn read(dir: &Path, file: &str, bytes: &[u8]) -> bool {
    let segment = Segment {
        file: file.to_owned(),
        rows: ROWS,
        bytes: bytes.len() as u64,
        sha256: tunefleet_proto::digest_hex(bytes),
    };
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        written_by: "fuzz".to_owned(),
        settings: serde_json::Value::Null,
        repositories: Vec::new(),
        train: vec![segment],
        validation: Vec::new(),
        dropped: Default::default(),
        found: Default::default(),
    };
    let manifest = serde_json::to_vec(&manifest).expect("a manifest is JSON");
    std::fs::write(dir.join(file), bytes).expect("the directory can be written");
    std::fs::write(dir.join(MANIFEST_FILE), manifest).expect("the directory can be written");
    let dataset = Dataset::open(dir).expect("manifest and size are right");
    dataset.rows(Split::Train).all(|rows| rows.is_ok())
}

fuzz_target!(|bytes: &[u8]| {
    // The reader catches what the libraries throw; the fuzzer would end the process before it can.
    static ONCE: Once = Once::new();
    ONCE.call_once(|| std::panic::set_hook(Box::new(|_| ())));
    let place = &*PLACE;
    let Some((first, rest)) = bytes.split_first() else { return };
    let (file, sound) = match first & 1 {
        0 => ("train-00000.arrow", &place.arrow),
        _ => ("train-00000.parquet", &place.parquet),
    };
    if first & 2 == 0 {
        read(place.dir.path(), file, rest);
        return;
    }
    // Changes: where (two bytes), and to what.
    let mut changed = sound.clone();
    for [high, low, value] in rest.as_chunks::<3>().0 {
        let at = usize::from(u16::from_be_bytes([*high, *low])) % changed.len();
        changed[at] = *value;
    }
    let is_read = read(place.dir.path(), file, &changed);
    if changed == *sound && !is_read {
        std::process::abort();
    }
});
