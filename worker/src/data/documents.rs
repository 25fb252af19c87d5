//! Reads a dataset directory: manifest, then one segment after the other, batch by batch.
//!
//! A segment is hashed before it is decoded; one that differs from the manifest is refused by name.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Component, Path, PathBuf};

use arrow::array::{Array, AsArray, LargeStringArray, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Schema};
use arrow::error::ArrowError;
use arrow::ipc::reader::FileReader;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use sha2::{Digest, Sha256};
use tunefleet_proto::dataset::{MANIFEST_FILE, MANIFEST_VERSION, Manifest, Segment};
use tunefleet_proto::hex;

use super::{Split, guarded, hash_stream};

/// Largest manifest that is read: far above any real one.
const MAX_MANIFEST_BYTES: u64 = 256 << 20;
/// Rows decoded at once from Parquet; an Arrow file fixes its own batches.
const PARQUET_BATCH_ROWS: usize = 1024;
/// Columns and types of a segment.
const COLUMNS: [(&str, DataType); 5] = [
    ("repo_id", DataType::Utf8),
    ("file_path", DataType::Utf8),
    ("content", DataType::LargeUtf8),
    ("commit", DataType::Utf8),
    ("size_bytes", DataType::UInt64),
];
/// Places in [`COLUMNS`].
const REPO_ID: usize = 0;
const FILE_PATH: usize = 1;
const CONTENT: usize = 2;

/// Why a dataset cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is missing or unreadable.
    #[error("{}: {source}; collect the dataset again or correct its path", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The manifest is not one that this build understands.
    #[error("{}: {problem}; collect the dataset again", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// Line, column and rule.
        problem: String,
    },
    /// A segment is not the one that the manifest names.
    #[error("segment {}: {problem}; restore this file or collect the dataset again", path.display())]
    Segment {
        /// The segment.
        path: PathBuf,
        /// What differs, with both values.
        problem: String,
    },
}

/// One file of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row<'a> {
    /// Its repository.
    pub repo_id: &'a str,
    /// Its path there.
    pub file_path: &'a str,
    /// Its text.
    pub content: &'a str,
}

/// Rows of one record batch.
#[derive(Debug, Clone)]
pub struct Rows {
    repo_id: StringArray,
    file_path: StringArray,
    content: LargeStringArray,
}

impl Rows {
    /// How many.
    pub fn len(&self) -> usize {
        self.content.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.content.is_empty()
    }

    /// One of them.
    pub fn row(&self, index: usize) -> Row<'_> {
        Row {
            repo_id: self.repo_id.value(index),
            file_path: self.file_path.value(index),
            content: self.content.value(index),
        }
    }
}

/// A dataset whose manifest is sound and whose segments have the right sizes.
#[derive(Debug)]
pub struct Dataset {
    dir: PathBuf,
    manifest: Manifest,
}

impl Dataset {
    /// Reads the manifest and compares the size of every segment; contents are hashed when read.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(MANIFEST_FILE);
        let io = |source| Error::Io { path: path.clone(), source };
        let bad = |problem: String| Error::Manifest { path: path.clone(), problem };
        let mut bytes = Vec::new();
        File::open(&path).map_err(io)?.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(bad(format!("larger than {MAX_MANIFEST_BYTES} bytes")));
        }
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
        if manifest.version != MANIFEST_VERSION {
            return Err(bad(format!("version {}, this build reads {MANIFEST_VERSION}", manifest.version)));
        }
        let dataset = Dataset { dir: dir.to_owned(), manifest };
        for segment in dataset.manifest.train.iter().chain(&dataset.manifest.validation) {
            dataset.check_size(segment)?;
        }
        Ok(dataset)
    }

    /// What the tokens depend on; see [`Manifest::digest`].
    pub fn digest(&self) -> String {
        self.manifest.digest()
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Documents of a split.
    pub fn len(&self, split: Split) -> u64 {
        self.segments(split).iter().map(|segment| segment.rows).sum()
    }

    /// Whether its rows are conversations, in JSON.
    pub fn is_chat(&self) -> bool {
        self.setting("kind").and_then(|kind| kind.as_str()) == Some("chat")
    }

    /// A setting that it was collected with.
    pub fn setting(&self, name: &str) -> Option<&serde_json::Value> {
        self.manifest.settings.get(name)
    }

    /// Rows of a split in reading order, by record batches. Every segment is verified
    /// before its first batch, so an error means that what came before it is sound.
    pub fn rows(&self, split: Split) -> impl Iterator<Item = Result<Rows, Error>> + Send {
        self.segments(split).iter().flat_map(|segment| match self.open_segment(segment) {
            Ok(batches) => Box::new(batches) as Box<dyn Iterator<Item = _> + Send>,
            Err(error) => Box::new(std::iter::once(Err(error))),
        })
    }

    fn segments(&self, split: Split) -> &[Segment] {
        match split {
            Split::Train => &self.manifest.train,
            Split::Validation => &self.manifest.validation,
        }
    }

    fn path(&self, segment: &Segment) -> Result<PathBuf, Error> {
        let mut parts = Path::new(&segment.file).components();
        match (parts.next(), parts.next()) {
            (Some(Component::Normal(name)), None) => Ok(self.dir.join(name)),
            _ => Err(Error::Manifest {
                path: self.dir.join(MANIFEST_FILE),
                problem: format!("segment `{}` is not a plain file name", segment.file),
            }),
        }
    }

    fn check_size(&self, segment: &Segment) -> Result<(), Error> {
        let path = self.path(segment)?;
        let bytes =
            std::fs::metadata(&path).map_err(|source| Error::Io { path: path.clone(), source })?.len();
        if bytes == segment.bytes {
            return Ok(());
        }
        Err(Error::Segment { path, problem: format!("{bytes} bytes, the manifest says {}", segment.bytes) })
    }

    /// Verifies size and hash, then decodes lazily.
    fn open_segment(&self, segment: &Segment) -> Result<SegmentReader, Error> {
        self.check_size(segment)?;
        let path = self.path(segment)?;
        let io = |source| Error::Io { path: path.clone(), source };
        let mut hasher = Sha256::new();
        hash_stream(File::open(&path).map_err(io)?, &mut hasher).map_err(io)?;
        let sha256 = hex(&hasher.finalize());
        if sha256 != segment.sha256 {
            let problem = format!("SHA-256 is {sha256}, the manifest says {}", segment.sha256);
            return Err(Error::Segment { path, problem });
        }
        let file = File::open(&path).map_err(io)?;
        let batches = guarded(|| decode(file, segment))
            .map_err(|problem| Error::Segment { path: path.clone(), problem })?;
        Ok(SegmentReader { path, batches: Some(batches), rows_left: segment.rows, rows: segment.rows })
    }
}

type Batches = Box<dyn Iterator<Item = Result<RecordBatch, ArrowError>> + Send>;

/// The batches of one segment; counts rows.
struct SegmentReader {
    path: PathBuf,
    /// None after the end or an error.
    batches: Option<Batches>,
    rows_left: u64,
    rows: u64,
}

impl Iterator for SegmentReader {
    type Item = Result<Rows, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut batches = self.batches.take()?;
        match guarded(|| self.next_rows(&mut batches)).transpose()? {
            Ok(rows) => {
                self.batches = Some(batches);
                Some(Ok(rows))
            }
            Err(problem) => Some(Err(Error::Segment { path: self.path.clone(), problem })),
        }
    }
}

impl SegmentReader {
    fn next_rows(&mut self, batches: &mut Batches) -> Result<Option<Rows>, String> {
        let Some(batch) = batches.next() else {
            return match self.rows_left {
                0 => Ok(None),
                left => Err(format!("{} rows, the manifest says {}", self.rows - left, self.rows)),
            };
        };
        let batch = batch.map_err(|error| error.to_string())?;
        let column = |place: usize| {
            let [name, kind] = [
                COLUMNS.get(place).map_or("", |(name, _)| name),
                if place == CONTENT { "LargeUtf8" } else { "Utf8" },
            ];
            let column = batch.columns().get(place).ok_or_else(|| format!("column `{name}` is absent"))?;
            match column.null_count() {
                0 => Ok((column, format!("column `{name}` is not {kind}"))),
                _ => Err(format!("column `{name}` holds nulls")),
            }
        };
        let ((repo_id, no_id), (file_path, no_path), (content, no_content)) =
            (column(REPO_ID)?, column(FILE_PATH)?, column(CONTENT)?);
        let rows = Rows {
            repo_id: repo_id.as_string_opt::<i32>().ok_or(no_id)?.clone(),
            file_path: file_path.as_string_opt::<i32>().ok_or(no_path)?.clone(),
            content: content.as_string_opt::<i64>().ok_or(no_content)?.clone(),
        };
        self.rows_left = self
            .rows_left
            .checked_sub(rows.len() as u64)
            .ok_or_else(|| format!("more rows than the {} of the manifest", self.rows))?;
        Ok(Some(rows))
    }
}

/// Opens a segment by its extension and checks its columns.
fn decode(mut file: File, segment: &Segment) -> Result<Batches, String> {
    match Path::new(&segment.file).extension().and_then(|extension| extension.to_str()) {
        Some("arrow") => {
            tunefleet_claims::check_file(&mut file).map_err(|e| e.to_string())?;
            let reader = FileReader::try_new(BufReader::new(file), None).map_err(|e| e.to_string())?;
            check_schema(&reader.schema())?;
            Ok(Box::new(reader))
        }
        Some("parquet") => {
            let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| e.to_string())?;
            check_schema(builder.schema())?;
            let reader = builder.with_batch_size(PARQUET_BATCH_ROWS).build().map_err(|e| e.to_string())?;
            Ok(Box::new(reader))
        }
        _ => Err("the name ends neither in .arrow nor in .parquet".to_owned()),
    }
}

fn check_schema(schema: &Schema) -> Result<(), String> {
    let found = schema.fields().iter().map(|field| (field.name().as_str(), field.data_type()));
    if COLUMNS.iter().map(|(name, data_type)| (*name, data_type)).eq(found.clone()) {
        return Ok(());
    }
    let found: Vec<String> = found.map(|(name, data_type)| format!("{name}: {data_type}")).collect();
    let expected: Vec<String> =
        COLUMNS.iter().map(|(name, data_type)| format!("{name}: {data_type}")).collect();
    Err(format!("columns are [{}], expected [{}]", found.join(", "), expected.join(", ")))
}
