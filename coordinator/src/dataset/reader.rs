//! Segments, checked against their manifest before a row is believed.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use arrow::array::{Array, AsArray, LargeStringArray, RecordBatch, StringArray, UInt64Array};
use arrow::datatypes::UInt64Type;
use arrow::error::ArrowError;
use arrow::ipc::reader::FileReader;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use sha2::{Digest, Sha256};
use tunefleet_proto::dataset::Segment;

use super::Error;
use super::segment::schema;
use super::writer::Row;

/// End of the names of Parquet files; the others are Arrow files.
const PARQUET: &str = ".parquet";

/// Calls `each` for every row of a segment whose size, hash, columns and number of rows are as recorded.
///
/// # Errors
/// A segment that is not; parsers that panic at it included.
pub fn read(dir: &Path, segment: &Segment, each: impl FnMut(Row<'_>)) -> Result<(), Error> {
    let outcome = catch_unwind(AssertUnwindSafe(|| read_rows(dir, segment, each)));
    outcome.unwrap_or_else(|_| {
        let detail = "cannot be decoded (its parser panicked)".to_owned();
        Err(Error::Segment { path: dir.join(&segment.file), detail })
    })
}

fn read_rows(dir: &Path, segment: &Segment, mut each: impl FnMut(Row<'_>)) -> Result<(), Error> {
    let path = dir.join(&segment.file);
    let refuse = |detail: String| Error::Segment { path: path.clone(), detail };
    let mut file = File::open(&path).map_err(Error::io(&path))?;
    let bytes = file.metadata().map_err(Error::io(&path))?.len();
    if bytes != segment.bytes {
        return Err(refuse(format!("has {bytes} bytes, the manifest says {}", segment.bytes)));
    }
    let sha256 = hash(&mut file).and_then(|hash| file.rewind().map(|()| hash)).map_err(Error::io(&path))?;
    if sha256 != segment.sha256 {
        return Err(refuse(format!("has SHA-256 {sha256}, the manifest says {}", segment.sha256)));
    }
    if !segment.file.ends_with(PARQUET) {
        tunefleet_claims::check_file(&mut file).map_err(|e| refuse(e.to_string()))?;
    }
    let batches = batches(file, &segment.file).map_err(|e| refuse(e.to_string()))?;
    let mut rows = 0;
    for batch in batches {
        let batch = batch.map_err(|e| refuse(e.to_string()))?;
        let columns = Columns::of(&batch).ok_or_else(|| {
            refuse(format!("has columns {:?}, expected {:?}", batch.schema().fields(), schema().fields()))
        })?;
        rows += batch.num_rows() as u64;
        for index in 0..batch.num_rows() {
            each(columns.row(index));
        }
    }
    match rows == segment.rows {
        true => Ok(()),
        false => Err(refuse(format!("has {rows} rows, the manifest says {}", segment.rows))),
    }
}

type Batches = Box<dyn Iterator<Item = Result<RecordBatch, ArrowError>>>;

fn batches(file: File, name: &str) -> Result<Batches, ArrowError> {
    if name.ends_with(PARQUET) {
        return Ok(Box::new(ParquetRecordBatchReaderBuilder::try_new(file)?.build()?));
    }
    Ok(Box::new(FileReader::try_new_buffered(file, None)?))
}

fn hash(file: &mut File) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(tunefleet_proto::hex(&hash.finalize())),
            read => hash.update(buffer.get(..read).unwrap_or_default()),
        }
    }
}

struct Columns<'a> {
    repo_id: &'a StringArray,
    file_path: &'a StringArray,
    content: &'a LargeStringArray,
    commit: &'a StringArray,
    size_bytes: &'a UInt64Array,
}

impl<'a> Columns<'a> {
    fn of(batch: &'a RecordBatch) -> Option<Self> {
        let column = |name| batch.column_by_name(name).filter(|column| column.null_count() == 0);
        Some(Self {
            repo_id: column("repo_id")?.as_string_opt()?,
            file_path: column("file_path")?.as_string_opt()?,
            content: column("content")?.as_string_opt()?,
            commit: column("commit")?.as_string_opt()?,
            size_bytes: column("size_bytes")?.as_primitive_opt::<UInt64Type>()?,
        })
    }

    fn row(&self, index: usize) -> Row<'a> {
        Row {
            repo_id: self.repo_id.value(index),
            file_path: self.file_path.value(index),
            content: self.content.value(index),
            commit: self.commit.value(index),
            size_bytes: self.size_bytes.value(index),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tunefleet_proto::job::SegmentFormat;

    use super::*;
    use crate::dataset::split::Split;
    use crate::dataset::writer::Writer;

    /// Writes `count` rows, none held out.
    fn segments(dir: &Path, format: SegmentFormat, count: usize) -> Vec<Segment> {
        let mut writer = Writer::new(dir, format, Split::new(0.0, 0));
        for i in 0..count {
            let (path, content) = (format!("{i}.py"), format!("print({i}) # d\u{e9}j\u{e0}\n"));
            let row = Row {
                repo_id: "o/n",
                file_path: &path,
                content: &content,
                commit: "c0",
                size_bytes: i as u64,
            };
            writer.push(u64::MAX, row).unwrap();
        }
        let written = writer.finish().unwrap();
        assert!(written.validation.is_empty() && written.mended.is_none());
        written.train
    }

    #[test]
    fn rows_survive_and_the_last_partial_segment_is_written() {
        for format in [SegmentFormat::Arrow, SegmentFormat::Parquet] {
            let temp = tempfile::tempdir().unwrap();
            let segments = segments(temp.path(), format, 10_001);
            assert_eq!(segments.iter().map(|s| s.rows).collect::<Vec<_>>(), [10_000, 1]);
            let mut next = 0;
            for segment in &segments {
                read(temp.path(), segment, |row| {
                    assert_eq!(row.file_path, format!("{next}.py"));
                    assert_eq!(row.content, format!("print({next}) # d\u{e9}j\u{e0}\n"));
                    assert_eq!((row.repo_id, row.commit, row.size_bytes), ("o/n", "c0", next));
                    next += 1;
                })
                .unwrap();
            }
            assert_eq!(next, 10_001);
            assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 2);
        }
    }

    #[test]
    fn a_damaged_segment_is_refused_by_name() {
        for format in [SegmentFormat::Arrow, SegmentFormat::Parquet] {
            let temp = tempfile::tempdir().unwrap();
            let segment = segments(temp.path(), format, 50).remove(0);
            let path = temp.path().join(&segment.file);
            let whole = fs::read(&path).unwrap();
            let message = |bytes: &[u8], segment: &Segment| {
                fs::write(&path, bytes).unwrap();
                let message = read(temp.path(), segment, |_| {}).unwrap_err().to_string();
                assert!(message.contains(&segment.file), "{message}");
                message
            };
            let cut = whole.get(..whole.len() - 7).unwrap();
            assert!(message(cut, &segment).contains("bytes"));
            let mut flipped = whole.clone();
            flipped[whole.len() / 2] ^= 1;
            assert!(message(&flipped, &segment).contains("SHA-256"));
            // Hash and size agree, but it is no segment.
            let sha256 = tunefleet_proto::digest_hex(cut);
            message(cut, &Segment { bytes: cut.len() as u64, sha256, ..segment.clone() });
            assert!(message(&whole, &Segment { rows: 51, ..segment.clone() }).contains("rows"));
            fs::remove_file(&path).unwrap();
            assert!(read(temp.path(), &segment, |_| {}).is_err());
        }
    }
}
