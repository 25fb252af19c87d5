//! Models of the hub: which files of a repository are the model, and where they are on this machine.

use super::Error;
use super::download::{Remote, Snapshot};
use super::target::RepoKind;

/// Where a model's shape stands.
const CONFIG: &str = "config.json";
/// Besides weights: shape, and what belongs to the tokenizer.
const COMPANIONS: [&str; 9] = [
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

/// A model on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model<'a> {
    /// `OWNER/NAME`.
    pub repo: &'a str,
    /// Branch, tag or commit; `main` where none is named.
    pub revision: Option<&'a str>,
}

impl Model<'_> {
    /// Brings the model to this machine: weights in safetensors, or where there are none as PyTorch wrote them.
    ///
    /// # Errors
    /// As [`Remote::snapshot_of`]; a repository that holds no weights.
    pub fn fetch(&self) -> Result<Snapshot, Error> {
        let snapshot = self.remote()?.snapshot_of(choose)?;
        let has =
            |ends: &[&str]| snapshot.files.iter().any(|file| ends.iter().any(|end| file.ends_with(end)));
        let missing = match (has(&[CONFIG]), has(&[".safetensors", ".bin"])) {
            (false, _) => CONFIG,
            (true, false) => "weights (safetensors files, or pytorch_model*.bin)",
            (true, true) => return Ok(snapshot),
        };
        Err(self.lacks(missing))
    }

    /// The text of its `config.json`, alone.
    ///
    /// # Errors
    /// As [`fetch`](Self::fetch).
    pub fn config(&self) -> Result<String, Error> {
        let snapshot = self.remote()?.snapshot(|file| file == CONFIG)?;
        if snapshot.files.is_empty() {
            return Err(self.lacks(CONFIG));
        }
        let path = snapshot.dir.join(CONFIG);
        std::fs::read_to_string(&path).map_err(Error::io(&path))
    }

    fn remote(&self) -> Result<Remote, Error> {
        Remote::from_environment(RepoKind::Model, self.repo, self.revision)
    }

    fn lacks(&self, what: &str) -> Error {
        let revision = self.revision.unwrap_or("main");
        Error::Setting(format!(
            "{} at {revision} is no model that transformers loads: it lacks {what}; name another repository or revision",
            self.repo
        ))
    }
}

/// Leaves what is the model: one set of weights, and what stands beside it.
fn choose(files: &mut Vec<String>) {
    let is_shard = |file: &str, start: &str, end: &str| {
        file == format!("{start}{end}")
            || file == format!("{start}{end}.index.json")
            || file.strip_prefix(&format!("{start}-")).is_some_and(|rest| rest.ends_with(end))
    };
    let safetensors = |file: &str| is_shard(file, "model", ".safetensors");
    let torch = |file: &str| is_shard(file, "pytorch_model", ".bin");
    let is_safe = files.iter().any(|file| safetensors(file));
    files.retain(|file| {
        COMPANIONS.contains(&file.as_str()) || if is_safe { safetensors(file) } else { torch(file) }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(files: &[&str]) -> Vec<String> {
        let mut files = files.iter().map(|&file| file.to_owned()).collect();
        choose(&mut files);
        files
    }

    #[test]
    fn one_set_of_weights_is_chosen_with_what_belongs_to_it() {
        let all = [
            "README.md",
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "onnx/model.onnx",
            "original/model.safetensors",
            "consolidated.safetensors",
            "tokenizer.json",
        ];
        let safe: Vec<&str> = [&all[1..5], &all[9..]].concat();
        assert_eq!(chosen(&all), safe);
        assert_eq!(
            chosen(&[
                "pytorch_model-00001-of-00001.bin",
                "pytorch_model.bin.index.json",
                "training_args.bin"
            ]),
            ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
        );
    }
}
