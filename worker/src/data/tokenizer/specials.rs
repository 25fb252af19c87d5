//! Control tokens: those of the file, those that a job adds, and text around them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use serde_json::{Value, json};

use super::{ANCHOR, Error, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Tokenizer, guarded, read_limited};

/// Settings that templates know by these names.
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A control token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Special {
    /// As it is spelt.
    pub content: String,
    /// Its id.
    pub id: u32,
    /// Whether white space before it is part of it.
    pub takes_space_before: bool,
    /// Whether white space behind it is part of it.
    pub takes_space_behind: bool,
}

/// Where a piece of text stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// At the beginning.
    Beginning,
    /// Behind a control token.
    Behind,
}

impl Tokenizer {
    /// Control tokens, the end of text among them.
    pub fn specials(&self) -> Vec<Special> {
        let added = self.control.get_added_tokens_decoder();
        let specials = added.iter().filter(|(_, token)| token.special && !token.content.is_empty());
        let mut specials: Vec<Special> = specials
            .map(|(id, token)| Special {
                content: token.content.clone(),
                id: *id,
                takes_space_before: token.lstrip,
                takes_space_behind: token.rstrip,
            })
            .collect();
        specials.sort_by_key(|special| special.id);
        specials
    }

    /// The id of a token, by its spelling.
    pub fn id_of(&self, content: &str) -> Option<u32> {
        self.control.token_to_id(content)
    }

    /// What templates are told of control tokens, as `tokenizer_config.json` names them.
    pub fn special_names(&self, config: &Value) -> BTreeMap<String, String> {
        let named = |name: &str| {
            let token = config.get(name)?;
            Some((name.to_owned(), token.get("content").unwrap_or(token).as_str()?.to_owned()))
        };
        let mut names: BTreeMap<String, String> = NAMES.iter().filter_map(|name| named(name)).collect();
        if let Some(eos) = self.control.id_to_token(self.eos) {
            names.insert("eos_token".to_owned(), eos);
        }
        names
    }

    /// Tokens of a piece of text in which control tokens are text, each with its bytes in the piece. Bytes that a
    /// character's tokens share are all of theirs.
    ///
    /// # Errors
    /// When the vocabulary cannot express the text.
    pub fn encode_with_places(&self, text: &str, place: Place) -> Result<Vec<(u32, Range<usize>)>, Error> {
        let anchor = self.anchor.as_ref().filter(|_| place == Place::Behind && !self.begins_behind);
        let (shown, hidden) = match anchor {
            Some(_) => (format!("{ANCHOR}{text}"), ANCHOR.len()),
            None => (text.to_owned(), 0),
        };
        let encoding =
            guarded(|| self.plain.encode(shown.as_str(), false)).map_err(|p| self.text_error(p))?;
        let own = anchor.map_or(0, Vec::len);
        let tokens = encoding.get_ids().iter().zip(encoding.get_offsets()).skip(own);
        Ok(tokens
            .map(|(id, (begin, end))| (*id, begin.saturating_sub(hidden)..end.saturating_sub(hidden)))
            .collect())
    }

    /// Writes the vocabulary, with what was added to it, and its settings into `dir`.
    ///
    /// # Errors
    /// A disk that refuses.
    pub fn write(&self, dir: &Path) -> Result<(), Error> {
        let write = |name: &str, bytes: Vec<u8>| {
            let path = dir.join(name);
            std::fs::write(&path, bytes).map_err(|source| Error::Io { path: path.clone(), source })
        };
        let mut bytes = read_limited(&self.path)?;
        if !self.special_tokens.is_empty() {
            let invalid = |problem: String| Error::Invalid { path: self.path.clone(), problem };
            let mut json = serde_json::from_slice(&bytes).map_err(|error| invalid(error.to_string()))?;
            add(&mut json, &self.special_tokens).map_err(invalid)?;
            bytes = serde_json::to_vec(&json).unwrap_or_default();
        }
        write(TOKENIZER_FILE, bytes)?;
        let beside = self.path.with_file_name(TOKENIZER_CONFIG_FILE);
        let mut config: Value = match std::fs::read(&beside) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_default(),
            Err(_) => json!({ "tokenizer_class": "PreTrainedTokenizerFast" }),
        };
        if let (Some(config), Some(eos)) = (config.as_object_mut(), self.control.id_to_token(self.eos)) {
            config.insert("eos_token".to_owned(), eos.into());
        }
        write(TOKENIZER_CONFIG_FILE, serde_json::to_vec_pretty(&config).unwrap_or_default())
    }
}

/// Puts control tokens that are not there at the end of a parsed `tokenizer.json`, and makes those that are special.
pub(super) fn add(json: &mut Value, tokens: &[String]) -> Result<(), String> {
    if tokens.is_empty() {
        return Ok(());
    }
    let ids = |tokens: &Value| -> Vec<(String, u64)> {
        let of_map = tokens.as_object().into_iter().flatten();
        let of_map = of_map.filter_map(|(content, id)| Some((content.clone(), id.as_u64()?)));
        // Unigram models have a list, in the order of the ids.
        let of_list = tokens.as_array().into_iter().flatten().enumerate();
        let of_list = of_list.filter_map(|(id, entry)| Some((entry.get(0)?.as_str()?.to_owned(), id as u64)));
        of_map.chain(of_list).collect()
    };
    let vocabulary = ids(json.pointer("/model/vocab").unwrap_or(&Value::Null));
    let Some(added) = json.get_mut("added_tokens").and_then(Value::as_array_mut) else {
        return Err("it has no list of added tokens".to_owned());
    };
    let highest = vocabulary.iter().map(|(_, id)| *id);
    let highest = highest.chain(added.iter().filter_map(|token| token.get("id")?.as_u64())).max();
    let mut next = highest.map_or(0, |highest| highest + 1);
    for content in tokens {
        let known =
            added.iter_mut().find(|token| token.get("content").and_then(Value::as_str) == Some(content));
        if let Some(special) = known.and_then(|token| token.get_mut("special")) {
            *special = Value::Bool(true);
            continue;
        }
        let id = vocabulary.iter().find(|(known, _)| known == content).map(|(_, id)| *id);
        let id = id.unwrap_or_else(|| {
            next += 1;
            next - 1
        });
        added.push(json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }));
    }
    Ok(())
}
