//! What an Arrow file claims to hold, held against what it is: the library's readers believe a length, and allocate as
//! much, before they look. Both file and stream (<https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format>).
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use arrow::ipc::reader::read_footer_length;
use arrow::ipc::{Message, RecordBatch, root_as_footer, root_as_message};

/// Most that the buffers of one batch may unpack to. Ours hold 16 MiB of text, others' seldom more than a few hundred.
pub const MAX_BATCH_BYTES: u64 = 2 << 30;
/// Marks the length of a message, since format 0.15.
const CONTINUATION: [u8; 4] = [0xff; 4];
/// Length of the footer, and the magic, at the end of a file.
const TRAILER_BYTES: u64 = 10;

/// Why a file is not read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is no Arrow file.
    #[error("{0}")]
    Invalid(String),
    /// A part of it would lie outside of it.
    #[error("{what} would end at byte {end} of a file of {bytes}")]
    Outside {
        /// Which part.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// Bytes of the file.
        bytes: u64,
    },
    /// A batch says that it unpacks to more than is believed.
    #[error("a batch of {packed} bytes says that it unpacks to {claimed}, more than {MAX_BATCH_BYTES}")]
    Large {
        /// What it takes in the file.
        packed: u64,
        /// What it says.
        claimed: u64,
    },
}

/// Checks a file with a footer. Where it was read to is left as it was.
///
/// # Errors
/// See [`Error`].
pub fn check_file(file: &mut File) -> Result<(), Error> {
    let at = file.stream_position()?;
    let checked = Checked::new(file).and_then(|mut checked| checked.blocks());
    file.seek(SeekFrom::Start(at))?;
    checked
}

/// Checks a stream of messages. Where it was read to is left as it was.
///
/// # Errors
/// See [`Error`].
pub fn check_stream(file: &mut File) -> Result<(), Error> {
    let at = file.stream_position()?;
    let checked = Checked::new(file).and_then(|mut checked| checked.messages(at));
    file.seek(SeekFrom::Start(at))?;
    checked
}

struct Checked<'a> {
    file: &'a mut File,
    bytes: u64,
}

impl<'a> Checked<'a> {
    fn new(file: &'a mut File) -> Result<Self, Error> {
        let bytes = file.metadata()?.len();
        Ok(Checked { file, bytes })
    }

    /// The messages that the footer names.
    fn blocks(&mut self) -> Result<(), Error> {
        let invalid = |error: &dyn std::fmt::Display| Error::Invalid(error.to_string());
        let end = self
            .bytes
            .checked_sub(TRAILER_BYTES)
            .ok_or_else(|| Error::Invalid(format!("{} bytes are too few for an Arrow file", self.bytes)))?;
        let mut trailer = [0; TRAILER_BYTES as usize];
        self.read(end, &mut trailer)?;
        let footer_bytes = read_footer_length(trailer).map_err(|error| invalid(&error))? as u64;
        let footer_at = end.checked_sub(footer_bytes).ok_or_else(|| Error::Outside {
            what: "the footer",
            end: footer_bytes.saturating_add(TRAILER_BYTES),
            bytes: self.bytes,
        })?;
        let footer = self.bytes_at("the footer", footer_at, footer_bytes)?;
        let footer = root_as_footer(&footer).map_err(|error| invalid(&error))?;
        let blocks = footer.dictionaries().into_iter().chain(footer.recordBatches()).flatten();
        for block in blocks {
            let length = |length: i64| u64::try_from(length).map_err(|error| invalid(&error));
            let (at, head) = (length(block.offset())?, length(block.metaDataLength().into())?);
            let message = self.bytes_at("a message", at, head)?;
            let body = at.saturating_add(head);
            self.within("a batch", body, length(block.bodyLength())?)?;
            let skipped = if message.starts_with(&CONTINUATION) { 8 } else { 4 };
            self.message(message.get(skipped..).unwrap_or_default(), body)?;
        }
        Ok(())
    }

    /// Messages one after the other from `at` on.
    fn messages(&mut self, mut at: u64) -> Result<(), Error> {
        while at < self.bytes {
            let mut word = [0; 4];
            self.read(at, &mut word)?;
            if word == CONTINUATION {
                at += 4;
                self.read(at, &mut word)?;
            }
            let head = u64::from(u32::from_le_bytes(word));
            at += 4;
            if head == 0 {
                return Ok(());
            }
            let message = self.bytes_at("a message", at, head)?;
            let body = at.saturating_add(head);
            let body_bytes = self.message(&message, body)?;
            at = self.within("a batch", body, body_bytes)?;
        }
        Ok(())
    }

    /// Checks the buffers of a message whose body begins at `body`; bytes of the body, as it says.
    fn message(&mut self, message: &[u8], body: u64) -> Result<u64, Error> {
        let message: Message<'_> =
            root_as_message(message).map_err(|error| Error::Invalid(error.to_string()))?;
        let length =
            u64::try_from(message.bodyLength()).map_err(|error| Error::Invalid(error.to_string()))?;
        let dictionary = message.header_as_dictionary_batch().and_then(|dictionary| dictionary.data());
        for batch in message.header_as_record_batch().into_iter().chain(dictionary) {
            self.batch(&batch, body)?;
        }
        Ok(length)
    }

    fn batch(&mut self, batch: &RecordBatch<'_>, body: u64) -> Result<(), Error> {
        let (mut packed, mut claimed) = (0u64, 0u64);
        for buffer in batch.buffers().into_iter().flatten() {
            let (Ok(at), Ok(length)) = (u64::try_from(buffer.offset()), u64::try_from(buffer.length()))
            else {
                return Err(Error::Invalid("a buffer has a negative place or length".to_owned()));
            };
            let at = body.saturating_add(at);
            self.within("a buffer", at, length)?;
            packed = packed.saturating_add(length);
            if batch.compression().is_some() && length >= 8 {
                let mut word = [0; 8];
                self.read(at, &mut word)?;
                // -1 says that it is not packed.
                claimed = claimed.saturating_add(u64::try_from(i64::from_le_bytes(word)).unwrap_or(length));
            }
        }
        if claimed > MAX_BATCH_BYTES { Err(Error::Large { packed, claimed }) } else { Ok(()) }
    }

    /// The end of a part, which lies within the file.
    fn within(&self, what: &'static str, at: u64, length: u64) -> Result<u64, Error> {
        let end = at.saturating_add(length);
        if end > self.bytes { Err(Error::Outside { what, end, bytes: self.bytes }) } else { Ok(end) }
    }

    fn bytes_at(&mut self, what: &'static str, at: u64, length: u64) -> Result<Vec<u8>, Error> {
        self.within(what, at, length)?;
        let mut bytes = vec![0; length as usize];
        self.read(at, &mut bytes)?;
        Ok(bytes)
    }

    fn read(&mut self, at: u64, into: &mut [u8]) -> Result<(), Error> {
        self.file.seek(SeekFrom::Start(at))?;
        Ok(self.file.read_exact(into)?)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use arrow::array::{ArrayRef, StringArray};
    use arrow::ipc::CompressionType;
    use arrow::ipc::reader::{FileReader, StreamReader};
    use arrow::ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
    use proptest::prelude::*;

    use super::*;

    fn batch() -> arrow::array::RecordBatch {
        let texts = Arc::new(StringArray::from(vec!["x".repeat(5000), "y".to_owned()])) as ArrayRef;
        arrow::array::RecordBatch::try_from_iter([("text", texts)]).unwrap()
    }

    fn file() -> Vec<u8> {
        let options = IpcWriteOptions::default().try_with_compression(Some(CompressionType::ZSTD)).unwrap();
        let mut bytes = Vec::new();
        let mut writer = FileWriter::try_new_with_options(&mut bytes, &batch().schema(), options).unwrap();
        writer.write(&batch()).and_then(|()| writer.finish()).unwrap();
        drop(writer);
        bytes
    }

    fn stream() -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = StreamWriter::try_new(&mut bytes, &batch().schema()).unwrap();
        writer.write(&batch()).and_then(|()| writer.finish()).unwrap();
        drop(writer);
        bytes
    }

    fn on_disk(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file
    }

    #[test]
    fn what_the_library_writes_is_believed_and_read_from_where_it_was() {
        let mut written = on_disk(&file());
        check_file(&mut written).unwrap();
        assert_eq!(
            FileReader::try_new(written, None).unwrap().map(|b| b.unwrap().num_rows()).sum::<usize>(),
            2
        );
        let mut written = on_disk(&stream());
        check_stream(&mut written).unwrap();
        assert_eq!(
            StreamReader::try_new(written, None).unwrap().map(|b| b.unwrap().num_rows()).sum::<usize>(),
            2
        );
    }

    #[test]
    fn a_batch_that_claims_gigabytes_is_refused() {
        let sound = file();
        // The packed texts: their length before packing, then zstd's magic.
        let claim = [&5001i64.to_le_bytes()[..], &[0x28, 0xb5, 0x2f, 0xfd]].concat();
        let at = sound.windows(claim.len()).position(|window| window == claim).unwrap();
        let mut bytes = sound;
        bytes[at..at + 8].copy_from_slice(&(1i64 << 40).to_le_bytes());
        let error = check_file(&mut on_disk(&bytes)).unwrap_err().to_string();
        assert!(error.contains("says that it unpacks to"), "{error}");
    }

    #[test]
    fn what_would_lie_outside_of_the_file_is_refused() {
        for cut in [0, 5, 20, 100] {
            let (file, stream) = (file(), stream());
            assert!(check_file(&mut on_disk(&file[..file.len() - cut - 1])).is_err());
            // Without its end mark a stream is whole as well.
            assert!(check_stream(&mut on_disk(&stream[..stream.len() - cut - 9])).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_damage_is_an_answer(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5)) {
            for (sound, check) in [(file(), check_file as fn(&mut File) -> _), (stream(), check_stream)] {
                let mut bytes = sound;
                for (place, value) in &edits {
                    let place = place.index(bytes.len());
                    bytes[place] = *value;
                }
                let _ = check(&mut on_disk(&bytes));
            }
        }
    }
}
