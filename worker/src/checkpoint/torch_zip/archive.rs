//! The directory of a zip archive: names, sizes and places of its entries, those beyond 4 GB included.
//!
//! Source: PKWARE's APPNOTE, sections 4.3 to 4.5. Read here and not by a crate, because entries are read by
//! slices where they lie, and because every number comes from outside.

use std::collections::BTreeMap;
use std::io;

use super::read_at::ReadAt;

/// Largest directory that is read; one of 100,000 entries has about 10 MB.
const MAX_DIRECTORY_BYTES: u64 = 64 << 20;
/// Fixed part of the record that ends an archive, and its longest comment.
const END_BYTES: u64 = 22;
const MAX_COMMENT_BYTES: u64 = 65_535;
/// Fixed parts of the 64-bit records, and of an entry's header in the directory and before its content.
const END64_LOCATOR_BYTES: u64 = 20;
const END64_BYTES: u64 = 56;
const CENTRAL_BYTES: usize = 46;
const LOCAL_BYTES: u64 = 30;
/// Stands in a 32-bit field whose value is in the 64-bit record.
const IN_64: u64 = u32::MAX as u64;

/// Why an archive, or an entry, cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The file system refused.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It does not end as an archive does.
    #[error("no zip archive, or truncated: it lacks the directory that ends one; fetch or save it again")]
    NoEnd,
    /// A directory that contradicts itself or the file's length.
    #[error("its zip directory {0}; fetch or save it again")]
    Directory(String),
    /// An entry that cannot be read.
    #[error("its zip entry {name:?} {rule}")]
    Entry { name: String, rule: String },
}

/// One stored file of an archive.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// Length of its content.
    pub(super) bytes: u64,
    header_offset: u64,
    /// Neither compressed nor encrypted: its content is its bytes in the file.
    plain: bool,
}

/// An archive's directory.
pub(super) struct Archive {
    /// By name.
    pub(super) entries: BTreeMap<String, Entry>,
    /// Contents end before it.
    directory_offset: u64,
}

impl Archive {
    /// Reads the directory, and nothing before it.
    pub(super) fn open(source: &dyn ReadAt) -> Result<Archive, Error> {
        let end = End::find(source)?;
        let mut directory = vec![0; end.directory_bytes as usize];
        source.read_exact_at(&mut directory, end.directory_offset)?;
        let mut rest = directory.as_slice();
        let mut entries = BTreeMap::new();
        while !rest.is_empty() {
            let (name, entry, after) = central_entry(rest)?;
            if entries.insert(name.clone(), entry).is_some() {
                return Err(Error::Directory(format!("names {name:?} twice")));
            }
            rest = after;
        }
        if entries.len() as u64 != end.entries {
            return Err(Error::Directory(format!("holds {} entries, not {}", entries.len(), end.entries)));
        }
        Ok(Archive { entries, directory_offset: end.directory_offset })
    }

    /// An entry, which must be stored as it is.
    pub(super) fn stored(&self, name: &str) -> Result<&Entry, Error> {
        let refuse = |rule: &str| Error::Entry { name: name.to_owned(), rule: rule.to_owned() };
        let entry = self.entries.get(name).ok_or_else(|| refuse("is absent; fetch or save it again"))?;
        if !entry.plain {
            return Err(refuse(
                "is compressed or encrypted, so that it cannot be read by slices; torch.save stores entries \
                 as they are: load the file with torch and save it again",
            ));
        }
        Ok(entry)
    }

    /// The offset of an entry's first byte in the file. It follows a header of its own, whose length is not
    /// that in the directory: torch pads it so that contents are aligned.
    pub(super) fn begin(&self, source: &dyn ReadAt, name: &str) -> Result<u64, Error> {
        let entry = self.stored(name)?;
        let refuse = |rule: &str| Error::Entry { name: name.to_owned(), rule: rule.to_owned() };
        let mut header = [0; LOCAL_BYTES as usize];
        let within = entry.header_offset.checked_add(LOCAL_BYTES).filter(|&end| end <= self.directory_offset);
        within.ok_or_else(|| refuse("begins behind the directory; fetch or save it again"))?;
        source.read_exact_at(&mut header, entry.header_offset)?;
        if !header.starts_with(b"PK\x03\x04") {
            return Err(refuse("is not where the directory says; fetch or save it again"));
        }
        let padding = u64::from(u16_at(&header, 26)) + u64::from(u16_at(&header, 28));
        let begin = entry.header_offset + LOCAL_BYTES + padding;
        let end = begin.checked_add(entry.bytes).filter(|&end| end <= self.directory_offset);
        end.ok_or_else(|| refuse("is longer than the file; fetch or save it again"))?;
        Ok(begin)
    }
}

/// Where the directory is.
struct End {
    entries: u64,
    directory_bytes: u64,
    directory_offset: u64,
}

impl End {
    fn find(source: &dyn ReadAt) -> Result<End, Error> {
        let file_bytes = source.bytes()?;
        // torch writes no comment, so nearly always the first few bytes suffice.
        for comment_bytes in [0, MAX_COMMENT_BYTES] {
            let begin = file_bytes.saturating_sub(END_BYTES + comment_bytes);
            let mut tail = vec![0; (file_bytes - begin) as usize];
            source.read_exact_at(&mut tail, begin)?;
            // A comment could hold the signature: the record's comment must end where the file does.
            let record = tail.windows(END_BYTES as usize).enumerate().rfind(|(at, record)| {
                let comment = tail.len() - at - END_BYTES as usize;
                record.starts_with(b"PK\x05\x06") && usize::from(u16_at(record, 20)) == comment
            });
            if let Some((at, record)) = record {
                return End::checked(source, record, begin + at as u64);
            }
        }
        Err(Error::NoEnd)
    }

    /// The record at `at`, or where it refers to a 64-bit one, that.
    fn checked(source: &dyn ReadAt, record: &[u8], at: u64) -> Result<End, Error> {
        let mut end = End {
            entries: u64::from(u16_at(record, 10)),
            directory_bytes: u64::from(u32_at(record, 12)),
            directory_offset: u64::from(u32_at(record, 16)),
        };
        let mut limit = at;
        if end.entries == u64::from(u16::MAX) || [end.directory_bytes, end.directory_offset].contains(&IN_64)
        {
            let locator_at = at.checked_sub(END64_LOCATOR_BYTES).ok_or(Error::NoEnd)?;
            let mut locator = [0; END64_LOCATOR_BYTES as usize];
            source.read_exact_at(&mut locator, locator_at)?;
            if locator.starts_with(b"PK\x06\x07") {
                limit = u64_at(&locator, 8);
                let within = limit.checked_add(END64_BYTES).filter(|&end| end <= locator_at);
                within.ok_or_else(|| Error::Directory("ends behind the file".to_owned()))?;
                let mut record = [0; END64_BYTES as usize];
                source.read_exact_at(&mut record, limit)?;
                if !record.starts_with(b"PK\x06\x06") {
                    return Err(Error::Directory("lacks its 64-bit record".to_owned()));
                }
                end = End {
                    entries: u64_at(&record, 32),
                    directory_bytes: u64_at(&record, 40),
                    directory_offset: u64_at(&record, 48),
                };
            }
        }
        if end.directory_bytes > MAX_DIRECTORY_BYTES {
            let rule = format!("has {} bytes; at most {MAX_DIRECTORY_BYTES} are read", end.directory_bytes);
            return Err(Error::Directory(rule));
        }
        let within = end.directory_offset.checked_add(end.directory_bytes).filter(|&end| end <= limit);
        within.ok_or_else(|| Error::Directory("is longer than the file".to_owned()))?;
        Ok(end)
    }
}

/// The entry that `directory` begins with, and what follows it.
fn central_entry(directory: &[u8]) -> Result<(String, Entry, &[u8]), Error> {
    let cut = || Error::Directory("ends in the middle of an entry".to_owned());
    let (header, rest) = directory.split_at_checked(CENTRAL_BYTES).ok_or_else(cut)?;
    if !header.starts_with(b"PK\x01\x02") {
        return Err(Error::Directory("holds something that is no entry".to_owned()));
    }
    let [name_bytes, extra_bytes, comment_bytes] = [28, 30, 32].map(|at| usize::from(u16_at(header, at)));
    let (name, rest) = rest.split_at_checked(name_bytes).ok_or_else(cut)?;
    let (extra, rest) = rest.split_at_checked(extra_bytes).ok_or_else(cut)?;
    let (_, rest) = rest.split_at_checked(comment_bytes).ok_or_else(cut)?;
    let name = std::str::from_utf8(name)
        .map_err(|_| Error::Directory("names an entry in something else than UTF-8".to_owned()))?;

    // In this order, and only those whose 32 bits do not suffice.
    let mut wide = wide_fields(extra);
    let mut field = |at: usize| match u64::from(u32_at(header, at)) {
        IN_64 => wide.next(),
        value => Some(value),
    };
    let (bytes, compressed_bytes, header_offset) = (field(24), field(20), field(42));
    let (Some(bytes), Some(compressed_bytes), Some(header_offset)) = (bytes, compressed_bytes, header_offset)
    else {
        let rule = "lacks its 64-bit sizes; fetch or save it again".to_owned();
        return Err(Error::Entry { name: name.to_owned(), rule });
    };
    let encrypted = u16_at(header, 8) & 1 == 1;
    let plain = u16_at(header, 10) == 0 && !encrypted && bytes == compressed_bytes;
    Ok((name.to_owned(), Entry { bytes, header_offset, plain }, rest))
}

/// The numbers in the extra field of 64-bit sizes; none where there is no such field.
fn wide_fields(mut extra: &[u8]) -> impl Iterator<Item = u64> {
    let mut found: &[u8] = &[];
    while let Some((head, rest)) = extra.split_at_checked(4) {
        let Some((content, after)) = rest.split_at_checked(usize::from(u16_at(head, 2))) else { break };
        if u16_at(head, 0) == 1 {
            found = content;
            break;
        }
        extra = after;
    }
    found.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes))
}

/// Little-endian numbers at constant places of records that are long enough.
fn u16_at(record: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([record[at], record[at + 1]])
}

fn u32_at(record: &[u8], at: usize) -> u32 {
    u32::from(u16_at(record, at)) | u32::from(u16_at(record, at + 2)) << 16
}

fn u64_at(record: &[u8], at: usize) -> u64 {
    u64::from(u32_at(record, at)) | u64::from(u32_at(record, at + 4)) << 32
}
