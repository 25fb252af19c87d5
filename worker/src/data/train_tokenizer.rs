//! `worker tokenizer train`: a byte-level BPE vocabulary with StarCoder's special tokens and
//! pre-tokeniser, learned from a dataset.

use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    TokenizerBuilder, TokenizerImpl,
};

use super::Split;
use super::documents::Dataset;
use super::tokenizer::{Error, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE};

/// StarCoder's special tokens; the place in this list is the id.
pub const SPECIAL_TOKENS: [&str; 19] = [
    "<|endoftext|>",
    "<fim_prefix>",
    "<fim_middle>",
    "<fim_suffix>",
    "<fim_pad>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<empty_output>",
    "<commit_before>",
    "<commit_msg>",
    "<commit_after>",
    "<reponame>",
];

const SPECIAL_TOKENS_MAP_FILE: &str = "special_tokens_map.json";
/// A pair seen once in the whole corpus says nothing about the language.
const MIN_PAIR_COUNT: u64 = 2;

/// Verbs of `worker tokenizer`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Learns a byte-level BPE vocabulary with StarCoder's special tokens from a dataset.
    Train {
        /// Directory written by `coordinator collect`.
        #[arg(long, value_name = "DIR")]
        dataset: PathBuf,
        /// Tokens of the vocabulary, the 19 special ones and the 256 bytes included.
        #[arg(long, value_name = "N")]
        vocab_size: u32,
        /// Directory for tokenizer.json and its settings.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

/// Runs `worker tokenizer`.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args) -> Result<(), Error> {
    let Verb::Train { dataset, vocab_size, out } = args.verb;
    let tokens = train_on_dataset(&Dataset::open(&dataset)?, vocab_size, &out)?;
    let path = out.join(TOKENIZER_FILE);
    if tokens < vocab_size as usize {
        tracing::warn!(asked = vocab_size, tokens, "the dataset is too small for a vocabulary of this size");
    }
    writeln!(std::io::stdout(), "{}", path.display()).map_err(|source| Error::Io { path, source })
}

/// Trains on the training split: the vocabulary must not see the validation files.
///
/// # Errors
/// See [`Error`].
pub fn train_on_dataset(dataset: &Dataset, vocab_size: u32, out: &Path) -> Result<usize, Error> {
    // The trainer takes texts, not results: an unreadable segment ends them and is reported after.
    let failure = Mutex::new(None);
    let texts = dataset.rows(Split::Train).map_while(|rows| match rows {
        Ok(rows) => Some(rows),
        Err(error) => {
            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            None
        }
    });
    let texts = texts.flat_map(|rows| {
        (0..rows.len()).map(|row| rows.row(row).content.to_owned()).collect::<Vec<String>>()
    });
    let tokenizer = learn(texts, vocab_size)?;
    if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error.into());
    }
    write(&tokenizer, out)?;
    Ok(tokenizer.get_vocab_size(true))
}

/// Trains on `texts`, writes `tokenizer.json`, `tokenizer_config.json` and
/// `special_tokens_map.json` into `out`, and returns the size of the vocabulary. The same texts
/// give the same bytes.
///
/// # Errors
/// See [`Error`].
pub fn train(
    texts: impl Iterator<Item = String> + Send,
    vocab_size: u32,
    out: &Path,
) -> Result<usize, Error> {
    let tokenizer = learn(texts, vocab_size)?;
    write(&tokenizer, out)?;
    Ok(tokenizer.get_vocab_size(true))
}

type Trained =
    TokenizerImpl<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

fn learn(texts: impl Iterator<Item = String> + Send, vocab_size: u32) -> Result<Trained, Error> {
    let alphabet: HashSet<char> = ByteLevel::alphabet().into_iter().collect();
    let least = SPECIAL_TOKENS.len() + alphabet.len();
    if (vocab_size as usize) < least {
        return Err(Error::VocabularyTooSmall { asked: vocab_size, least });
    }
    let failed = |error: tokenizers::Error| Error::Training(error.to_string());
    let byte_level = ByteLevel::default().add_prefix_space(false);
    let pre_tokenizer = Sequence::new(vec![
        PreTokenizerWrapper::Digits(Digits::new(true)),
        PreTokenizerWrapper::ByteLevel(byte_level),
    ]);
    let mut tokenizer: Trained = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(pre_tokenizer)))
        .with_decoder(Some(DecoderWrapper::ByteLevel(byte_level)))
        .build()
        .map_err(failed)?;
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size as usize)
        .min_frequency(MIN_PAIR_COUNT)
        .initial_alphabet(alphabet)
        .special_tokens(SPECIAL_TOKENS.map(|token| AddedToken::from(token, true)).to_vec())
        .show_progress(false)
        .build();
    tokenizer.train(&mut trainer, texts).map_err(failed)?;
    Ok(tokenizer)
}

/// Writes the three files, `tokenizer.json` last: where it is, the others are too.
fn write(tokenizer: &Trained, out: &Path) -> Result<(), Error> {
    let [eos, ..] = SPECIAL_TOKENS;
    let special_tokens_map = json!({
        "additional_special_tokens": SPECIAL_TOKENS,
        "bos_token": eos,
        "eos_token": eos,
        "unk_token": eos,
    });
    let mut config = special_tokens_map.clone();
    config["add_prefix_space"] = json!(false);
    // Clean-up turns `from ..config` into `from..config`.
    config["clean_up_tokenization_spaces"] = json!(false);
    config["tokenizer_class"] = json!("GPT2TokenizerFast");
    let tokenizer = tokenizer.to_string(true).map_err(|error| Error::Training(error.to_string()))?;
    std::fs::create_dir_all(out).map_err(|source| Error::Io { path: out.to_owned(), source })?;
    write_file(&out.join(TOKENIZER_CONFIG_FILE), &format!("{config:#}\n"))?;
    write_file(&out.join(SPECIAL_TOKENS_MAP_FILE), &format!("{special_tokens_map:#}\n"))?;
    write_file(&out.join(TOKENIZER_FILE), &tokenizer)
}

/// Writes beside `path`, then renames: the file is there wholly or not at all.
fn write_file(path: &Path, text: &str) -> Result<(), Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let incomplete = path.with_added_extension("incomplete");
    std::fs::write(&incomplete, text).map_err(io)?;
    std::fs::rename(&incomplete, path).map_err(io)
}
