//! One file of rows: Arrow IPC (Feather v2) or Parquet, zstd, hashed while it is written. It has its final
//! name only when it is complete and on disk.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::ipc::CompressionType;
use arrow::ipc::writer::{FileWriter, IpcWriteOptions};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;
use sha2::{Digest, Sha256};
use tunefleet_proto::dataset::Segment;
use tunefleet_proto::job::SegmentFormat;

use super::Error;

/// The columns of every segment.
pub fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("repo_id", DataType::Utf8, false),
        Field::new("file_path", DataType::Utf8, false),
        Field::new("content", DataType::LargeUtf8, false),
        Field::new("commit", DataType::Utf8, false),
        Field::new("size_bytes", DataType::UInt64, false),
    ]))
}

/// The ending of a segment's name.
pub fn extension(format: SegmentFormat) -> &'static str {
    match format {
        SegmentFormat::Arrow => "arrow",
        SegmentFormat::Parquet => "parquet",
    }
}

/// A segment under way.
pub struct SegmentFile {
    name: String,
    /// Final path.
    path: PathBuf,
    /// Path until it is complete.
    incomplete: PathBuf,
    rows: u64,
    encoder: Encoder,
}

enum Encoder {
    Arrow(FileWriter<HashedFile>),
    Parquet(ArrowWriter<HashedFile>),
}

impl SegmentFile {
    /// Creates `<dir>/<name>.incomplete`.
    pub fn create(dir: &Path, name: String, format: SegmentFormat) -> Result<Self, Error> {
        let path = dir.join(&name);
        let incomplete = dir.join(format!("{name}.incomplete"));
        let file = File::create(&incomplete).map_err(Error::io(&incomplete))?;
        let file =
            HashedFile { file: BufWriter::with_capacity(1 << 20, file), hash: Sha256::new(), bytes: 0 };
        let encoder = match format {
            SegmentFormat::Arrow => {
                let options = IpcWriteOptions::default()
                    .try_with_compression(Some(CompressionType::ZSTD))
                    .map_err(|e| Error::arrow(&path, e))?;
                FileWriter::try_new_with_options(file, &schema(), options)
                    .map(Encoder::Arrow)
                    .map_err(|e| Error::arrow(&path, e))?
            }
            SegmentFormat::Parquet => ArrowWriter::try_new(file, schema(), Some(parquet_properties()))
                .map(Encoder::Parquet)
                .map_err(|e| Error::parquet(&path, e))?,
        };
        Ok(Self { name, path, incomplete, rows: 0, encoder })
    }

    /// Appends rows.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<(), Error> {
        self.rows += batch.num_rows() as u64;
        match &mut self.encoder {
            Encoder::Arrow(writer) => writer.write(batch).map_err(|e| Error::arrow(&self.path, e)),
            // A row group per batch bounds the memory.
            Encoder::Parquet(writer) => {
                writer.write(batch).and_then(|()| writer.flush()).map_err(|e| Error::parquet(&self.path, e))
            }
        }
    }

    /// Ends the file, brings it to disk and gives it its name.
    pub fn finish(self) -> Result<Segment, Error> {
        let file = match self.encoder {
            Encoder::Arrow(writer) => writer.into_inner().map_err(|e| Error::arrow(&self.path, e))?,
            Encoder::Parquet(writer) => writer.into_inner().map_err(|e| Error::parquet(&self.path, e))?,
        };
        let (bytes, sha256) = file.finish().map_err(Error::io(&self.incomplete))?;
        std::fs::rename(&self.incomplete, &self.path).map_err(Error::io(&self.path))?;
        Ok(Segment { file: self.name, rows: self.rows, bytes, sha256 })
    }
}

fn parquet_properties() -> WriterProperties {
    // Contents hardly repeat, and bounds of them serve no reader.
    let content = ColumnPath::from("content");
    WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_column_dictionary_enabled(content.clone(), false)
        .set_column_statistics_enabled(content, EnabledStatistics::None)
        .build()
}

/// Hashes and counts what passes through.
struct HashedFile {
    file: BufWriter<File>,
    hash: Sha256,
    bytes: u64,
}

impl HashedFile {
    fn finish(self) -> io::Result<(u64, String)> {
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        Ok((self.bytes, tunefleet_proto::hex(&self.hash.finalize())))
    }
}

impl Write for HashedFile {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.file.write(buffer)?;
        self.hash.update(buffer.get(..written).unwrap_or_default());
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
