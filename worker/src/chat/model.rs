//! `worker init-chat`: a model with a chat template beside it, and with the control tokens that the template needs.
//!
//! The weights are linked to, not copied. Where the vocabulary grows past the embedding, a larger embedding (and output
//! head, where that is another table) is written beside them, and the index says that it is the one; new rows begin as
//! the mean of the others. `config.json` names the tokens that were added: an adapter of this model trains their rows.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tunefleet_proto::adapter::token_tables;
use tunefleet_proto::chat::BUILT_IN;
use tunefleet_proto::job::{ChatLoss, ChatSpec, ChatTemplate};
use tunefleet_proto::model::ModelConfig;

use super::{Chat, Error, directory, find, read, template};
use crate::checkpoint::hugging_face::{self, CONFIG_FILE, INDEX_FILE, ModelFiles};
use crate::checkpoint::safetensors::{Entry, WriteDtype, Writer};
use crate::checkpoint::{self, model_dir, place};
use crate::data::tokenizer::Tokenizer;

/// Tables with more rows than the base has.
const GROWN_FILE: &str = "chat-embedding.safetensors";
/// Key of the number of rows.
const VOCAB_SIZE: &str = "vocab_size";
/// Key of the tokens that were added.
const ADDED_TOKENS: &str = "tunefleet_added_tokens";

/// Command line of `worker init-chat`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  worker init-chat --model starcoderplus --template chatml --out starcoderplus-chatml"
)]
pub struct Args {
    /// A Hugging Face model directory.
    #[arg(long)]
    model: PathBuf,
    /// A `tokenizer.json`, or a directory that holds one; the model's own when absent.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// How turns are laid out: prompter, octocoder, starchat, chatml, from_model, or a Jinja file.
    #[arg(long)]
    template: String,
    /// What the system says where it says nothing.
    #[arg(long)]
    system: Option<String>,
    /// A control token that is added where the vocabulary lacks it; once for each.
    #[arg(long = "special-token", value_name = "TOKEN")]
    special_tokens: Vec<String>,
    /// Directory to write.
    #[arg(long)]
    out: PathBuf,
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// Control tokens that were added, with their ids.
    pub added: BTreeMap<String, u32>,
    /// Rows of the embedding, and how many there were before.
    pub rows: (u64, u64),
}

/// Runs the verb.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args) -> Result<(), Error> {
    let known = BUILT_IN.iter().find(|known| known.name == args.template);
    let own = known.map_or(&[][..], |known| known.special_tokens);
    let spec = ChatSpec {
        template: match (known, args.template.as_str()) {
            (Some(_), name) => ChatTemplate::BuiltIn(name.to_owned()),
            (None, "from_model") => ChatTemplate::FromModel,
            (None, path) => ChatTemplate::File(path.into()),
        },
        loss: ChatLoss::All,
        system: args.system,
        special_tokens: own.iter().map(|token| (*token).to_owned()).chain(args.special_tokens).collect(),
    };
    let tokenizer = args.tokenizer.as_ref().unwrap_or(&args.model);
    let Made { added, rows } = init(&spec, &args.model, tokenizer, &args.out)?;
    let tokens: Vec<String> = added.iter().map(|(token, id)| format!("{token} is {id}")).collect();
    let tokens = if tokens.is_empty() { "no token was added".to_owned() } else { tokens.join(", ") };
    // A reader that has gone away wants no more.
    let _ = writeln!(
        std::io::stdout(),
        "{}: {tokens}; the embedding has {} rows, it had {}",
        args.out.display(),
        rows.0,
        rows.1
    );
    Ok(())
}

/// Writes `out`: the model in `model` with the template and the control tokens of `spec`.
///
/// # Errors
/// A template that cannot be used, files that break a rule, a disk that refuses.
pub fn init(spec: &ChatSpec, model: &Path, tokenizer: &Path, out: &Path) -> Result<Made, Error> {
    let config = hugging_face::read_config(model)?;
    let files = ModelFiles::open(model)?;
    files.check(model, &config)?;
    let before = Tokenizer::load(tokenizer)?;
    let extended = Tokenizer::load_with(tokenizer, &spec.special_tokens)?;
    let added: BTreeMap<String, u32> = spec
        .special_tokens
        .iter()
        .filter(|token| before.id_of(token).is_none())
        .filter_map(|token| Some((token.clone(), extended.id_of(token)?)))
        .collect();
    let (name, jinja) = source(&spec.template, &directory(tokenizer))?;
    let jinja = template::with_system(&jinja, spec.system.as_deref());
    // What cannot be used is told before anything is written.
    let chat = Chat::new(name, &jinja, spec.loss, &extended, &directory(tokenizer))?;
    let rows = config.vocab_size.max(extended.vocab_size());
    model_dir::check_replaceable(out)?;
    let mut failed = None;
    let written = place::whole(out, |dir| {
        fill(dir, model, &config, &files, rows)?;
        let path = dir.join(CONFIG_FILE);
        let text = fs::read_to_string(model.join(CONFIG_FILE)).map_err(checkpoint::Error::io(&path))?;
        let mut json: Value = serde_json::from_str(&text).unwrap_or_default();
        if let Some(keys) = json.as_object_mut() {
            keys.insert(VOCAB_SIZE.to_owned(), json!(rows));
            let mut ids: Vec<u64> = added.values().map(|id| u64::from(*id)).collect();
            ids.extend(&config.added_tokens);
            ids.sort_unstable();
            ids.dedup();
            keys.insert(ADDED_TOKENS.to_owned(), json!(ids));
        }
        model_dir::write_json(&path, &json)?;
        model_dir::copy_tokenizer(tokenizer, dir)?;
        let told = extended.write(dir).map_err(Error::from).and_then(|()| chat.write(dir));
        told.map_err(|error| {
            let told = checkpoint::Error::Elsewhere(error.to_string());
            failed = Some(error);
            told
        })
    });
    match (failed, written) {
        (Some(error), _) => Err(error),
        (None, written) => {
            written?;
            Ok(Made { added, rows: (rows, config.vocab_size) })
        }
    }
}

/// A template's name and text.
fn source(template: &ChatTemplate, dir: &Path) -> Result<(String, String), Error> {
    Ok(match template {
        ChatTemplate::BuiltIn(name) => {
            let known = BUILT_IN.iter().find(|known| known.name == name);
            (name.clone(), known.map(|known| known.jinja.to_owned()).unwrap_or_default())
        }
        ChatTemplate::File(path) => (path.display().to_string(), read(path)?),
        ChatTemplate::FromModel => {
            let (path, jinja) = find(dir)?.ok_or_else(|| Error::NoTemplate { dir: dir.to_owned() })?;
            (path.display().to_string(), jinja)
        }
    })
}

/// Links to the weights, and larger tables where there are to be more rows.
fn fill(
    dir: &Path,
    model: &Path,
    config: &ModelConfig,
    files: &ModelFiles,
    rows: u64,
) -> Result<(), checkpoint::Error> {
    let mut index = BTreeMap::new();
    for (tensor, path) in files.places() {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let link = dir.join(&name);
        if fs::symlink_metadata(&link).is_err() {
            let there = path.canonicalize().map_err(checkpoint::Error::io(path))?;
            symlink(&there, &link).map_err(checkpoint::Error::io(&link))?;
        }
        index.insert(tensor.to_owned(), name);
    }
    let grows = rows > config.vocab_size;
    if grows && !files.is_safetensors() {
        return Err(checkpoint::Error::format(
            model,
            "holds weights in the old format, and tokens are added, for which larger tables must lie beside them: save \
             it as safetensors first",
        ));
    }
    if grows {
        let names: Vec<String> =
            token_tables(config).into_iter().map(|(_, module)| format!("{module}.weight")).collect();
        let entry = |name: &String| Entry { name: name.clone(), shape: vec![rows, config.hidden_size] };
        let entries: Vec<Entry> = names.iter().map(entry).collect();
        let mut writer = Writer::create(&dir.join(GROWN_FILE), &entries, WriteDtype::F32)?;
        for name in &names {
            let mean = copy(model, files, name, config, &mut writer)?;
            for _ in config.vocab_size..rows {
                writer.values(&mean)?;
            }
            index.insert(name.clone(), GROWN_FILE.to_owned());
        }
        writer.finish()?;
    }
    if files.is_safetensors() {
        model_dir::write_json(&dir.join(INDEX_FILE), &json!({ "metadata": {}, "weight_map": index }))?;
    } else if let Some(index) = files.torch_index(model) {
        let link = dir.join(index.file_name().unwrap_or_default());
        let there = index.canonicalize().map_err(checkpoint::Error::io(&index))?;
        symlink(&there, &link).map_err(checkpoint::Error::io(&link))?;
    }
    Ok(())
}

/// Copies a table, and gives the mean of its rows.
fn copy(
    model: &Path,
    files: &ModelFiles,
    name: &str,
    config: &ModelConfig,
    writer: &mut Writer,
) -> Result<Vec<f32>, checkpoint::Error> {
    let width = config.hidden_size as usize;
    let mut sums = vec![0f64; width];
    let (mut at, mut outcome) = (0, Ok(()));
    let _ = files.read(model, name, |values| {
        for value in values {
            if let Some(sum) = sums.get_mut(at % width) {
                *sum += f64::from(*value);
            }
            at += 1;
        }
        if outcome.is_ok() {
            outcome = writer.values(values);
        }
    })?;
    outcome?;
    Ok(sums.iter().map(|sum| (sum / config.vocab_size as f64) as f32).collect())
}
