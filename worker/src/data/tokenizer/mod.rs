//! `tokenizer.json`: text to tokens and back, and the control tokens of infilling.
//!
//! File text is untrusted: a literal `<fim_prefix>` in a document is text, not control.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use tunefleet_proto::digest_hex;

use super::byte_level::{Added, ByteLevel};
use super::guarded;
use super::infill::{BORDERS, FimTokens, TEMPLATES};

/// Control tokens, and text around them.
mod specials;

pub use specials::{Place, Special};

/// File name of a tokenizer inside a directory.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// Settings beside it; only `eos_token` is read.
pub const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";

/// Largest file that is read.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// End of text where `tokenizer_config.json` does not name it.
const DEFAULT_EOS: &str = "<|endoftext|>";
/// A character that no vocabulary has with text around it as one token.
const ANCHOR: &str = "\u{263a}";

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is missing, unreadable or cannot be written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not a tokenizer.
    #[error("{}: {problem}; it must be a tokenizer.json of Hugging Face tokenizers", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Infilling was asked for with a vocabulary that cannot express it.
    #[error(
        "{}: no fill-in-the-middle tokens: {missing} must each be one special token; \
         use a tokenizer that has them, train one, or set data.fim_rate to 0",
        path.display()
    )]
    NoFimTokens {
        /// The file.
        path: PathBuf,
        /// The markers that are absent or not one token.
        missing: String,
    },
    /// A setting asks for marks that the vocabulary lacks.
    #[error(
        "{}: {setting} needs {missing}, which must each be one special token; use a tokenizer that has them, or \
         change the setting",
        path.display()
    )]
    NoMark {
        /// The file.
        path: PathBuf,
        /// The setting, as it is written.
        setting: &'static str,
        /// The marks that are absent.
        missing: String,
    },
    /// No token ends a document.
    #[error("{}: end-of-text token `{token}` is not in the vocabulary; name another as eos_token in {TOKENIZER_CONFIG_FILE} beside it", path.display())]
    NoEos {
        /// The file.
        path: PathBuf,
        /// The name looked for.
        token: String,
    },
    /// The tokenizer failed on a text.
    #[error("{}: cannot encode or decode: {problem}", path.display())]
    Text {
        /// The file.
        path: PathBuf,
        /// What it said.
        problem: String,
    },
    /// The vocabulary asked for has no room for what it must hold.
    #[error(
        "a vocabulary of {asked} tokens is too small; special tokens and bytes alone are {least}, raise it"
    )]
    VocabularyTooSmall {
        /// What was asked for.
        asked: u32,
        /// The least that works.
        least: usize,
    },
    /// Training failed.
    #[error("tokenizer training failed: {0}")]
    Training(String),
    /// The texts to train on cannot be read.
    #[error(transparent)]
    Dataset(#[from] super::documents::Error),
}

/// A loaded `tokenizer.json`.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    path: PathBuf,
    /// Special tokens in the input become control tokens.
    control: tokenizers::Tokenizer,
    /// The same vocabulary; special tokens in the input are text.
    plain: tokenizers::Tokenizer,
    /// The same again, faster, where the vocabulary is of its kind.
    byte_level: Option<Arc<ByteLevel>>,
    fim: Result<FimTokens, String>,
    eos: u32,
    /// What a text begins with, where the vocabulary has such a token.
    bos: Option<u32>,
    /// Tokens of [`ANCHOR`], where a text that begins gets a space of its own: it must not get one in the middle.
    anchor: Option<Vec<u32>>,
    /// Whether text behind a control token is as at the beginning.
    begins_behind: bool,
    vocab_size: u64,
    digest: String,
    /// Control tokens that were asked for beside those of the file.
    special_tokens: Vec<String>,
}

impl Tokenizer {
    /// Loads a `tokenizer.json`, or the one in a directory.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn load(path: &Path) -> Result<Self, Error> {
        Self::load_with(path, &[])
    }

    /// As [`load`](Self::load), with control tokens that are added where they are not there.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn load_with(path: &Path, special_tokens: &[String]) -> Result<Self, Error> {
        let path = if path.is_dir() { path.join(TOKENIZER_FILE) } else { path.to_owned() };
        let bytes = read_limited(&path)?;
        let eos = eos_name(&path)?;
        let parsed = parse(&bytes, &eos, special_tokens);
        let (control, byte_level) =
            parsed.map_err(|problem| Error::Invalid { path: path.clone(), problem })?;
        let eos_name = eos;
        let Some(eos) = control.token_to_id(&eos_name) else {
            return Err(Error::NoEos { path, token: eos_name });
        };
        let mut plain = control.clone();
        plain.set_encode_special_tokens(true);
        let vocab_size = control.get_vocab(true).into_values().max().map_or(0, |id| u64::from(id) + 1);
        let fim = find_markers(&control);
        let framed = guarded(|| control.encode_fast("", true)).map(|encoding| encoding.get_ids().to_vec());
        let bos = framed.ok().and_then(|ids| ids.first().copied()).filter(|first| *first != eos);
        let anchor = anchor(&plain);
        let begins_behind = begins_behind(&control, &plain, &eos_name);
        let digest = match special_tokens {
            [] => digest_hex(&bytes),
            added => digest_hex(&[&bytes, added.join("\n").as_bytes()].concat()),
        };
        Ok(Tokenizer {
            path,
            control,
            plain,
            byte_level,
            fim,
            eos,
            bos,
            anchor,
            begins_behind,
            vocab_size,
            digest,
            special_tokens: special_tokens.to_vec(),
        })
    }

    /// The markers of infilling.
    ///
    /// # Errors
    /// [`Error::NoFimTokens`] when the vocabulary lacks one.
    pub fn fim(&self) -> Result<FimTokens, Error> {
        self.fim.clone().map_err(|missing| Error::NoFimTokens { path: self.path.clone(), missing })
    }

    /// The tokens of special marks that `setting` needs.
    ///
    /// # Errors
    /// [`Error::NoMark`] when the vocabulary lacks one.
    pub fn marks<const N: usize>(&self, marks: [&str; N], setting: &'static str) -> Result<[u32; N], Error> {
        let added = self.control.get_added_tokens_decoder();
        let is_special = |id: &u32| added.get(id).is_some_and(|token| token.special);
        let found = marks.map(|mark| self.control.token_to_id(mark).filter(is_special));
        let missing: Vec<&str> =
            marks.iter().zip(&found).filter(|(_, id)| id.is_none()).map(|(mark, _)| *mark).collect();
        match missing.is_empty() {
            true => Ok(found.map(Option::unwrap_or_default)),
            false => Err(Error::NoMark { path: self.path.clone(), setting, missing: missing.join(", ") }),
        }
    }

    /// Ends a document.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// Begins a text, in vocabularies that have such a token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// What stands between two documents: the end of one, and the beginning of the next.
    pub fn border(&self) -> Vec<u32> {
        std::iter::once(self.eos).chain(self.bos).collect()
    }

    /// `tokens` as the beginning of a text, unless they begin one already.
    pub fn begun(&self, mut tokens: Vec<u32>) -> Vec<u32> {
        if let Some(bos) = self.bos.filter(|bos| tokens.first() != Some(bos)) {
            tokens.insert(0, bos);
        }
        tokens
    }

    /// Tokens before which a completion ends: ends of text, marks of infilling and borders of files.
    pub fn ends_of_completions(&self) -> Vec<u32> {
        let borders = BORDERS.iter().filter_map(|mark| self.marks([mark], "").ok()).flatten();
        let marks = self.fim.iter().flat_map(FimTokens::all);
        std::iter::once(self.eos).chain(self.bos).chain(marks).chain(borders).collect()
    }

    /// Highest id plus one: the rows that an embedding needs.
    pub fn vocab_size(&self) -> u64 {
        self.vocab_size
    }

    /// Why it cannot belong to a model whose embedding has so many rows.
    pub fn misfit(&self, rows: u64) -> Option<String> {
        let (path, tokens) = (self.path.display(), self.vocab_size);
        (tokens > rows).then(|| {
            format!(
                "{path}: the tokenizer has {tokens} tokens, the model's embedding {rows}: they do not belong together; \
                 a job of conversations leaves the model with its added tokens in `chat-model`, beside the adapter"
            )
        })
    }

    /// SHA-256 of the file, and of what was added to it.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Tokens of a file; special tokens spelt out in it are text.
    ///
    /// # Errors
    /// When the vocabulary cannot express the text.
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encode(text, Added::SpecialIsText, false)
    }

    /// Tokens of a text that stands in the middle of another; special tokens spelt out in it are text.
    ///
    /// # Errors
    /// When the vocabulary cannot express the text.
    pub fn encode_middle(&self, text: &str) -> Result<Vec<u32>, Error> {
        let Some(anchor) = &self.anchor else { return self.encode_document(text) };
        let mut tokens = self.encode_document(&format!("{ANCHOR}{text}"))?;
        match tokens.starts_with(anchor) {
            true => Ok(tokens.split_off(anchor.len())),
            false => self.encode_document(text),
        }
    }

    /// Tokens of a file as the original made them: special tokens spelt out in it become control tokens.
    ///
    /// # Errors
    /// When the vocabulary cannot express the text.
    pub fn encode_document_as_seed(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encode(text, Added::IsToken, true)
    }

    /// Tokens of a prompt; special tokens in it are control tokens.
    ///
    /// # Errors
    /// When the vocabulary cannot express the text.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encode(text, Added::IsToken, false)
    }

    fn encode(&self, text: &str, added: Added, frame: bool) -> Result<Vec<u32>, Error> {
        if let Some(tokens) = self.byte_level.as_ref().and_then(|fast| fast.encode(text, added, frame)) {
            return Ok(tokens);
        }
        let inner = if added == Added::SpecialIsText { &self.plain } else { &self.control };
        let encoding = guarded(|| inner.encode_fast(text, frame));
        encoding.map(|encoding| encoding.get_ids().to_vec()).map_err(|problem| self.text_error(problem))
    }

    /// Text of `tokens`, byte for byte: no clean-up of spaces. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// When the decoder refuses the tokens.
    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> Result<String, Error> {
        guarded(|| self.control.decode(tokens, skip_special)).map_err(|problem| self.text_error(problem))
    }

    /// Text of `tokens` that stand in the middle of others, in which a space at the beginning is one.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_middle(&self, tokens: &[u32], skip_special: bool) -> Result<String, Error> {
        let Some(anchor) = &self.anchor else { return self.decode(tokens, skip_special) };
        let text = self.decode(&[anchor.as_slice(), tokens].concat(), skip_special)?;
        match text.strip_prefix(ANCHOR) {
            Some(rest) => Ok(rest.to_owned()),
            None => self.decode(tokens, skip_special),
        }
    }

    fn text_error(&self, problem: String) -> Error {
        Error::Text { path: self.path.clone(), problem }
    }
}

fn read_limited(path: &Path) -> Result<Vec<u8>, Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path).map_err(io)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let problem = format!("larger than {MAX_FILE_BYTES} bytes");
        return Err(Error::Invalid { path: path.to_owned(), problem });
    }
    Ok(bytes)
}

/// `eos_token` of the settings beside the tokenizer: a string, or an object with `content`.
fn eos_name(tokenizer: &Path) -> Result<String, Error> {
    let path = tokenizer.with_file_name(TOKENIZER_CONFIG_FILE);
    if !path.exists() {
        return Ok(DEFAULT_EOS.to_owned());
    }
    let config: Value = serde_json::from_slice(&read_limited(&path)?)
        .map_err(|error| Error::Invalid { path: path.clone(), problem: error.to_string() })?;
    let token = config.get("eos_token");
    let name = token.and_then(|token| token.get("content").unwrap_or(token).as_str());
    Ok(name.unwrap_or(DEFAULT_EOS).to_owned())
}

/// Parses the file; the control tokens that we rely on are special whatever the file says.
fn parse(
    bytes: &[u8],
    eos: &str,
    special_tokens: &[String],
) -> Result<(tokenizers::Tokenizer, Option<Arc<ByteLevel>>), String> {
    let mut json: Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    specials::add(&mut json, special_tokens)?;
    for token in json.get_mut("added_tokens").and_then(Value::as_array_mut).into_iter().flatten() {
        let is_control = token.get("content").and_then(Value::as_str).is_some_and(|content| {
            content == eos || TEMPLATES.iter().any(|family| family.marks().any(|mark| mark == content))
        });
        if let (true, Some(special)) = (is_control, token.get_mut("special")) {
            *special = Value::Bool(true);
        }
    }
    let byte_level = ByteLevel::of(&json).map(Arc::new);
    let mut tokenizer = guarded(|| serde_json::from_value::<tokenizers::Tokenizer>(json))?;
    // A limit left in the file by its last user must not cut documents.
    tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
    tokenizer.with_padding(None);
    Ok((tokenizer, byte_level))
}

/// Tokens of [`ANCHOR`] at the beginning of a text, where what follows it is not as at the beginning.
fn anchor(plain: &tokenizers::Tokenizer) -> Option<Vec<u32>> {
    let ids =
        |text: &str| guarded(|| plain.encode_fast(text, false)).map(|encoding| encoding.get_ids().to_vec());
    let anchor = ids(ANCHOR).ok()?;
    let behind = ids(&format!("{ANCHOR}a")).ok()?;
    let alone = ids("a").ok()?;
    let rest = behind.strip_prefix(anchor.as_slice())?;
    (rest != alone.as_slice()).then_some(anchor)
}

/// Whether text behind a control token becomes what it is at the beginning.
fn begins_behind(control: &tokenizers::Tokenizer, plain: &tokenizers::Tokenizer, eos: &str) -> bool {
    let ids = |tokenizer: &tokenizers::Tokenizer, text: &str| {
        guarded(|| tokenizer.encode_fast(text, false)).map(|encoding| encoding.get_ids().to_vec())
    };
    match (ids(control, &format!("{eos}a")), ids(plain, "a")) {
        (Ok(behind), Ok(alone)) => behind.get(1..) == Some(alone.as_slice()),
        _ => true,
    }
}

/// The marks of the first family that is whole, else what the family that comes nearest lacks.
fn find_markers(tokenizer: &tokenizers::Tokenizer) -> Result<FimTokens, String> {
    let single = |mark: &str| {
        let id = tokenizer.token_to_id(mark)?;
        let encoding = guarded(|| tokenizer.encode_fast(mark, false)).ok()?;
        (encoding.get_ids() == [id]).then_some(id)
    };
    let mut least: Vec<&str> = Vec::new();
    for family in TEMPLATES {
        match family.find(single) {
            Ok(tokens) => return Ok(tokens),
            Err(missing) if least.is_empty() || missing.len() < least.len() => least = missing,
            Err(_) => {}
        }
    }
    Err(least.join(", "))
}
