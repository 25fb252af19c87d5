//! Rows in, segments out. Memory is bounded by one batch per split, whatever the size of the dataset.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, LargeStringBuilder, RecordBatch, StringBuilder, UInt64Builder};
use tunefleet_proto::dataset::{SEGMENT_ROWS, Segment};
use tunefleet_proto::job::SegmentFormat;

use super::Error;
use super::segment::{SegmentFile, extension, schema};
use super::split::Split;

/// A segment ends at [`SEGMENT_ROWS`] rows or at this much text, whichever comes first.
const SEGMENT_CONTENT_BYTES: usize = 256 << 20;
/// Rows are encoded in batches of at most this many rows and, but for a single larger row, bytes.
const BATCH_ROWS: usize = 1000;
const BATCH_CONTENT_BYTES: usize = 16 << 20;

/// One row.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// The repository.
    pub repo_id: &'a str,
    /// Path inside it.
    pub file_path: &'a str,
    /// Text.
    pub content: &'a str,
    /// The repository's commit, hex.
    pub commit: &'a str,
    /// Size of the file in the repository.
    pub size_bytes: u64,
}

/// What was written.
#[derive(Debug)]
pub struct Written {
    /// Segments of the training split.
    pub train: Vec<Segment>,
    /// Segments of the validation split.
    pub validation: Vec<Segment>,
    /// The split that is to be used instead, if one of the two parts got no file.
    pub mended: Option<Split>,
}

/// Writes both splits of a dataset.
pub struct Writer {
    split: Split,
    /// The smallest and the largest key that occurred.
    keys: (u64, u64),
    train: SplitWriter,
    validation: SplitWriter,
}

impl Writer {
    /// A writer of segments in `dir`.
    pub fn new(dir: &Path, format: SegmentFormat, split: Split) -> Self {
        Self {
            split,
            keys: (u64::MAX, 0),
            train: SplitWriter::new(dir, "train", format),
            validation: SplitWriter::new(dir, "validation", format),
        }
    }

    /// Appends a row to the split that it belongs to, by its key (see [`Split::holds_out`]).
    pub fn push(&mut self, key: u64, row: Row<'_>) -> Result<(), Error> {
        self.keys = (self.keys.0.min(key), self.keys.1.max(key));
        match self.split.holds_out(key) {
            true => self.validation.push(row),
            false => self.train.push(row),
        }
    }

    /// Ends the last segment of each split, full or not.
    pub fn finish(self) -> Result<Written, Error> {
        let mended = self.split.mended(self.keys, self.train.total_rows, self.validation.total_rows);
        Ok(Written { train: self.train.finish()?, validation: self.validation.finish()?, mended })
    }
}

struct SplitWriter {
    dir: PathBuf,
    name: &'static str,
    format: SegmentFormat,
    batch: Batch,
    segment: Option<SegmentFile>,
    /// Rows and text of the segment under way, the batch included.
    segment_rows: usize,
    segment_content_bytes: usize,
    total_rows: u64,
    done: Vec<Segment>,
}

impl SplitWriter {
    fn new(dir: &Path, name: &'static str, format: SegmentFormat) -> Self {
        Self {
            dir: dir.to_owned(),
            name,
            format,
            batch: Batch::default(),
            segment: None,
            segment_rows: 0,
            segment_content_bytes: 0,
            total_rows: 0,
            done: Vec::new(),
        }
    }

    fn push(&mut self, row: Row<'_>) -> Result<(), Error> {
        self.batch.push(row);
        self.total_rows += 1;
        self.segment_rows += 1;
        self.segment_content_bytes += row.content.len();
        if self.segment_rows >= SEGMENT_ROWS || self.segment_content_bytes >= SEGMENT_CONTENT_BYTES {
            self.end_segment()
        } else if self.batch.rows >= BATCH_ROWS || self.batch.content_bytes >= BATCH_CONTENT_BYTES {
            self.end_batch()
        } else {
            Ok(())
        }
    }

    fn end_batch(&mut self) -> Result<(), Error> {
        if self.batch.rows == 0 {
            return Ok(());
        }
        let mut segment = match self.segment.take() {
            Some(segment) => segment,
            None => {
                let name = format!("{}-{:05}.{}", self.name, self.done.len(), extension(self.format));
                SegmentFile::create(&self.dir, name, self.format)?
            }
        };
        segment.write(&self.batch.take()?)?;
        self.segment = Some(segment);
        Ok(())
    }

    fn end_segment(&mut self) -> Result<(), Error> {
        self.end_batch()?;
        if let Some(segment) = self.segment.take() {
            self.done.push(segment.finish()?);
        }
        self.segment_rows = 0;
        self.segment_content_bytes = 0;
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<Segment>, Error> {
        self.end_segment()?;
        Ok(self.done)
    }
}

/// Rows on their way into a segment.
#[derive(Default)]
struct Batch {
    rows: usize,
    content_bytes: usize,
    repo_id: StringBuilder,
    file_path: StringBuilder,
    content: LargeStringBuilder,
    commit: StringBuilder,
    size_bytes: UInt64Builder,
}

impl Batch {
    fn push(&mut self, row: Row<'_>) {
        self.rows += 1;
        self.content_bytes += row.content.len();
        self.repo_id.append_value(row.repo_id);
        self.file_path.append_value(row.file_path);
        self.content.append_value(row.content);
        self.commit.append_value(row.commit);
        self.size_bytes.append_value(row.size_bytes);
    }

    fn take(&mut self) -> Result<RecordBatch, Error> {
        self.rows = 0;
        self.content_bytes = 0;
        let columns: Vec<ArrayRef> = vec![
            Arc::new(self.repo_id.finish()),
            Arc::new(self.file_path.finish()),
            Arc::new(self.content.finish()),
            Arc::new(self.commit.finish()),
            Arc::new(self.size_bytes.finish()),
        ];
        RecordBatch::try_new(schema(), columns).map_err(|e| Error::Encode(e.to_string()))
    }
}
