//! The files of a directory: what the hub asks about them, and their bytes as streams.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sha1::{Digest as _, Sha1};
use sha2::{Digest as _, Sha256};

use super::Error;
use super::api::UploadMode;
use super::progress::Progress;

/// Of a file's beginning, by which the hub decides where the file belongs.
const SAMPLE_BYTES: u64 = 512;
/// Largest file within a commit; the hub itself takes no more than 10 MB there.
const MAX_COMMITTED_BYTES: u64 = 20_000_000;
/// Hashed at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// A file that is pushed.
#[derive(Debug)]
pub(super) struct LocalFile {
    /// Where it is.
    pub(super) path: PathBuf,
    /// Its name in the directory and in the repository.
    pub(super) name: String,
    /// Its length.
    pub(super) bytes: u64,
    /// Its beginning.
    pub(super) sample: Vec<u8>,
    /// Digest of its content, in hex, once it has been hashed.
    pub(super) sha256: Option<String>,
}

/// The files in `dir`, by name; hidden ones stay at home.
pub(super) fn list(dir: &Path) -> Result<Vec<LocalFile>, Error> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        let metadata = std::fs::metadata(&path).map_err(Error::io(&path))?;
        if !metadata.is_file() || name.contains(char::REPLACEMENT_CHARACTER) {
            return Err(Error::file(&path, "only files with names in UTF-8 are pushed: move it away"));
        }
        let file = File::open(&path).map_err(Error::io(&path))?;
        let mut sample = Vec::new();
        file.take(SAMPLE_BYTES).read_to_end(&mut sample).map_err(Error::io(&path))?;
        files.push(LocalFile { path, name, bytes: metadata.len(), sample, sha256: None });
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    match files.is_empty() {
        true => Err(Error::file(dir, "holds no file to push")),
        false => Ok(files),
    }
}

impl LocalFile {
    /// Hashes the content, unless that was done before.
    pub(super) fn hash(&mut self, progress: &Progress) -> Result<(), Error> {
        if self.sha256.is_some() {
            return Ok(());
        }
        let mut file = File::open(&self.path).map_err(Error::io(&self.path))?;
        let (mut hash, mut chunk) = (Sha256::new(), vec![0; CHUNK_BYTES]);
        loop {
            let count = file.read(&mut chunk).map_err(Error::io(&self.path))?;
            if count == 0 {
                break;
            }
            hash.update(&chunk[..count]);
            progress.add(count as u64);
        }
        self.sha256 = Some(tunefleet_proto::hex(&hash.finalize()));
        Ok(())
    }

    /// What the hub calls this content: in the store its SHA-256, in a commit that of git's blob.
    pub(super) fn object_id(&self, mode: UploadMode) -> Result<String, Error> {
        match (mode, &self.sha256) {
            (UploadMode::Store, Some(sha256)) => Ok(sha256.clone()),
            (UploadMode::Store, None) => Err(Error::file(&self.path, "has not been hashed")),
            (UploadMode::Commit, _) => {
                let content = self.content()?;
                let mut hash = Sha1::new();
                hash.update(format!("blob {}\0", content.len()));
                hash.update(&content);
                Ok(tunefleet_proto::hex(&hash.finalize()))
            }
        }
    }

    /// The content of a file that goes into a commit.
    pub(super) fn content(&self) -> Result<Vec<u8>, Error> {
        if self.bytes > MAX_COMMITTED_BYTES {
            let rule = format!(
                "the hub wants it within a commit, but it has {} bytes and at most {MAX_COMMITTED_BYTES} can be: \
                 have .gitattributes of the repository put it into Git LFS",
                self.bytes
            );
            return Err(Error::file(&self.path, rule));
        }
        let file = File::open(&self.path).map_err(Error::io(&self.path))?;
        let mut content = Vec::new();
        file.take(MAX_COMMITTED_BYTES).read_to_end(&mut content).map_err(Error::io(&self.path))?;
        Ok(content)
    }

    /// The bytes in `range`, to be read once; `sent_bytes` counts them.
    pub(super) fn slice(
        &self,
        range: Range<u64>,
        progress: &Arc<Progress>,
        sent_bytes: &Arc<AtomicU64>,
    ) -> Result<Slice, Error> {
        let file = File::open(&self.path).map_err(Error::io(&self.path))?;
        Ok(Slice { file, range, progress: Arc::clone(progress), sent_bytes: Arc::clone(sent_bytes) })
    }
}

/// A range of a file, as a stream.
pub(super) struct Slice {
    file: File,
    range: Range<u64>,
    progress: Arc<Progress>,
    sent_bytes: Arc<AtomicU64>,
}

impl Read for Slice {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let rest_bytes = self.range.end.saturating_sub(self.range.start);
        let wanted = into.len().min(usize::try_from(rest_bytes).unwrap_or(usize::MAX));
        let count = self.file.read_at(&mut into[..wanted], self.range.start)?;
        if count == 0 && wanted > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file has become shorter"));
        }
        self.range.start += count as u64;
        self.sent_bytes.fetch_add(count as u64, Ordering::Relaxed);
        self.progress.add(count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_is_named_as_git_names_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.txt"), "hello\n").unwrap();
        let mut files = list(dir.path()).unwrap();
        // printf 'hello\n' | git hash-object --stdin
        let id = files[0].object_id(UploadMode::Commit).unwrap();
        assert_eq!(id, "ce013625030ba8dba906f756967f9e9ca394464a");
        assert!(files[0].object_id(UploadMode::Store).is_err());
        files[0].hash(&Progress::new("hashing", 6)).unwrap();
        let id = files[0].object_id(UploadMode::Store).unwrap();
        assert_eq!(id, "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03");
    }

    #[test]
    fn a_directory_without_files_or_with_another_in_it_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        assert!(list(dir.path()).unwrap_err().to_string().contains("holds no file"));
        std::fs::create_dir(dir.path().join(".git")).unwrap();
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert_eq!(list(dir.path()).unwrap().len(), 1);
        std::fs::create_dir(dir.path().join("logs")).unwrap();
        assert!(list(dir.path()).unwrap_err().to_string().contains("logs: only files"));
    }
}
