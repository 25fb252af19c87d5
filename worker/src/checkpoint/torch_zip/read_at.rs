//! Bytes at offsets: of a file, or of memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// What a [`Reader`](super::Reader) reads from; it asks for the bytes that it needs and no others.
pub trait ReadAt: Send + Sync {
    /// Length in bytes.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    fn bytes(&self) -> io::Result<u64>;

    /// Fills `into` from byte `offset` on.
    ///
    /// # Errors
    /// An end before `into` is full; whatever the file system refuses.
    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, into, offset)
    }
}

impl ReadAt for Vec<u8> {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let begin = usize::try_from(offset).unwrap_or(usize::MAX);
        let held = self.get(begin..begin.saturating_add(into.len()));
        into.copy_from_slice(held.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}
