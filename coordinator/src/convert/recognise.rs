//! Whether a file that was given as a job file is a config of the original.

use std::path::Path;

use tunefleet_proto::job::tree::{self, Value};

/// What a file is in place of a job file, and the command that makes a job file of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Foreign {
    /// In words.
    pub kind: &'static str,
    /// For a shell.
    pub command: String,
}

/// What a DeepSpeed config is called.
pub const DEEPSPEED_CONFIG: &str = "a DeepSpeed config";
/// Keys of an accelerate config that no job file has.
const ACCELERATE: [&str; 4] = ["compute_environment", "distributed_type", "fsdp_config", "deepspeed_config"];
/// Keys of a DeepSpeed config that no job file has.
const DEEPSPEED: [&str; 3] = ["zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size"];

/// What `text`, that `path` holds, is in place of a job file; nothing where it may be one.
pub fn recognise(path: &Path, text: &str) -> Option<Foreign> {
    let Value::Map(entries) = tree::parse(&text.replace('\t', " ")).ok()?.value else { return None };
    let has = |keys: &[&str]| entries.iter().any(|(key, _)| keys.contains(&key.name.as_str()));
    let (kind, argument) = if has(&ACCELERATE) {
        ("an accelerate config", "--accelerate")
    } else if has(&DEEPSPEED) {
        (DEEPSPEED_CONFIG, "--deepspeed")
    } else {
        return None;
    };
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let quoted = |text: &str| match shlex::try_quote(text) {
        Ok(quoted) => quoted.into_owned(),
        // It holds a NUL, which no path does.
        Err(_) => String::new(),
    };
    let (file, out) = (quoted(&path.to_string_lossy()), quoted(&format!("{stem}-job.yaml")));
    Some(Foreign { kind, command: format!("coordinator convert {argument} {file} --out {out}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configs_of_the_original_are_recognised_and_the_command_is_quoted() {
        let command =
            |path: &str, text: &str| recognise(Path::new(path), text).map(|foreign| foreign.command);
        assert_eq!(
            command("my configs/fsdp.yaml", "distributed_type: FSDP\n").as_deref(),
            Some("coordinator convert --accelerate 'my configs/fsdp.yaml' --out fsdp-job.yaml")
        );
        assert_eq!(
            command("ds.json", "{\n\t\"zero_optimization\": {}\n}").as_deref(),
            Some("coordinator convert --deepspeed ds.json --out ds-job.yaml")
        );
    }

    #[test]
    fn a_job_file_and_a_broken_file_are_not_taken_for_a_config() {
        for text in ["train: {ranks: 8}\nmodel: {path: x}\n", "fsdp_config", "- fsdp_config", "a: [", ""] {
            assert_eq!(recognise(Path::new("job.yaml"), text), None, "{text}");
        }
    }
}
