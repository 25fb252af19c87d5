//! Weights as `torch.save` writes them since PyTorch 1.6 (`pytorch_model.bin`): a zip archive of a pickled
//! state dict and of its storages, each a file of plain little-endian elements, read by slices.
//!
//! Layout: `PREFIX/data.pkl`, `PREFIX/data/KEY` for each storage, and in newer files `PREFIX/byteorder`.
//! Source: `torch/serialization.py` and `caffe2/serialize/inline_container.cc` of PyTorch.

/// Bytes at offsets.
mod read_at;
/// The zip directory.
mod archive;
/// The pickled state dict.
mod pickle;

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use read_at::ReadAt;

use super::Error;
use super::floats::{self, FloatDtype};
use archive::Archive;

/// Largest pickle that is read; one of a thousand tensors has about 300 KB.
const MAX_PICKLE_BYTES: u64 = 16 << 20;
/// Files before 1.6 begin with this pickled number (`torch.serialization.MAGIC_NUMBER`).
const LEGACY_BEGIN: [u8; 14] =
    [0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

/// An open file whose tensors are known, none of which has been read.
pub struct Reader {
    path: PathBuf,
    source: Box<dyn ReadAt>,
    archive: Archive,
    tensors: BTreeMap<String, Tensor>,
}

/// Where a tensor's elements are.
struct Tensor {
    shape: Vec<u64>,
    elements: u64,
    /// As in `FloatStorage`.
    class: &'static str,
    /// The archive's file of its storage, which tied tensors share.
    entry: String,
    /// Its first element there; none where its elements do not lie end to end.
    first: Option<u64>,
}

impl Reader {
    /// Opens `path`, and reads its directory and its pickle.
    ///
    /// # Errors
    /// [`Error::Format`] with the rule that the file breaks: truncated, from before PyTorch 1.6, big-endian,
    /// compressed, or a pickle of anything else than named tensors.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::io(path))?;
        Reader::new(path, Box::new(file))
    }

    /// As [`open`](Self::open), from `source`; `path` is what errors say.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn new(path: &Path, source: Box<dyn ReadAt>) -> Result<Self, Error> {
        let refuse = |rule: String| Error::format(path, rule);
        if is_legacy(&*source) {
            return Err(refuse(format!(
                "is in PyTorch's format from before 1.6, which cannot be read by slices: write it anew with \
                 torch.save(torch.load({0:?}, map_location=\"cpu\"), {0:?})",
                path.file_name().unwrap_or_default(),
            )));
        }
        let archive = Archive::open(&*source).map_err(of_archive(path))?;
        let prefix = prefix(&archive).map_err(refuse)?;
        let byte_order = format!("{prefix}/byteorder");
        if archive.entries.contains_key(&byte_order) {
            let order = content(&*source, &archive, &byte_order, 16).map_err(of_archive(path))?;
            if order != b"little" {
                let rule = format!("has byte order {:?}, not little", String::from_utf8_lossy(&order));
                return Err(refuse(rule));
            }
        }
        let pickle = content(&*source, &archive, &format!("{prefix}/data.pkl"), MAX_PICKLE_BYTES);
        let pickle = pickle.map_err(of_archive(path))?;
        let state_dict = pickle::state_dict(&pickle).map_err(|error| refuse(error.to_string()))?;
        let mut tensors = BTreeMap::new();
        for (name, tensor) in state_dict {
            let placed = place(&prefix, &archive, tensor).map_err(|error| match error {
                Misplaced::Entry(error) => of_archive(path)(error),
                Misplaced::Rule(rule) => Error::tensor(path, name, rule),
            })?;
            tensors.insert(name.to_owned(), placed);
        }
        Ok(Reader { path: path.to_owned(), source, archive, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor's shape.
    pub fn shape(&self, name: &str) -> Option<&[u64]> {
        Some(&self.tensors.get(name)?.shape)
    }

    /// Elements `range` of a tensor, flattened, as fp32, in pieces: `take(first, values)`. Reads their bytes
    /// and the header of their file in the archive.
    ///
    /// # Errors
    /// An absent tensor, a range outside it, a dtype other than fp32, bf16, fp16, elements that do not lie
    /// end to end.
    pub fn read_f32(
        &self,
        name: &str,
        range: Range<u64>,
        take: impl FnMut(u64, &[f32]),
    ) -> Result<(), Error> {
        let refuse = |rule: String| Error::tensor(&self.path, name, rule);
        let tensor = self.tensors.get(name).ok_or_else(|| refuse("is not in the file".to_owned()))?;
        let dtype = match tensor.class {
            "FloatStorage" => FloatDtype::F32,
            "BFloat16Storage" => FloatDtype::Bf16,
            "HalfStorage" => FloatDtype::F16,
            other => {
                let rule = format!("lies in a {other}; only fp32, bf16 and fp16 weights can be loaded");
                return Err(refuse(rule));
            }
        };
        let first = tensor.first.ok_or_else(|| {
            refuse("is strided, so that it cannot be read by slices: save it .contiguous()".to_owned())
        })?;
        if range.end > tensor.elements || range.start > range.end {
            return Err(refuse(format!(
                "has {} elements, needed are {}..{}",
                tensor.elements, range.start, range.end
            )));
        }
        let begin = self.archive.begin(&*self.source, &tensor.entry).map_err(of_archive(&self.path))?;
        let read_exact_at = |into: &mut [u8], offset| self.source.read_exact_at(into, offset);
        floats::read(read_exact_at, begin + first * dtype.bytes(), dtype, range, take)
            .map_err(Error::io(&self.path))
    }
}

fn of_archive(path: &Path) -> impl Fn(archive::Error) -> Error {
    let path = path.to_owned();
    move |error| match error {
        archive::Error::Io(source) => Error::Io { path: path.clone(), source },
        error => Error::format(&path, error.to_string()),
    }
}

fn is_legacy(source: &dyn ReadAt) -> bool {
    let mut begin = [0; LEGACY_BEGIN.len()];
    source.read_exact_at(&mut begin, 0).is_ok_and(|()| begin == LEGACY_BEGIN)
}

/// The folder of the archive that everything is in; torch names it after the file that was first written.
fn prefix(archive: &Archive) -> Result<String, String> {
    let mut found = archive.entries.keys().filter_map(|name| name.strip_suffix("/data.pkl"));
    match (found.next(), found.next()) {
        (Some(prefix), None) => Ok(prefix.to_owned()),
        (None, _) => {
            Err("is a zip archive without a data.pkl, so that torch.save did not write it".to_owned())
        }
        (Some(_), Some(_)) => Err("is a zip archive with several files data.pkl".to_owned()),
    }
}

/// The whole of a short entry.
fn content(
    source: &dyn ReadAt,
    archive: &Archive,
    name: &str,
    max_bytes: u64,
) -> Result<Vec<u8>, archive::Error> {
    let bytes = archive.stored(name)?.bytes;
    if bytes > max_bytes {
        let rule = format!("has {bytes} bytes; at most {max_bytes} are read");
        return Err(archive::Error::Entry { name: name.to_owned(), rule });
    }
    let begin = archive.begin(source, name)?;
    let mut content = vec![0; bytes as usize];
    source.read_exact_at(&mut content, begin)?;
    Ok(content)
}

/// Why a tensor has no place in the archive.
enum Misplaced {
    Entry(archive::Error),
    Rule(String),
}

fn place(prefix: &str, archive: &Archive, tensor: pickle::Tensor<'_>) -> Result<Tensor, Misplaced> {
    let entry = format!("{prefix}/data/{}", tensor.key);
    let held = archive.stored(&entry).map_err(Misplaced::Entry)?.bytes;
    if tensor.storage_elements.checked_mul(tensor.class.element_bytes) != Some(held) {
        let rule = format!(
            "needs a {} of {} elements, but {entry:?} has {held} bytes; fetch or save it again",
            tensor.class.name, tensor.storage_elements
        );
        return Err(Misplaced::Rule(rule));
    }
    let elements = tensor.shape.iter().try_fold(1u64, |all, &n| all.checked_mul(n));
    let elements = elements
        .ok_or_else(|| Misplaced::Rule(format!("has shape {:?}, which no file can hold", tensor.shape)))?;
    let first = is_contiguous(&tensor.shape, &tensor.strides).then_some(tensor.offset);
    let outside = |first: u64| first.checked_add(elements).is_none_or(|end| end > tensor.storage_elements);
    if first.is_some_and(outside) {
        let rule = format!(
            "has {elements} elements from {} on in a storage of {}; fetch or save it again",
            tensor.offset, tensor.storage_elements
        );
        return Err(Misplaced::Rule(rule));
    }
    Ok(Tensor { elements, class: tensor.class.name, entry, first, shape: tensor.shape })
}

/// Whether elements lie end to end; the stride of a dimension of one index says nothing.
fn is_contiguous(shape: &[u64], strides: &[u64]) -> bool {
    let mut expected = 1u64;
    for (&n, &stride) in shape.iter().zip(strides).rev() {
        if n != 1 && stride != expected {
            return shape.contains(&0);
        }
        expected = expected.saturating_mul(n);
    }
    true
}
