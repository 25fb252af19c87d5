//! What is asked of every model alike: files and holes of a dataset, chosen by their names and a seed. What a model answers
//! is kept as it comes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use serde_json::{Value, json};
use tunefleet_proto::chat::Conversation;
use tunefleet_proto::digest_hex;
use tunefleet_proto::evaluation::{Evaluation, FileLoss, Filled, HOLES_FILE, Item, Kind};
use tunefleet_proto::job::ChatLoss;

use super::contamination::Seen;
use super::holes::{self, Draws, HoleKind};
use super::{Questions, languages};
use crate::chat::{self, Chat, Token};
use crate::data::documents::{Dataset, Row};
use crate::data::{IGNORED, Split};
use crate::evaluate::functional::work::Share;
use crate::evaluate::log::{self, Log};
use crate::evaluate::progress::Progress;
use crate::evaluate::report::{self, Found};
use crate::evaluate::subject::{Ask, Made, Subject};
use crate::evaluate::{Error, text};
use crate::generate::prompt::infill;
use crate::generate::sampling::Sampling;
use crate::serve::stop::Rules;

/// Losses of files.
const LOSSES_FILE: &str = "losses.jsonl";
/// Of a file, this much around a hole is kept on either side: more than any context takes.
const AROUND_BYTES: usize = 32 << 10;
/// Tokens of a window where the model has positions for more.
const WINDOW_TOKENS: usize = 2048;
/// Files that are held for each that is wanted: some were trained on, and some have no place for a hole.
const SPARE_FACTOR: usize = 4;
/// The largest file that is looked at.
const MAX_FILE_BYTES: usize = 1 << 20;

/// A held-out file.
#[derive(Debug, Clone)]
struct HeldOut {
    repo_id: String,
    file_path: String,
    content: String,
}

/// A hole with the text around it.
#[derive(Debug, Clone)]
struct Hole {
    kind: HoleKind,
    repo_id: String,
    file_path: String,
    /// First byte in the file.
    at: usize,
    before: String,
    truth: String,
    after: String,
}

/// What the model is asked, the same for every model.
#[derive(Debug)]
pub struct Exam {
    /// Whether the files are conversations, of which what the assistant says counts.
    is_chat: bool,
    files: Vec<HeldOut>,
    holes: Vec<Hole>,
    contaminated: u64,
    digest: String,
}

/// The held-out files that come first, whatever the order in which they are met.
struct Candidates {
    seed: u64,
    most: usize,
    by_priority: BTreeMap<(u64, String, String), String>,
}

impl Candidates {
    fn new(questions: &Questions) -> Self {
        let wanted = questions.files.max(questions.holes);
        Candidates {
            seed: questions.seed,
            most: wanted.saturating_mul(SPARE_FACTOR).max(1),
            by_priority: BTreeMap::new(),
        }
    }

    fn consider(&mut self, row: &Row<'_>) {
        if row.content.len() > MAX_FILE_BYTES || row.content.trim().is_empty() {
            return;
        }
        let priority = Draws::of(self.seed, row.repo_id, row.file_path).priority;
        let key = (priority, row.repo_id.to_owned(), row.file_path.to_owned());
        self.by_priority.insert(key, row.content.to_owned());
        if self.by_priority.len() > self.most {
            self.by_priority.pop_last();
        }
    }

    fn first_first(self) -> Vec<HeldOut> {
        let file = |((_, repo_id, file_path), content)| HeldOut { repo_id, file_path, content };
        self.by_priority.into_iter().map(file).collect()
    }
}

impl Exam {
    /// Chooses files and holes.
    ///
    /// # Errors
    /// A dataset that cannot be read, or has no held-out files that were not trained on.
    pub fn open(questions: &Questions) -> Result<Self, Error> {
        let dataset = Dataset::open(&questions.dataset)?;
        let mut candidates = Candidates::new(questions);
        for rows in dataset.rows(Split::Validation) {
            let rows = rows?;
            (0..rows.len()).for_each(|at| candidates.consider(&rows.row(at)));
        }
        let candidates = candidates.first_first();
        let mut seen = Seen::default();
        for file in &candidates {
            seen.hold_out(&file.content);
        }
        let others =
            questions.trained_on.iter().map(|dir| Dataset::open(dir)).collect::<Result<Vec<_>, _>>()?;
        for trained_on in std::iter::once(&dataset).chain(&others) {
            for rows in trained_on.rows(Split::Train) {
                let rows = rows?;
                (0..rows.len()).for_each(|at| seen.pass_by(rows.row(at).content));
            }
        }
        let all = candidates.len();
        let clean = candidates.into_iter().enumerate().filter(|(number, _)| !seen.is_contaminated(*number));
        let mut held_out: Vec<HeldOut> = clean.map(|(_, file)| file).collect();
        let contaminated = (all - held_out.len()) as u64;
        if held_out.is_empty() {
            let dir = questions.dataset.display();
            return Err(Error::Setting(match all {
                0 => format!("{dir}: holds no held-out files: collect with a validation_fraction above 0"),
                _ => format!("{dir}: all {all} held-out files stand in what was trained on"),
            }));
        }
        let is_chat = dataset.is_chat();
        // A conversation has no hole.
        let holes = if is_chat { Vec::new() } else { choose_holes(&held_out, questions) };
        held_out.truncate(questions.files);
        let mut exam = Exam { is_chat, files: held_out, holes, contaminated, digest: String::new() };
        exam.digest = exam.digest();
        Ok(exam)
    }

    /// Asks a model everything, in this process, or goes on where an earlier start ended.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn hold(&self, questions: &Questions, subject: &Subject, out: &Path) -> Result<Evaluation, Error> {
        self.answer(questions, subject, out, Share::WHOLE)?;
        self.gather(questions, subject, &[out])
    }

    /// Asks a model a share of everything; what it answers is kept in `dir`.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn answer(
        &self,
        questions: &Questions,
        subject: &Subject,
        dir: &Path,
        share: Share,
    ) -> Result<(), Error> {
        let protocol = self.protocol(questions, subject);
        let mut settings = protocol;
        settings.insert("tasks_digest".to_owned(), json!(self.digest));
        settings.insert("subject".to_owned(), json!(subject.described));
        log::begin(dir, &settings)?;
        let window = window(questions, subject);
        self.losses(subject, window, dir, share)?;
        self.fill(questions, subject, window, dir, share)
    }

    /// What is kept in all of `dirs`, in the order of the questions.
    ///
    /// # Errors
    /// Files that are not what was written.
    pub fn gather(
        &self,
        questions: &Questions,
        subject: &Subject,
        dirs: &[&Path],
    ) -> Result<Evaluation, Error> {
        let (mut losses, mut filled) = (HashMap::new(), HashMap::new());
        for dir in dirs {
            let (_, found) = Log::<FileLoss>::open(&dir.join(LOSSES_FILE))?;
            losses.extend(found.into_iter().map(|loss| (loss.id.clone(), loss)));
            let (_, found) = Log::<Filled>::open(&dir.join(HOLES_FILE))?;
            filled.extend(found.into_iter().map(|entry| (entry.id.clone(), entry)));
        }
        let files = self.files.iter().filter_map(|file| losses.remove(&file.id())).collect();
        let mut found = Found { files, ..Found::default() };
        for hole in &self.holes {
            let Some(entry) = filled.remove(&hole.id()) else { continue };
            if entry.completion.trim().is_empty() {
                *found.notes.entry("completions that are empty".to_owned()).or_default() += 1;
            }
            found.items.push(Item {
                id: entry.id,
                kind: entry.kind,
                language: languages::of(&hole.file_path),
                repository: entry.repository,
                samples: 1,
                passed: None,
                exact: Some(u64::from(text::is_exact(&entry.completion, &hole.truth))),
                similarity: Some(text::similarity(&entry.completion, &hole.truth)),
            });
        }
        if self.contaminated > 0 {
            let note = "held-out files that stand in what was trained on, left out";
            found.notes.insert(note.to_owned(), self.contaminated);
        }
        let (described, protocol) = (subject.described.clone(), self.protocol(questions, subject));
        Ok(report::evaluation(Kind::Repository, described, protocol, self.digest.clone(), found))
    }

    fn protocol(&self, questions: &Questions, subject: &Subject) -> BTreeMap<String, Value> {
        BTreeMap::from([
            ("dataset".to_owned(), json!(questions.dataset)),
            ("files".to_owned(), json!(self.files.len())),
            ("holes".to_owned(), json!(self.holes.len())),
            ("order".to_owned(), json!(questions.order.name())),
            ("max_new_tokens".to_owned(), json!(questions.max_new_tokens)),
            ("window_tokens".to_owned(), json!(window(questions, subject))),
            ("seed".to_owned(), json!(questions.seed)),
        ])
    }

    /// Of all that is asked.
    fn digest(&self) -> String {
        let files = self.files.iter().map(|file| (&file.repo_id, &file.file_path, &file.content));
        let holes = self.holes.iter().map(|hole| (hole.id(), &hole.truth));
        let asked = json!([files.collect::<Vec<_>>(), holes.collect::<Vec<_>>()]);
        digest_hex(asked.to_string().as_bytes())
    }

    /// Each file by itself: after the token that ends files, its own tokens, and that token again.
    fn losses(&self, subject: &Subject, window: usize, dir: &Path, share: Share) -> Result<(), Error> {
        let (mut log, known) = Log::<FileLoss>::open(&dir.join(LOSSES_FILE))?;
        let known: HashSet<String> = known.into_iter().map(|loss| loss.id).collect();
        let files = self.files.iter().enumerate().filter(|(number, _)| share.has(*number));
        let files: Vec<&HeldOut> = files.map(|(_, file)| file).collect();
        let chat = match self.is_chat {
            true => {
                Some(Chat::of_tokenizer(&subject.tokenizer_dir, &subject.tokenizer, ChatLoss::Assistant)?)
            }
            false => None,
        };
        let progress = Progress::new("files", files.len(), known.len());
        for file in files.into_iter().filter(|file| !known.contains(&file.id())) {
            let (loss_sum, tokens) = match &chat {
                Some(chat) => loss_of_answers(&file.content, chat, subject, window)?,
                None => loss_of_file(&file.content, subject, window)?,
            };
            let language = if self.is_chat { "chat".to_owned() } else { languages::of(&file.file_path) };
            log.append(&FileLoss {
                id: file.id(),
                language,
                repository: file.repo_id.clone(),
                loss_sum,
                tokens,
            })?;
            progress.advance();
        }
        Ok(())
    }

    /// Asks for every hole that was not asked for yet.
    fn fill(
        &self,
        questions: &Questions,
        subject: &Subject,
        window: usize,
        dir: &Path,
        share: Share,
    ) -> Result<(), Error> {
        let (mut log, known) = Log::<Filled>::open(&dir.join(HOLES_FILE))?;
        let known: HashSet<String> = known.into_iter().map(|entry| entry.id).collect();
        let new_tokens = (questions.max_new_tokens as usize).min(window / 2);
        let holes = self.holes.iter().enumerate().filter(|(number, _)| share.has(*number));
        let holes: Vec<&Hole> = holes.map(|(_, hole)| hole).collect();
        let progress = Progress::new("holes", holes.len(), known.len());
        let mut asks = Vec::new();
        for hole in holes.into_iter().filter(|hole| !known.contains(&hole.id())) {
            let most = window - new_tokens;
            let prompt = infill(&subject.tokenizer, &hole.before, &hole.after, questions.order, most)?;
            let stops = if hole.kind == HoleKind::SingleLine { vec!["\n".to_owned()] } else { Vec::new() };
            let rules = Rules::strings(stops);
            asks.push((
                hole,
                Ask { prompt, max_new_tokens: new_tokens, sampling: Sampling::default(), rules },
            ));
        }
        subject.complete(asks.into_iter(), |hole: &Hole, made: Made| {
            log.append(&hole.filled(&made.text))?;
            progress.advance();
            Ok(())
        })
    }
}

/// Loss of all tokens of a file, window by window, and how many there are.
fn loss_of_file(content: &str, subject: &Subject, window: usize) -> Result<(f64, u64), Error> {
    let eos = subject.tokenizer.eos();
    let mut tokens = vec![subject.tokenizer.bos().unwrap_or(eos)];
    tokens.extend(subject.tokenizer.encode_document(content)?);
    tokens.push(eos);
    let mut loss_sum = 0.0;
    // Windows share a token: the last of one is the first of the next, which is not predicted again.
    for first in (0..tokens.len() - 1).step_by(window) {
        let last = (first + window).min(tokens.len() - 1);
        loss_sum += subject.loss_sum(tokens.get(first..=last).unwrap_or_default())?;
    }
    Ok((loss_sum, (tokens.len() - 1) as u64))
}

/// Loss of what the assistant says in the first window of a conversation, and how many tokens that is.
fn loss_of_answers(
    content: &str,
    chat: &Chat,
    subject: &Subject,
    window: usize,
) -> Result<(f64, u64), Error> {
    let conversation = Conversation::from_json(content).map_err(chat::Error::from)?;
    let mut tokens = chat.tokens(&conversation, &subject.tokenizer)?;
    tokens.truncate(window + 1);
    let target = |token: &Token| if token.is_target { i64::from(token.id) } else { IGNORED };
    let targets: Vec<i64> = tokens.iter().skip(1).map(target).collect();
    let count = targets.iter().filter(|target| **target != IGNORED).count() as u64;
    tokens.pop();
    let shown: Vec<u32> = tokens.iter().map(|token| token.id).collect();
    let loss_sum = if count == 0 { 0.0 } else { subject.loss_of(&shown, targets)? };
    Ok((loss_sum, count))
}

/// Tokens of a window of a file, and of a prompt.
fn window(questions: &Questions, subject: &Subject) -> usize {
    questions.window_tokens.map_or(WINDOW_TOKENS, |tokens| tokens as usize).min(subject.max_tokens())
}

impl HeldOut {
    fn id(&self) -> String {
        format!("{}/{}", self.repo_id, self.file_path)
    }
}

impl Hole {
    fn id(&self) -> String {
        format!("{}:{}/{}:{}", self.kind.name(), self.repo_id, self.file_path, self.at)
    }

    fn filled(&self, made: &str) -> Filled {
        let completion = match self.kind {
            HoleKind::CallArguments => text::to_closing_bracket(made),
            HoleKind::SingleLine | HoleKind::MultiLine | HoleKind::RandomSpan => made,
        };
        Filled {
            id: self.id(),
            kind: self.kind.name().to_owned(),
            repository: self.repo_id.clone(),
            path: self.file_path.clone(),
            before: self.before.clone(),
            truth: self.truth.clone(),
            completion: completion.to_owned(),
            after: self.after.clone(),
        }
    }
}

/// Of each kind, holes in as many different files as there are, the first files first.
fn choose_holes(files: &[HeldOut], questions: &Questions) -> Vec<Hole> {
    let mut holes = Vec::new();
    for kind in HoleKind::ALL {
        let found = files.iter().filter_map(|file| {
            // Each kind has draws of its own, so that one more kind would change no other.
            let mut draws =
                Draws::of(questions.seed, kind.name(), &format!("{}/{}", file.repo_id, file.file_path));
            let hole = holes::draw(kind, &file.content, &mut draws)?;
            Some(Hole {
                kind,
                repo_id: file.repo_id.clone(),
                file_path: file.file_path.clone(),
                at: hole.start,
                before: end_of(file.content.get(..hole.start)?).to_owned(),
                truth: file.content.get(hole.clone())?.to_owned(),
                after: beginning_of(file.content.get(hole.end..)?).to_owned(),
            })
        });
        holes.extend(found.take(questions.holes));
    }
    holes
}

fn end_of(text: &str) -> &str {
    let mut at = text.len().saturating_sub(AROUND_BYTES);
    while !text.is_char_boundary(at) {
        at += 1;
    }
    text.get(at..).unwrap_or(text)
}

fn beginning_of(text: &str) -> &str {
    let mut at = text.len().min(AROUND_BYTES);
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    text.get(..at).unwrap_or(text)
}
