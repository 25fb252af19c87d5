//! Rows of one table file: Parquet, Arrow (file or stream), JSONL or CSV. Memory holds a batch or a row.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::path::Path;
use std::rc::Rc;

use arrow::array::{Array, ArrayRef, AsArray, LargeStringArray, RecordBatch, RecordBatchReader};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Schema};
use arrow::ipc::reader::{FileReader, StreamReader};
use flate2::read::MultiGzDecoder;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;

use super::Error;

/// Names that datasets of code have for a row's repository and path.
const REPOSITORY_COLUMNS: [&str; 4] = ["repo_id", "repo_name", "repository_name", "max_stars_repo_name"];
const PATH_COLUMNS: [&str; 4] = ["file_path", "path", "func_path_in_repository", "max_stars_repo_path"];
/// Rows decoded at once from Parquet.
const BATCH_ROWS: usize = 256;
/// Longest row of JSONL and CSV.
const MAX_ROW_BYTES: u64 = 64 << 20;
/// First bytes of an Arrow file; a stream has none.
const ARROW_MAGIC: &[u8] = b"ARROW1";

/// Names that datasets of conversations have for their column, those that say most first.
const TURNS_COLUMNS: [&str; 5] = ["messages", "conversations", "conversation", "text", "content"];

/// What is read of a row.
#[derive(Debug, Clone, Copy)]
pub enum Wanted<'a> {
    /// The text in this column.
    Texts(&'a str),
    /// The turns in this column, or in one of [`TURNS_COLUMNS`]: a text, or a list, which is given as JSON.
    Turns(Option<&'a str>),
}

impl<'a> Wanted<'a> {
    /// Columns in which it may stand, the best first.
    fn columns(self) -> Vec<&'a str> {
        match self {
            Wanted::Texts(column) | Wanted::Turns(Some(column)) => vec![column],
            Wanted::Turns(None) => TURNS_COLUMNS.to_vec(),
        }
    }

    fn takes_lists(self) -> bool {
        matches!(self, Wanted::Turns(_))
    }

    /// That none of its columns is there.
    fn absent(self, path: &Path, found: impl Iterator<Item = String>) -> Error {
        let names: Vec<String> = self.columns().iter().map(|name| format!("{name:?}")).collect();
        let what = if self.takes_lists() { "turns" } else { "texts" };
        Error::Column { path: path.to_owned(), column: names.join(" or "), what, found: shown(found) }
    }
}

/// How a file's rows are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `.parquet`
    Parquet,
    /// `.arrow`, `.feather`
    Arrow,
    /// `.jsonl`, `.json` with an object in each line
    JsonLines {
        /// Compressed.
        gzip: bool,
    },
    /// `.csv`
    Csv {
        /// Compressed.
        gzip: bool,
    },
}

impl Format {
    /// By the name's end; `None` for what is no table.
    pub fn of(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        let (name, gzip) = match name.strip_suffix(".gz") {
            Some(name) => (name, true),
            None => (name.as_str(), false),
        };
        // What describes a dataset, in JSON itself.
        let is_about = ["dataset_infos.json", "dataset_info.json", "state.json", "manifest.json"];
        match name.rsplit_once('.')?.1 {
            "parquet" if !gzip => Some(Format::Parquet),
            "arrow" | "feather" if !gzip => Some(Format::Arrow),
            "csv" => Some(Format::Csv { gzip }),
            "jsonl" | "ndjson" => Some(Format::JsonLines { gzip }),
            "json" if !is_about.iter().any(|about| name.ends_with(about)) => Some(Format::JsonLines { gzip }),
            _ => None,
        }
    }
}

/// A row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row<'a> {
    /// Its repository, where a column says.
    pub repo_id: Option<&'a str>,
    /// Its path there, where a column says.
    pub path: Option<&'a str>,
    /// Its text; a list as JSON.
    pub content: &'a str,
}

/// Hands each row whose text is not null to `each`, until that says that it wants no more.
pub fn read(path: &Path, wanted: Wanted<'_>, each: &mut dyn FnMut(Row<'_>) -> bool) -> Result<(), Error> {
    let broken = |detail: String| Error::Broken { path: path.to_owned(), row: None, detail };
    let open = || File::open(path).map_err(|source| Error::Io { path: path.to_owned(), source });
    let unpacked = |gzip: bool| -> Result<Box<dyn Read>, Error> {
        Ok(if gzip { Box::new(MultiGzDecoder::new(open()?)) } else { Box::new(open()?) })
    };
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    match Format::of(name) {
        Some(Format::Parquet) => guarded(path, || parquet(path, open()?, wanted, each)),
        Some(Format::Arrow) => guarded(path, || arrow(path, open()?, wanted, each)),
        Some(Format::JsonLines { gzip }) => json_lines(path, unpacked(gzip)?, wanted, each),
        Some(Format::Csv { gzip }) => csv(path, unpacked(gzip)?, wanted, each),
        None => Err(broken("its name says of no format that is known".to_owned())),
    }
}

/// Parsers of others' files shall not bring the program down.
fn guarded(path: &Path, parse: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(parse));
    outcome.unwrap_or_else(|_| {
        let detail = "it cannot be decoded".to_owned();
        Err(Error::Broken { path: path.to_owned(), row: None, detail })
    })
}

fn parquet(
    path: &Path,
    file: File,
    wanted: Wanted<'_>,
    each: &mut dyn FnMut(Row<'_>) -> bool,
) -> Result<(), Error> {
    let broken = |detail: String| Error::Broken { path: path.to_owned(), row: None, detail };
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| broken(e.to_string()))?;
    let places = Columns::find(path, builder.schema(), wanted)?;
    let mask = ProjectionMask::roots(builder.parquet_schema(), places.all());
    let reader = builder.with_projection(mask).with_batch_size(BATCH_ROWS).build();
    let reader = reader.map_err(|e| broken(e.to_string()))?;
    // The projection leaves the others out.
    let columns = Columns::find(path, &reader.schema(), wanted)?;
    batches(path, reader, columns, each)
}

fn arrow(
    path: &Path,
    mut file: File,
    wanted: Wanted<'_>,
    each: &mut dyn FnMut(Row<'_>) -> bool,
) -> Result<(), Error> {
    let broken = |detail: String| Error::Broken { path: path.to_owned(), row: None, detail };
    let mut magic = [0; ARROW_MAGIC.len()];
    let is_file = file.read_exact(&mut magic).is_ok() && magic == ARROW_MAGIC;
    file.rewind().map_err(|source| Error::Io { path: path.to_owned(), source })?;
    let check = if is_file { tunefleet_claims::check_file } else { tunefleet_claims::check_stream };
    check(&mut file).map_err(|e| broken(e.to_string()))?;
    if is_file {
        let reader = FileReader::try_new_buffered(file, None).map_err(|e| broken(e.to_string()))?;
        let columns = Columns::find(path, &reader.schema(), wanted)?;
        batches(path, reader, columns, each)
    } else {
        let reader = StreamReader::try_new_buffered(file, None).map_err(|e| broken(e.to_string()))?;
        let columns = Columns::find(path, &reader.schema(), wanted)?;
        batches(path, reader, columns, each)
    }
}

/// Places of the columns.
#[derive(Debug, Clone, Copy)]
struct Columns {
    content: usize,
    repository: Option<usize>,
    path: Option<usize>,
}

impl Columns {
    fn find(path: &Path, schema: &Schema, wanted: Wanted<'_>) -> Result<Self, Error> {
        let is_text = |data_type: &DataType| match data_type {
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
            DataType::Dictionary(_, values) => matches!(**values, DataType::Utf8 | DataType::LargeUtf8),
            _ => false,
        };
        let place = |name: &str| {
            let (at, field) = schema.column_with_name(name)?;
            is_text(field.data_type()).then_some(at)
        };
        let fields = schema.fields().iter().map(|field| format!("{} ({})", field.name(), field.data_type()));
        let list = |name: &str| {
            let (at, field) = schema.column_with_name(name)?;
            matches!(field.data_type(), DataType::List(_) | DataType::LargeList(_)).then_some(at)
        };
        let content = wanted
            .columns()
            .into_iter()
            .find_map(|name| place(name).or_else(|| list(name).filter(|_| wanted.takes_lists())))
            .ok_or_else(|| wanted.absent(path, fields))?;
        Ok(Columns {
            content,
            repository: REPOSITORY_COLUMNS.iter().find_map(|name| place(name)),
            path: PATH_COLUMNS.iter().find_map(|name| place(name)),
        })
    }

    fn all(self) -> impl Iterator<Item = usize> {
        [Some(self.content), self.repository, self.path].into_iter().flatten()
    }
}

fn shown(names: impl Iterator<Item = String>) -> String {
    let names: Vec<String> = names.take(50).collect();
    if names.is_empty() { "none at all".to_owned() } else { names.join(", ") }
}

fn batches<E: ToString>(
    path: &Path,
    reader: impl Iterator<Item = Result<RecordBatch, E>>,
    columns: Columns,
    each: &mut dyn FnMut(Row<'_>) -> bool,
) -> Result<(), Error> {
    let broken = |detail: String| Error::Broken { path: path.to_owned(), row: None, detail };
    for batch in reader {
        let batch = batch.map_err(|e| broken(e.to_string()))?;
        let texts = |at: usize| -> Result<LargeStringArray, Error> {
            let column =
                batch.columns().get(at).ok_or_else(|| broken("a batch lacks a column".to_owned()))?;
            let column = cast(column, &DataType::LargeUtf8).map_err(|e| broken(e.to_string()))?;
            Ok(column.as_string::<i64>().clone())
        };
        let content = match batch.columns().get(columns.content).map(|column| column.data_type()) {
            Some(DataType::List(_) | DataType::LargeList(_)) => lists(&batch, columns.content),
            _ => texts(columns.content)?,
        };
        let repository = columns.repository.map(texts).transpose()?;
        let paths = columns.path.map(texts).transpose()?;
        let value =
            |column: &LargeStringArray, row| (!column.is_null(row)).then(|| column.value(row).to_owned());
        for row in 0..content.len() {
            if content.is_null(row) {
                continue;
            }
            let repo_id = repository.as_ref().and_then(|column| value(column, row));
            let path = paths.as_ref().and_then(|column| value(column, row));
            let (repo_id, path) = (repo_id.as_deref(), path.as_deref());
            if !each(Row { repo_id, path, content: content.value(row) }) {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The lists of a column, each as JSON.
fn lists(batch: &RecordBatch, at: usize) -> LargeStringArray {
    let text = |row| match batch.columns().get(at).map(|column| json_of(column, row)) {
        None | Some(Value::Null) => None,
        Some(value) => Some(value.to_string()),
    };
    (0..batch.num_rows()).map(text).collect()
}

/// A value of texts, lists and structs; others are null.
fn json_of(array: &ArrayRef, row: usize) -> Value {
    if array.is_null(row) {
        return Value::Null;
    }
    let list = |values: ArrayRef| Value::Array((0..values.len()).map(|row| json_of(&values, row)).collect());
    match array.data_type() {
        DataType::Utf8 => array.as_string::<i32>().value(row).into(),
        DataType::LargeUtf8 => array.as_string::<i64>().value(row).into(),
        DataType::Utf8View => array.as_string_view().value(row).into(),
        DataType::List(_) => list(array.as_list::<i32>().value(row)),
        DataType::LargeList(_) => list(array.as_list::<i64>().value(row)),
        DataType::Struct(fields) => {
            let columns = array.as_struct().columns();
            fields
                .iter()
                .zip(columns)
                .map(|(field, column)| (field.name().clone(), json_of(column, row)))
                .collect()
        }
        _ => Value::Null,
    }
}

fn json_lines(
    path: &Path,
    bytes: Box<dyn Read>,
    wanted: Wanted<'_>,
    each: &mut dyn FnMut(Row<'_>) -> bool,
) -> Result<(), Error> {
    let mut lines = BufReader::with_capacity(1 << 20, bytes);
    let mut line = Vec::new();
    for row in 1.. {
        let broken = |detail: String| Error::Broken { path: path.to_owned(), row: Some(row), detail };
        line.clear();
        let count = (&mut lines).take(MAX_ROW_BYTES + 1).read_until(b'\n', &mut line);
        let count = count.map_err(|source| broken(source.to_string()))? as u64;
        if count == 0 {
            break;
        }
        if count > MAX_ROW_BYTES {
            return Err(broken(format!("it is longer than {MAX_ROW_BYTES} bytes")));
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let value: Value = serde_json::from_slice(&line).map_err(|e| broken(e.to_string()))?;
        let Value::Object(fields) = &value else {
            return Err(broken("it is no JSON object".to_owned()));
        };
        let text = |name: &str| fields.get(name).and_then(Value::as_str);
        let value = wanted.columns().into_iter().find_map(|name| fields.get(name));
        let list;
        let content = match value {
            Some(Value::String(content)) => content,
            Some(Value::Null) => continue,
            Some(Value::Array(turns)) if wanted.takes_lists() => {
                list = serde_json::to_string(turns).unwrap_or_default();
                &list
            }
            _ => return Err(wanted.absent(path, fields.keys().cloned())),
        };
        let repo_id = REPOSITORY_COLUMNS.iter().find_map(|name| text(name));
        let path = PATH_COLUMNS.iter().find_map(|name| text(name));
        if !each(Row { repo_id, path, content }) {
            break;
        }
    }
    Ok(())
}

/// Ends where a row has become too long.
struct Bounded {
    bytes: Box<dyn Read>,
    /// Read since the last row ended.
    of_row: Rc<Cell<u64>>,
}

impl Read for Bounded {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.of_row.get() > MAX_ROW_BYTES {
            return Err(io::Error::other(format!("it is longer than {MAX_ROW_BYTES} bytes")));
        }
        let count = self.bytes.read(into)?;
        self.of_row.set(self.of_row.get() + count as u64);
        Ok(count)
    }
}

fn csv(
    path: &Path,
    bytes: Box<dyn Read>,
    wanted: Wanted<'_>,
    each: &mut dyn FnMut(Row<'_>) -> bool,
) -> Result<(), Error> {
    let of_row = Rc::new(Cell::new(0));
    let bounded = Bounded { bytes, of_row: Rc::clone(&of_row) };
    let mut reader = csv::ReaderBuilder::new().buffer_capacity(1 << 20).from_reader(bounded);
    let broken = |row: u64, detail: String| Error::Broken { path: path.to_owned(), row: Some(row), detail };
    let header = reader.headers().map_err(|e| broken(1, e.to_string()))?.clone();
    let place = |name: &str| header.iter().position(|field| field == name);
    let content = wanted
        .columns()
        .into_iter()
        .find_map(place)
        .ok_or_else(|| wanted.absent(path, header.iter().map(str::to_owned)))?;
    let repository = REPOSITORY_COLUMNS.iter().find_map(|name| place(name));
    let path_at = PATH_COLUMNS.iter().find_map(|name| place(name));
    let mut record = csv::StringRecord::new();
    for row in 2.. {
        of_row.set(0);
        if !reader.read_record(&mut record).map_err(|e| broken(row, e.to_string()))? {
            break;
        }
        let field = |at: Option<usize>| at.and_then(|at| record.get(at)).filter(|text| !text.is_empty());
        let Some(content) = record.get(content) else { continue };
        if !each(Row { repo_id: field(repository), path: field(path_at), content }) {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use ::arrow::array::{Int64Array, ListArray, StringArray, StructArray};
    use ::arrow::buffer::{OffsetBuffer, ScalarBuffer};
    use ::arrow::datatypes::Field;
    use ::arrow::ipc::writer::{FileWriter, StreamWriter};
    use ::parquet::arrow::ArrowWriter;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;

    use super::*;

    type Found = Vec<(Option<String>, Option<String>, String)>;

    fn rows(path: &Path, column: &str) -> Result<Found, Error> {
        let mut found = Vec::new();
        read(path, Wanted::Texts(column), &mut |row: Row<'_>| {
            found.push((row.repo_id.map(str::to_owned), row.path.map(str::to_owned), row.content.to_owned()));
            true
        })?;
        Ok(found)
    }

    fn batch() -> RecordBatch {
        let columns: [(&str, ArrayRef); 4] = [
            ("repo_id", Arc::new(StringArray::from(vec![Some("a/b"), None, Some("c/d")]))),
            ("file_path", Arc::new(StringArray::from(vec!["x.py", "y.py", "z.py"]))),
            ("content", Arc::new(LargeStringArray::from(vec![Some("x = 1\n"), Some("y, \"z\"\n"), None]))),
            ("__index_level_0__", Arc::new(Int64Array::from(vec![1, 2, 3]))),
        ];
        RecordBatch::try_from_iter(columns).unwrap()
    }

    /// The rows of `batch` as `a.parquet`, `b.arrow` (a file) and `c.arrow` (a stream).
    fn write_columnar(dir: &Path, batch: &RecordBatch) {
        let create = |name: &str| File::create(dir.join(name)).unwrap();
        let mut out = ArrowWriter::try_new(create("a.parquet"), batch.schema(), None).unwrap();
        out.write(batch).unwrap();
        out.close().unwrap();
        let mut out = FileWriter::try_new(create("b.arrow"), &batch.schema()).unwrap();
        out.write(batch).unwrap();
        out.finish().unwrap();
        let mut out = StreamWriter::try_new(create("c.arrow"), &batch.schema()).unwrap();
        out.write(batch).unwrap();
        out.finish().unwrap();
    }

    /// The same rows in every format.
    fn tables(dir: &Path) -> Vec<std::path::PathBuf> {
        write_columnar(dir, &batch());
        let create = |name: &str| File::create(dir.join(name)).unwrap();
        let json = [
            r#"{"repo_id": "a/b", "file_path": "x.py", "content": "x = 1\n"}"#,
            r#"{"file_path": "y.py", "content": "y, \"z\"\n", "more": [1]}"#,
            "",
            r#"{"file_path": "z.py", "content": null}"#,
        ]
        .join("\n");
        create("d.jsonl").write_all(json.as_bytes()).unwrap();
        let mut out = GzEncoder::new(create("e.jsonl.gz"), Compression::fast());
        out.write_all(json.as_bytes()).unwrap();
        out.finish().unwrap();
        let csv = "repo_id,file_path,content\na/b,x.py,\"x = 1\n\"\n,y.py,\"y, \"\"z\"\"\n\"\n";
        create("f.csv").write_all(csv.as_bytes()).unwrap();
        ["a.parquet", "b.arrow", "c.arrow", "d.jsonl", "e.jsonl.gz", "f.csv"]
            .map(|name| dir.join(name))
            .to_vec()
    }

    #[test]
    fn every_format_gives_the_same_rows() {
        let dir = tempfile::tempdir().unwrap();
        let text = |text: &str| Some(text.to_owned());
        let expected = vec![
            (text("a/b"), text("x.py"), "x = 1\n".to_owned()),
            (None, text("y.py"), "y, \"z\"\n".to_owned()),
        ];
        for path in tables(dir.path()) {
            assert_eq!(rows(&path, "content").unwrap(), expected, "{}", path.display());
            let error = rows(&path, "text").unwrap_err().to_string();
            assert!(error.contains("no column \"text\"") && error.contains("file_path"), "{error}");
        }
    }

    /// Turns in a column of lists, in every format that has lists.
    #[test]
    fn lists_of_turns_are_given_as_json_from_every_format() {
        let dir = tempfile::tempdir().unwrap();
        let field = |name: &str| Field::new(name, DataType::Utf8, true);
        let turns = StructArray::from(vec![
            (
                Arc::new(field("role")),
                Arc::new(StringArray::from(vec!["user", "assistant", "user"])) as ArrayRef,
            ),
            (Arc::new(field("content")), Arc::new(StringArray::from(vec!["a\n", "\"b\"", "c"])) as ArrayRef),
        ]);
        let lists = |offsets: Vec<i32>| OffsetBuffer::new(ScalarBuffer::from(offsets));
        let item = Arc::new(Field::new("item", turns.data_type().clone(), true));
        let messages = ListArray::new(item, lists(vec![0, 2, 3]), Arc::new(turns), None);
        let texts = Arc::new(StringArray::from(vec!["q", "r", "s"]));
        let item = Arc::new(field("item"));
        let texts = ListArray::new(item, lists(vec![0, 1, 3]), texts, None);
        let columns: [(&str, ArrayRef); 2] = [("other", Arc::new(texts)), ("messages", Arc::new(messages))];
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        write_columnar(dir.path(), &batch);
        let json = [
            r#"{"other": ["q"], "messages": [{"role": "user", "content": "a\n"}, {"role": "assistant", "content": "\"b\""}]}"#,
            r#"{"other": ["r", "s"], "messages": [{"role": "user", "content": "c"}]}"#,
        ];
        std::fs::write(dir.path().join("d.jsonl"), json.join("\n")).unwrap();
        for name in ["a.parquet", "b.arrow", "c.arrow", "d.jsonl"] {
            let found = |wanted: Wanted<'_>| {
                let mut found: Vec<Value> = Vec::new();
                read(&dir.path().join(name), wanted, &mut |row| {
                    found.push(serde_json::from_str(row.content).unwrap());
                    true
                })?;
                Ok::<_, Error>(found)
            };
            let expected = json.map(|line| serde_json::from_str::<Value>(line).unwrap());
            let of = |column: &str| expected.iter().map(|row| row[column].clone()).collect::<Vec<_>>();
            assert_eq!(found(Wanted::Turns(None)).unwrap(), of("messages"), "{name}");
            assert_eq!(found(Wanted::Turns(Some("other"))).unwrap(), of("other"), "{name}");
            let error = found(Wanted::Texts("messages")).unwrap_err().to_string();
            assert!(error.contains("no column \"messages\" of texts"), "{error}");
        }
    }

    #[test]
    fn a_table_that_is_cut_off_or_is_none_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for path in tables(dir.path()) {
            let whole = std::fs::read(&path).unwrap();
            std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
            let name = path.file_name().unwrap().to_str().unwrap();
            // Half a CSV of whole rows is a CSV.
            match rows(&path, "content") {
                Err(error) => assert!(error.to_string().contains(name), "{error}"),
                Ok(_) => assert_eq!(name, "f.csv"),
            }
            std::fs::write(&path, [0x1f, 0xff, 0, 7, b'\n']).unwrap();
            assert!(rows(&path, "content").unwrap_err().to_string().contains(name));
        }
        for (name, text, detail) in [
            ("g.jsonl", "{\"content\": \"a\"}\n[1]\n", "row 2: it is no JSON object"),
            ("h.csv", "content,b\na,1\nb\n", "row 3"),
        ] {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            let error = rows(&path, "content").unwrap_err().to_string();
            assert!(error.contains(detail), "{error}");
        }
    }

    #[test]
    fn names_say_what_a_table_is() {
        for (name, expected) in [
            ("a.PARQUET", Some(Format::Parquet)),
            ("a.feather", Some(Format::Arrow)),
            ("a.json.gz", Some(Format::JsonLines { gzip: true })),
            ("a.csv", Some(Format::Csv { gzip: false })),
            ("dataset_infos.json", None),
            ("a.parquet.gz", None),
            ("README.md", None),
            ("csv", None),
        ] {
            assert_eq!(Format::of(name), expected, "{name}");
        }
    }

    proptest! {
        #[test]
        fn any_damage_is_an_error_or_rows(at in 0usize..3000, byte in any::<u8>(), which in 0usize..6) {
            let dir = tempfile::tempdir().unwrap();
            let path = tables(dir.path()).swap_remove(which);
            let mut bytes = std::fs::read(&path).unwrap();
            let at = at % bytes.len();
            bytes[at] = byte;
            std::fs::write(&path, &bytes).unwrap();
            let _ = rows(&path, "content");
        }
    }
}
