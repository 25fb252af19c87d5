//! What is in a dataset: every row is read against the manifest, and counted.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;
use tokenizers::Tokenizer;
use tunefleet_proto::chat::{Conversation, Message, Role};
use tunefleet_proto::dataset::{Manifest, Repository, Segment};

use super::{Error, manifest, reader};

/// Rows that are tokenised at once.
const WINDOW_ROWS: usize = 512;
/// Of a sample, this much is shown.
const SAMPLE_LINES: usize = 40;
const SAMPLE_CHARS: usize = 3000;
/// Rows of a table for people.
const TABLE_ROWS: usize = 20;

/// What the rows say.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Digest of the contents.
    pub digest: String,
    /// Program that wrote it.
    pub written_by: String,
    /// Learned from.
    pub train: Part,
    /// Held out.
    pub validation: Part,
    /// By extension, both splits together.
    pub extensions: BTreeMap<String, Part>,
    /// As the manifest has them.
    pub repositories: Vec<Repository>,
    /// By reason.
    pub dropped: BTreeMap<String, u64>,
    /// Keys, passwords and addresses, by kind.
    pub found: BTreeMap<String, u64>,
    /// Bytes of files.
    pub file_bytes: Lengths,
    /// Tokens of files, where a tokenizer was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_tokens: Option<Lengths>,
    /// Of conversations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conversations: Option<Conversations>,
    /// A few files, the same ones each time.
    pub samples: Vec<Sample>,
}

/// How long conversations are.
#[derive(Debug, Default, Serialize)]
pub struct Conversations {
    /// In how many the system says something.
    pub with_system: u64,
    /// Turns, the system's included.
    pub turns: Lengths,
    /// Characters of a user's turn.
    pub question_chars: Lengths,
    /// Characters of an assistant's turn.
    pub answer_chars: Lengths,
}

/// Some files.
#[derive(Debug, Default, Serialize)]
pub struct Part {
    /// How many.
    pub files: u64,
    /// Bytes of text.
    pub content_bytes: u64,
    /// Tokens, where a tokenizer was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
}

/// How long files are.
#[derive(Debug, Default, Serialize)]
pub struct Lengths {
    /// Half are not longer.
    pub median: u64,
    /// Nine of ten are not longer.
    pub p90: u64,
    /// Ninety-nine of a hundred are not longer.
    pub p99: u64,
    /// The longest.
    pub longest: u64,
    /// Files of at least 2^n and fewer than 2^(n+1), by n.
    pub by_power: BTreeMap<u32, u64>,
}

/// The beginning of a file.
#[derive(Debug, Serialize)]
pub struct Sample {
    /// Where it is from.
    pub repo_id: String,
    /// Its path there.
    pub file_path: String,
    /// Its first lines.
    pub text: String,
    /// Whether that is all of it.
    pub is_whole: bool,
}

/// Reads everything; the first segment that is not as recorded ends it.
pub fn read(dir: &Path, tokenizer: Option<&Path>, samples: usize) -> Result<(Manifest, Report), Error> {
    let tokenizer = tokenizer.map(load).transpose()?;
    let manifest = manifest::read(dir)?;
    let is_chat = manifest.settings.get("kind").and_then(|kind| kind.as_str()) == Some("chat");
    let chats = is_chat.then(Chats::default);
    let mut counting = Counting { tokenizer, wanted: samples, chats, ..Counting::default() };
    let train = counting.part(dir, &manifest.train)?;
    let validation = counting.part(dir, &manifest.validation)?;
    let report = Report {
        digest: manifest.digest(),
        written_by: manifest.written_by.clone(),
        train,
        validation,
        extensions: counting.extensions,
        repositories: manifest.repositories.clone(),
        dropped: manifest.dropped.clone(),
        found: manifest.found.clone(),
        file_bytes: Lengths::of(counting.bytes),
        file_tokens: counting.tokenizer.is_some().then(|| Lengths::of(counting.tokens)),
        conversations: counting.chats.map(Chats::told),
        samples: counting.samples.into_values().collect(),
    };
    Ok((manifest, report))
}

fn load(path: &Path) -> Result<Tokenizer, Error> {
    let file = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
    Tokenizer::from_file(&file).map_err(|error| Error::Tokenizer { path: file, detail: error.to_string() })
}

#[derive(Default)]
struct Counting {
    tokenizer: Option<Tokenizer>,
    wanted: usize,
    extensions: BTreeMap<String, Part>,
    bytes: Vec<u32>,
    tokens: Vec<u32>,
    /// Where rows are conversations.
    chats: Option<Chats>,
    /// By a number that looks drawn at random: the lowest stay.
    samples: BTreeMap<String, Sample>,
    /// Extensions and texts whose tokens are not counted yet.
    window: Vec<(String, String)>,
}

/// Lengths of the conversations so far.
#[derive(Default)]
struct Chats {
    with_system: u64,
    turns: Vec<u32>,
    questions: Vec<u32>,
    answers: Vec<u32>,
}

impl Chats {
    fn add(&mut self, content: &str) {
        // What is none is told where it is learnt from, by its name.
        let Ok(conversation) = Conversation::from_json(content) else { return };
        let length = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        self.turns.push(length(conversation.messages().len()));
        for Message { role, content } in conversation.messages() {
            let chars = length(content.chars().count());
            match role {
                Role::System => self.with_system += 1,
                Role::User => self.questions.push(chars),
                Role::Assistant => self.answers.push(chars),
            }
        }
    }

    fn told(self) -> Conversations {
        Conversations {
            with_system: self.with_system,
            turns: Lengths::of(self.turns),
            question_chars: Lengths::of(self.questions),
            answer_chars: Lengths::of(self.answers),
        }
    }
}

impl Counting {
    fn part(&mut self, dir: &Path, segments: &[Segment]) -> Result<Part, Error> {
        let mut part = Part::default();
        let mut failed = None;
        for segment in segments {
            reader::read(dir, segment, |row| {
                let bytes = row.content.len() as u64;
                part.files += 1;
                part.content_bytes += bytes;
                self.bytes.push(u32::try_from(bytes).unwrap_or(u32::MAX));
                let name = row.file_path.rsplit('/').next().unwrap_or_default();
                let extension = match &mut self.chats {
                    Some(chats) => {
                        chats.add(row.content);
                        "chat".to_owned()
                    }
                    None => name.rsplit_once('.').map(|(_, ext)| ext.to_lowercase()).unwrap_or_default(),
                };
                let of_kind = self.extensions.entry(extension.clone()).or_default();
                of_kind.files += 1;
                of_kind.content_bytes += bytes;
                self.sample(row.repo_id, row.file_path, row.content);
                if self.tokenizer.is_some() && failed.is_none() {
                    self.window.push((extension, row.content.to_owned()));
                    if self.window.len() >= WINDOW_ROWS {
                        failed = self.count_tokens(&mut part).err();
                    }
                }
            })?;
        }
        match failed {
            Some(error) => Err(error),
            None => self.count_tokens(&mut part).map(|()| part),
        }
    }

    fn count_tokens(&mut self, part: &mut Part) -> Result<(), Error> {
        let Some(tokenizer) = &self.tokenizer else { return Ok(()) };
        let window = std::mem::take(&mut self.window);
        let counts: Result<Vec<u64>, _> = window
            .par_iter()
            .map(|(_, text)| tokenizer.encode_fast(text.as_str(), false).map(|tokens| tokens.len() as u64))
            .collect();
        let counts = counts.map_err(|error| Error::Tokenizer {
            path: PathBuf::from("the tokenizer"),
            detail: error.to_string(),
        })?;
        for ((extension, _), count) in window.into_iter().zip(counts) {
            *part.tokens.get_or_insert(0) += count;
            if let Some(of_kind) = self.extensions.get_mut(&extension) {
                *of_kind.tokens.get_or_insert(0) += count;
            }
            self.tokens.push(u32::try_from(count).unwrap_or(u32::MAX));
        }
        Ok(())
    }

    fn sample(&mut self, repo_id: &str, file_path: &str, content: &str) {
        if self.wanted == 0 {
            return;
        }
        let key = tunefleet_proto::digest_hex(format!("{repo_id}\n{file_path}").as_bytes());
        let is_among = self.samples.len() < self.wanted
            || self.samples.last_key_value().is_some_and(|(last, _)| key < *last);
        if !is_among {
            return;
        }
        let lines: String = content.split_inclusive('\n').take(SAMPLE_LINES).collect();
        let text: String = lines.chars().take(SAMPLE_CHARS).collect();
        let is_whole = text.len() == content.len();
        let (repo_id, file_path) = (repo_id.to_owned(), file_path.to_owned());
        self.samples.insert(key, Sample { repo_id, file_path, text, is_whole });
        if self.samples.len() > self.wanted {
            self.samples.pop_last();
        }
    }
}

impl Lengths {
    fn of(mut lengths: Vec<u32>) -> Self {
        lengths.sort_unstable();
        let at = |share: f64| {
            let index = (share * lengths.len() as f64).ceil() as usize;
            lengths.get(index.saturating_sub(1)).copied().map_or(0, u64::from)
        };
        let mut by_power = BTreeMap::new();
        for length in &lengths {
            *by_power.entry(length.checked_ilog2().unwrap_or(0)).or_default() += 1;
        }
        Lengths { median: at(0.5), p90: at(0.9), p99: at(0.99), longest: at(1.0), by_power }
    }
}

impl Report {
    /// Languages and lengths, for a terminal.
    pub fn tables(&self) -> String {
        let mut out = String::new();
        let chats = self.conversations.as_ref();
        let lengths = [
            ("file bytes", Some(&self.file_bytes)),
            ("file tokens", self.file_tokens.as_ref()),
            ("turns", chats.map(|chats| &chats.turns)),
            ("question", chats.map(|chats| &chats.question_chars)),
            ("answer", chats.map(|chats| &chats.answer_chars)),
        ];
        for (what, lengths) in lengths {
            if let Some(Lengths { median, p90, p99, longest, .. }) = lengths {
                let _ = writeln!(out, "{what:<12} median {median}, p90 {p90}, p99 {p99}, longest {longest}");
            }
        }
        let tokens = [&self.train, &self.validation].map(|part| part.tokens);
        if let [Some(train), validation] = tokens {
            let _ = writeln!(out, "tokens       train {train}, validation {}", validation.unwrap_or(0));
        }
        out.push_str("extension      files     content\n");
        let extensions = self.extensions_by_size();
        for (name, part) in extensions.iter().take(TABLE_ROWS) {
            let name = if name.is_empty() { "(none)" } else { name };
            let _ = writeln!(out, "{name:<12} {:>7} {:>11}", part.files, size(part.content_bytes));
        }
        if extensions.len() > TABLE_ROWS {
            let _ = writeln!(out, "and {} more", extensions.len() - TABLE_ROWS);
        }
        out
    }

    /// Extensions, those with most text first.
    pub fn extensions_by_size(&self) -> Vec<(&str, &Part)> {
        let mut extensions: Vec<_> =
            self.extensions.iter().map(|(name, part)| (name.as_str(), part)).collect();
        extensions.sort_by_key(|(name, part)| (std::cmp::Reverse(part.content_bytes), *name));
        extensions
    }
}

/// A manifest in a few lines.
pub fn summary(manifest: &Manifest) -> String {
    let width = manifest.repositories.iter().map(|r| r.repo_id.chars().count()).max().unwrap_or(0).max(10);
    let mut out =
        format!("{:<width$} {:<12} {:>7} {:>11}  licence\n", "repository", "commit", "files", "content");
    for repository in &manifest.repositories {
        let commit = repository.commit.get(..12).unwrap_or(&repository.commit);
        let (files, bytes) = (repository.files, size(repository.bytes));
        let licenses = repository.licenses.join(", ");
        let line = format!("{:<width$} {commit:<12} {files:>7} {bytes:>11}  {licenses}", repository.repo_id);
        let _ = writeln!(out, "{}", line.trim_end());
    }
    let counts = |of: &BTreeMap<String, u64>| match of.is_empty() {
        true => "none".to_owned(),
        false => of.iter().map(|(what, count)| format!("{what} {count}")).collect::<Vec<_>>().join(", "),
    };
    let _ = writeln!(out, "train        {}", split_line(&manifest.train));
    let _ = writeln!(out, "validation   {}", split_line(&manifest.validation));
    let _ = writeln!(out, "dropped      {}", counts(&manifest.dropped));
    let _ = writeln!(out, "secrets      {}", counts(&manifest.found));
    let _ = writeln!(out, "digest       {}", manifest.digest());
    out
}

fn split_line(segments: &[Segment]) -> String {
    let rows: u64 = segments.iter().map(|s| s.rows).sum();
    let bytes: u64 = segments.iter().map(|s| s.bytes).sum();
    let plural = if segments.len() == 1 { "" } else { "s" };
    format!("{rows} files in {} segment{plural}, {}", segments.len(), size(bytes))
}

/// Bytes for people.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} B"),
        10_000..10_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_told_by_their_order() {
        let lengths = Lengths::of((1..=100).collect());
        assert_eq!((lengths.median, lengths.p90, lengths.p99, lengths.longest), (50, 90, 99, 100));
        assert_eq!(lengths.by_power[&6], 37);
        assert_eq!(Lengths::of(Vec::new()).longest, 0);
        assert_eq!(Lengths::of(vec![0, 1]).by_power[&0], 2);
    }
}
