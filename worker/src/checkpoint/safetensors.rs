//! safetensors files (8-byte header length, JSON header, tensors end to end), read by slices
//! and written as a stream that is hashed on its way.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::Error;
use super::floats::{self, FloatDtype};

/// Largest header that is read: the format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes read or converted at a time.
const CHUNK_BYTES: usize = 8 << 20;

/// An open file whose header has been checked.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    data_begin: u64,
}

impl Reader {
    /// Opens `path` and checks its header against its length.
    ///
    /// # Errors
    /// [`Error::Format`] with the rule that the file breaks.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::io(path))?;
        let file_bytes = file.metadata().map_err(Error::io(path))?.len();
        let mut prefix = [0; 8];
        file.read_exact_at(&mut prefix, 0)
            .map_err(|_| Error::format(path, format!("not a safetensors file: only {file_bytes} bytes")))?;
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > MAX_HEADER_BYTES || header_bytes.saturating_add(8) > file_bytes {
            let rule = format!(
                "header of {header_bytes} bytes in a file of {file_bytes}: truncated, or not safetensors"
            );
            return Err(Error::format(path, rule));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact_at(&mut header, 8).map_err(Error::io(path))?;
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|e| Error::format(path, format!("unreadable safetensors header: {e}")))?;
        let data_begin = 8 + header_bytes;
        let end = metadata.tensors().values().map(|info| info.data_offsets.1 as u64).max().unwrap_or(0);
        if data_begin + end != file_bytes {
            let rule = format!(
                "truncated or overlong: its header promises {} bytes, it has {file_bytes}; fetch or save it again",
                data_begin + end
            );
            return Err(Error::format(path, rule));
        }
        Ok(Reader { path: path.to_owned(), file, metadata, data_begin })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names = self.metadata.offset_keys();
        names.sort();
        names
    }

    /// Shape and dtype of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.metadata.info(name)
    }

    /// An entry of the header's free text.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// Elements `range` of a tensor, flattened, as fp32, in pieces: `take(first, values)`.
    ///
    /// # Errors
    /// An absent tensor, a range outside it, a dtype other than fp32, bf16, fp16.
    pub fn read_f32(
        &self,
        name: &str,
        range: Range<u64>,
        take: impl FnMut(u64, &[f32]),
    ) -> Result<(), Error> {
        let info = self.info(name).ok_or_else(|| Error::tensor(&self.path, name, "is not in the file"))?;
        let dtype = match info.dtype {
            Dtype::F32 => FloatDtype::F32,
            Dtype::BF16 => FloatDtype::Bf16,
            Dtype::F16 => FloatDtype::F16,
            other => {
                let rule = format!("has dtype {other}; only fp32, bf16 and fp16 weights can be loaded");
                return Err(Error::tensor(&self.path, name, rule));
            }
        };
        let elements = (info.data_offsets.1 - info.data_offsets.0) as u64 / dtype.bytes();
        if range.end > elements || range.start > range.end {
            let rule = format!("has {elements} elements, needed are {}..{}", range.start, range.end);
            return Err(Error::tensor(&self.path, name, rule));
        }
        let begin = self.data_begin + info.data_offsets.0 as u64;
        let read_exact_at = |into: &mut [u8], offset| self.file.read_exact_at(into, offset);
        floats::read(read_exact_at, begin, dtype, range, take).map_err(Error::io(&self.path))
    }
}

/// What a file will hold, before its first byte is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Name of the tensor.
    pub name: String,
    /// Its shape.
    pub shape: Vec<u64>,
}

/// Dtypes that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteDtype {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    Bf16,
}

impl WriteDtype {
    /// Bytes of one element.
    pub fn bytes(self) -> u64 {
        match self {
            WriteDtype::F32 => 4,
            WriteDtype::Bf16 => 2,
        }
    }
}

/// A file that is being written, in the order of its entries.
pub struct Writer {
    path: PathBuf,
    file: BufWriter<File>,
    hash: Sha256,
    dtype: WriteDtype,
    written: u64,
    promised: u64,
}

impl Writer {
    /// Creates `path` with the header of `entries`, all of one dtype, in that order.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    pub fn create(path: &Path, entries: &[Entry], dtype: WriteDtype) -> Result<Self, Error> {
        Self::create_with(path, entries, dtype, &BTreeMap::new())
    }

    /// As [`create`](Self::create), with `metadata` beside the format's own entry in the header's free text.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    pub fn create_with(
        path: &Path,
        entries: &[Entry],
        dtype: WriteDtype,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self, Error> {
        let mut header = BTreeMap::new();
        let mut offset = 0;
        for entry in entries {
            let bytes = entry.shape.iter().product::<u64>() * dtype.bytes();
            let name = match dtype {
                WriteDtype::F32 => "F32",
                WriteDtype::Bf16 => "BF16",
            };
            header.insert(
                entry.name.as_str(),
                json!({ "dtype": name, "shape": entry.shape, "data_offsets": [offset, offset + bytes] }),
            );
            offset += bytes;
        }
        let mut metadata = metadata.clone();
        metadata.insert("format".to_owned(), "pt".to_owned());
        header.insert("__metadata__", json!(metadata));
        let mut header = json!(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');

        let file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(Error::io(path))?);
        let mut writer = Writer {
            path: path.to_owned(),
            file,
            hash: Sha256::new(),
            dtype,
            written: 0,
            promised: 8 + header.len() as u64 + offset,
        };
        writer.bytes(&(header.len() as u64).to_le_bytes())?;
        writer.bytes(&header)?;
        Ok(writer)
    }

    /// Appends raw bytes in the file's dtype.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<(), Error> {
        for piece in bytes.chunks(CHUNK_BYTES) {
            self.hash.update(piece);
            self.file.write_all(piece).map_err(Error::io(&self.path))?;
        }
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Appends values, rounded to the file's dtype.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    pub fn values(&mut self, values: &[f32]) -> Result<(), Error> {
        let mut bytes = Vec::with_capacity(CHUNK_BYTES.min(values.len() * 4));
        for piece in values.chunks(CHUNK_BYTES / 4) {
            bytes.clear();
            match self.dtype {
                WriteDtype::F32 => piece.iter().for_each(|v| bytes.extend_from_slice(&v.to_le_bytes())),
                WriteDtype::Bf16 => {
                    piece.iter().for_each(|v| bytes.extend_from_slice(&bf16::from_f32(*v).to_le_bytes()));
                }
            }
            self.bytes(&bytes)?;
        }
        Ok(())
    }

    /// Flushes to the disk; the size and SHA-256 (hex) of the file.
    ///
    /// # Errors
    /// Whatever the file system refuses; [`Error::Format`] when less was written than promised.
    pub fn finish(self) -> Result<(u64, String), Error> {
        if self.written != self.promised {
            let rule = format!("{} bytes written, its header promises {}", self.written, self.promised);
            return Err(Error::format(&self.path, rule));
        }
        let file = self.file.into_inner().map_err(|e| Error::io(&self.path)(e.into_error()))?;
        file.sync_all().map_err(Error::io(&self.path))?;
        Ok((self.written, tunefleet_proto::hex(&self.hash.finalize())))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn write(path: &Path, dtype: WriteDtype) {
        let entries =
            [Entry { name: "b".into(), shape: vec![2, 3] }, Entry { name: "a".into(), shape: vec![4] }];
        let mut writer = Writer::create(path, &entries, dtype).unwrap();
        writer.values(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        writer.values(&[-1.0, 0.5, 0.25, 8.0]).unwrap();
        writer.finish().unwrap();
    }

    #[test]
    fn slices_come_back_as_they_were_written() {
        let dir = tempfile::tempdir().unwrap();
        for dtype in [WriteDtype::F32, WriteDtype::Bf16] {
            let path = dir.path().join("x.safetensors");
            write(&path, dtype);
            let reader = Reader::open(&path).unwrap();
            assert_eq!(reader.names(), ["a", "b"]);
            let mut seen = Vec::new();
            reader.read_f32("b", 1..5, |first, values| seen.push((first, values.to_vec()))).unwrap();
            assert_eq!(seen, [(1, vec![1.0, 2.0, 3.0, 4.0])]);
            assert!(
                reader.read_f32("b", 5..7, |_, _| ()).unwrap_err().to_string().contains("has 6 elements")
            );
            assert!(reader.read_f32("c", 0..1, |_, _| ()).is_err());
        }
    }

    #[test]
    fn the_reference_reader_accepts_what_we_write() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        write(&path, WriteDtype::F32);
        let bytes = std::fs::read(&path).unwrap();
        let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(parsed.tensor("a").unwrap().shape(), [4]);
        assert_eq!(&parsed.tensor("a").unwrap().data()[..4], &(-1f32).to_le_bytes());
    }

    #[test]
    fn free_text_comes_back_beside_the_format() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let metadata = [("tunefleet.note".to_owned(), "caf\u{e9}".to_owned())].into();
        Writer::create_with(&path, &[], WriteDtype::F32, &metadata).unwrap().finish().unwrap();
        let reader = Reader::open(&path).unwrap();
        assert_eq!(reader.metadata("tunefleet.note"), Some("caf\u{e9}"));
        assert_eq!(reader.metadata("format"), Some("pt"));
        assert_eq!(reader.metadata("absent"), None);
    }

    #[test]
    fn a_truncated_file_is_refused_with_both_sizes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        write(&path, WriteDtype::F32);
        let bytes = std::fs::read(&path).unwrap();
        for len in [0, 4, 8, 40, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..len]).unwrap();
            let message = Reader::open(&path).unwrap_err().to_string();
            assert!(message.contains("x.safetensors"), "{message}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), header in 0u64..64) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x");
            if bytes.len() >= 8 {
                bytes[..8].copy_from_slice(&header.to_le_bytes());
            }
            std::fs::write(&path, &bytes).unwrap();
            let _ = Reader::open(&path);
        }
    }
}
