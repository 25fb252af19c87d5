//! The tokens of a split, made once per (dataset, tokenizer, split, layout) and read by position.
//!
//! One file: header, tokens of all documents end to end (2 or 4 bytes each, little-endian), then
//! per document the end of its tokens and a measure of it (8 bytes each), see
//! [`Renderer::measure`]. Memory holds only the latter. The header carries a SHA-256 of all that follows; a file that fails it is made anew.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rayon::prelude::*;
use sha2::{Digest, Sha256};
use tunefleet_proto::digest_hex;

use super::documents::{self, Dataset, Row, Rows};
use super::render::{self, Layout, Renderer};
use super::tokenizer::{self, Tokenizer};
use super::{Split, hash_stream};

/// First bytes of a token file; the digit is the version of the layout.
const MAGIC: [u8; 8] = *b"TFTOKEN1";
/// Magic, token width, documents, tokens (8 bytes each), key, digest (32 bytes each).
const HEADER_BYTES: u64 = 96;
/// Text that is tokenised in one parallel run.
const CHUNK_BYTES: usize = 16 << 20;

/// Why the cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read or written.
    #[error("token cache {}: {source}; free space or choose another output directory", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The documents cannot be read.
    #[error(transparent)]
    Documents(#[from] documents::Error),
    /// The vocabulary lacks what the layout needs.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    /// A document cannot be tokenised.
    #[error(transparent)]
    Row(#[from] render::Error),
}

/// An open token file.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    file: File,
    token_bytes: usize,
    /// End of each document in tokens.
    ends: Vec<u64>,
    /// A measure of each document.
    measures: Vec<u64>,
}

impl TokenFile {
    /// Opens the file of a split, made first where it is absent. Processes on one machine that
    /// ask for the same file at once make it once: the others wait on its lock.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(
        dataset: &Dataset,
        tokenizer: &Tokenizer,
        split: Split,
        layout: Layout<'_>,
        cache_dir: &Path,
    ) -> Result<Self, Error> {
        let inputs = [&dataset.digest(), tokenizer.digest(), split.name(), &layout.key(dataset)].join("\n");
        let key: [u8; 32] = Sha256::digest(inputs.as_bytes()).into();
        let name = digest_hex(inputs.as_bytes()).chars().take(16).collect::<String>();
        let path = cache_dir.join(format!("{}-{name}.tokens", split.name()));
        let io = |path: &Path, source| Error::Io { path: path.to_owned(), source };

        if let Some(tokens) = read(&path, &key).map_err(|source| io(&path, source))? {
            return Ok(tokens);
        }
        std::fs::create_dir_all(cache_dir).map_err(|source| io(cache_dir, source))?;
        let lock_path = path.with_extension("lock");
        let lock = File::create(&lock_path).map_err(|source| io(&lock_path, source))?;
        lock.lock().map_err(|source| io(&lock_path, source))?;
        if let Some(tokens) = read(&path, &key).map_err(|source| io(&path, source))? {
            return Ok(tokens);
        }
        if path.exists() {
            tracing::warn!(path = %path.display(), "the token cache is damaged; making it anew");
        }
        let incomplete = path.with_extension("incomplete");
        let renderer = Renderer::new(dataset, tokenizer, layout)?;
        let token_bytes = match layout {
            Layout::Code { .. } => token_bytes(tokenizer),
            Layout::Chat(_) => 4,
        };
        let made = Builder::new(&incomplete, renderer, token_bytes)
            .and_then(|builder| builder.build(dataset, split, &key))
            .and_then(|()| std::fs::rename(&incomplete, &path).map_err(|source| io(&path, source)));
        if let Err(error) = made {
            let _ = std::fs::remove_file(&incomplete);
            return Err(error);
        }
        match read(&path, &key) {
            Ok(Some(tokens)) => Ok(tokens),
            Ok(None) => Err(io(&path, std::io::Error::other("what was read is not what was written"))),
            Err(source) => Err(io(&path, source)),
        }
    }

    /// Number of documents.
    pub fn documents(&self) -> u64 {
        self.ends.len() as u64
    }

    /// Tokens of a document; 0 for one that does not exist.
    pub fn len(&self, document: u64) -> u64 {
        let span = self.span(document);
        span.end - span.start
    }

    /// The measure of a document, see [`Renderer::measure`]; 0 for one that does not exist.
    pub fn measure(&self, document: u64) -> u64 {
        self.measures.get(document as usize).copied().unwrap_or(0)
    }

    /// Appends tokens `range` of a document; a range past its end is cut there.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(&self, document: u64, range: Range<u64>, out: &mut Vec<u32>) -> Result<(), Error> {
        let span = self.span(document);
        let begin = span.end.min(span.start.saturating_add(range.start));
        let end = span.end.min(span.start.saturating_add(range.end)).max(begin);
        let mut bytes = vec![0u8; (end - begin) as usize * self.token_bytes];
        let position = HEADER_BYTES + begin * self.token_bytes as u64;
        self.file
            .read_exact_at(&mut bytes, position)
            .map_err(|source| Error::Io { path: self.path.clone(), source })?;
        if self.token_bytes == 2 {
            out.extend(bytes.as_chunks().0.iter().map(|token| u32::from(u16::from_le_bytes(*token))));
        } else {
            out.extend(bytes.as_chunks().0.iter().map(|token| u32::from_le_bytes(*token)));
        }
        Ok(())
    }

    fn span(&self, document: u64) -> Range<u64> {
        let at = |i: u64| self.ends.get(i as usize).copied();
        let start = document.checked_sub(1).and_then(at).unwrap_or(0);
        start..at(document).unwrap_or(start)
    }
}

/// Opens and verifies; None when the file is absent, damaged or of other inputs.
fn read(path: &Path, key: &[u8; 32]) -> std::io::Result<Option<TokenFile>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let file_bytes = file.metadata()?.len();
    let mut reader = BufReader::with_capacity(1 << 20, &file);
    let mut header = [0u8; HEADER_BYTES as usize];
    if file_bytes < HEADER_BYTES {
        return Ok(None);
    }
    reader.read_exact(&mut header)?;
    let Some(Header { token_bytes, documents, tokens, digest }) = Header::decode(&header, key) else {
        return Ok(None);
    };
    let token_total = tokens.checked_mul(token_bytes);
    let index_total = documents.checked_mul(16);
    let (Some(token_total), Some(index_total)) = (token_total, index_total) else { return Ok(None) };
    let body = token_total.checked_add(index_total).and_then(|body| body.checked_add(HEADER_BYTES));
    if body != Some(file_bytes) {
        return Ok(None);
    }
    let mut hasher = Sha256::new();
    hash_stream((&mut reader).take(token_total), &mut hasher)?;
    let mut index = Vec::new();
    reader.read_to_end(&mut index)?;
    hasher.update(&index);
    if <[u8; 32]>::from(hasher.finalize()) != digest {
        return Ok(None);
    }
    let mut words = index.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
    let ends: Vec<u64> = words.by_ref().take(documents as usize).collect();
    let measures = words.collect();
    drop(reader);
    Ok(Some(TokenFile { path: path.to_owned(), file, token_bytes: token_bytes as usize, ends, measures }))
}

struct Header {
    token_bytes: u64,
    documents: u64,
    tokens: u64,
    digest: [u8; 32],
}

impl Header {
    fn encode(&self, key: &[u8; 32]) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        for word in [self.token_bytes, self.documents, self.tokens] {
            out.extend(word.to_le_bytes());
        }
        out.extend(key);
        out.extend(self.digest);
        out
    }

    /// None when magic, width or key is another.
    fn decode(bytes: &[u8; HEADER_BYTES as usize], key: &[u8; 32]) -> Option<Self> {
        let (words, digests) = bytes.split_at_checked(32)?;
        let [magic, token_bytes, documents, tokens] = words.as_chunks::<8>().0 else { return None };
        let [found_key, digest] = digests.as_chunks::<32>().0 else { return None };
        let token_bytes = u64::from_le_bytes(*token_bytes);
        let known = *magic == MAGIC && found_key == key && [2, 4].contains(&token_bytes);
        known.then(|| Header {
            token_bytes,
            documents: u64::from_le_bytes(*documents),
            tokens: u64::from_le_bytes(*tokens),
            digest: *digest,
        })
    }
}

/// Writes a token file.
struct Builder<'a> {
    path: &'a Path,
    renderer: Renderer<'a>,
    token_bytes: usize,
    out: BufWriter<File>,
    hasher: Sha256,
    ends: Vec<u64>,
    measures: Vec<u64>,
    tokens: u64,
}

impl<'a> Builder<'a> {
    fn new(path: &'a Path, renderer: Renderer<'a>, token_bytes: usize) -> Result<Self, Error> {
        let file = File::create(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        Ok(Builder {
            path,
            renderer,
            token_bytes,
            out: BufWriter::with_capacity(1 << 20, file),
            hasher: Sha256::new(),
            ends: Vec::new(),
            measures: Vec::new(),
            tokens: 0,
        })
    }

    fn build(mut self, dataset: &Dataset, split: Split, key: &[u8; 32]) -> Result<(), Error> {
        let began = Instant::now();
        self.write(&[0; HEADER_BYTES as usize])?;
        self.hasher = Sha256::new();
        for rows in dataset.rows(split) {
            self.add(&rows?)?;
        }
        let index = [std::mem::take(&mut self.ends), std::mem::take(&mut self.measures)];
        let documents = index[0].len() as u64;
        for word in index.iter().flatten() {
            self.write(&word.to_le_bytes())?;
        }
        let io = |source| Error::Io { path: self.path.to_owned(), source };
        let file = self.out.into_inner().map_err(|error| io(error.into_error()))?;
        let header = Header {
            token_bytes: self.token_bytes as u64,
            documents,
            tokens: self.tokens,
            digest: self.hasher.finalize().into(),
        };
        file.write_all_at(&header.encode(key), 0).map_err(io)?;
        let seconds = began.elapsed().as_secs_f64();
        tracing::info!(split = split.name(), documents, tokens = self.tokens, seconds, "tokenised");
        Ok(())
    }

    /// Tokenises the rows of a batch in parallel, chunk by chunk, and writes them in order.
    fn add(&mut self, rows: &Rows) -> Result<(), Error> {
        let mut next = 0;
        while next < rows.len() {
            let mut bytes = 0;
            let chunk: Vec<Row<'_>> = (next..rows.len())
                .map(|index| rows.row(index))
                .take_while(|row| {
                    let first = bytes == 0;
                    bytes += row.content.len() + 1;
                    first || bytes <= CHUNK_BYTES
                })
                .collect();
            next += chunk.len();
            let renderer = &self.renderer;
            let encode = |row: &Row<'_>| {
                let tokens = renderer.tokens(*row)?;
                Ok::<_, render::Error>((renderer.measure(*row, &tokens), tokens))
            };
            let encoded: Vec<(u64, Vec<u32>)> = chunk.par_iter().map(encode).collect::<Result<_, _>>()?;
            for (measure, tokens) in encoded {
                let mut out = Vec::with_capacity(tokens.len() * self.token_bytes);
                if self.token_bytes == 2 {
                    out.extend(tokens.iter().flat_map(|token| (*token as u16).to_le_bytes()));
                } else {
                    out.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
                }
                self.write(&out)?;
                self.tokens += tokens.len() as u64;
                self.ends.push(self.tokens);
                self.measures.push(measure);
            }
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.hasher.update(bytes);
        self.out.write_all(bytes).map_err(|source| Error::Io { path: self.path.to_owned(), source })
    }
}

/// Two bytes where every id fits.
fn token_bytes(tokenizer: &Tokenizer) -> usize {
    if tokenizer.vocab_size() <= 1 << 16 { 2 } else { 4 }
}
