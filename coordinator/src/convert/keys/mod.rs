//! The settings of the original that are known: what each takes, which key of a job file it becomes,
//! and why it becomes none. They check what is read, explain what is left out, and are the tables of
//! `docs/convert.md`.

mod accelerate;
mod fsdp;
mod deepspeed;
mod script;

pub use accelerate::{ACCELERATE, LAUNCH, SWITCHES};
pub use deepspeed::DEEPSPEED;
pub use fsdp::{CONFIGURED_ZERO, FSDP, PARALLELISM};
pub use script::SCRIPT;

/// One setting of the original.
#[derive(Debug)]
pub struct Key {
    /// Its name: with dots in a file, with dashes in an argument string.
    pub name: &'static str,
    /// What its value may be.
    pub takes: Takes,
    /// The key of a job file that it becomes; empty where it becomes none.
    pub ours: &'static str,
    /// How the two differ, or why nothing is lost without it.
    pub remark: &'static str,
}

/// What a value may be.
#[derive(Debug)]
pub enum Takes {
    /// A mapping whose keys are known.
    Section,
    /// An argument with no value.
    Switch,
    /// Yes or no, in any of YAML's spellings.
    Bool,
    /// A whole number within these bounds.
    Count(u64, u64),
    /// A number within these bounds.
    Number(f64, f64),
    /// Two numbers, each within these bounds.
    Pair(f64, f64),
    /// Text.
    Text,
    /// One of these words; the first so many of them also by their number, from 1.
    Word(&'static [&'static str], usize),
    /// That, or `auto`.
    Auto(&'static Takes),
    /// Whatever is written: nothing follows from it.
    Anything,
}

/// The setting becomes the key `ours`.
const fn becomes(name: &'static str, takes: Takes, ours: &'static str, remark: &'static str) -> Key {
    Key { name, takes, ours, remark }
}

/// The setting becomes nothing.
const fn needless(name: &'static str, takes: Takes, remark: &'static str) -> Key {
    Key { name, takes, ours: "", remark }
}

/// Every setting of an accelerate config.
pub fn config_keys() -> impl Iterator<Item = &'static Key> {
    [ACCELERATE, FSDP, CONFIGURED_ZERO, PARALLELISM].into_iter().flatten()
}

/// Every setting of a DeepSpeed config.
pub fn deepspeed_keys() -> impl Iterator<Item = &'static Key> {
    DEEPSPEED.iter()
}

/// Every argument of train.py.
pub fn script_keys() -> impl Iterator<Item = &'static Key> {
    SCRIPT.iter()
}

/// Every argument of `accelerate launch` that is no setting of its config.
pub fn launch_keys() -> impl Iterator<Item = &'static Key> {
    LAUNCH.iter()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use tunefleet_proto::job::manual;

    use super::*;

    fn all() -> impl Iterator<Item = &'static Key> {
        config_keys().chain(launch_keys()).chain(deepspeed_keys()).chain(script_keys())
    }

    #[test]
    fn every_setting_is_named_once_and_becomes_keys_that_there_are_or_says_why_not() {
        let ours: BTreeSet<String> = manual().into_iter().map(|entry| entry.key).collect();
        for table in [
            config_keys().collect::<Vec<_>>(),
            launch_keys().collect(),
            deepspeed_keys().collect(),
            script_keys().collect(),
        ] {
            let names: BTreeSet<_> = table.iter().map(|key| key.name).collect();
            assert_eq!(names.len(), table.len());
        }
        for Key { name, ours: key, remark, takes } in all() {
            for key in key.split(", ").filter(|key| !key.is_empty()) {
                assert!(ours.contains(key), "{name}: there is no key {key}");
            }
            let explained = !key.is_empty() || !remark.is_empty() || matches!(takes, Takes::Section);
            assert!(explained, "{name} becomes nothing, and does not say why");
        }
    }

    /// The guide's tables are made from the code's: `make docs` writes them.
    #[test]
    fn the_guide_has_a_row_for_every_setting() {
        const BEGIN: &str = "<!-- from the code: make docs -->\n";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/convert.md");
        let found = fs::read_to_string(&path).unwrap();
        let guide = found.split(BEGIN).next().unwrap().to_owned();
        let expected = guide + BEGIN + &tables();
        if std::env::var_os("TUNEFLEET_BLESS").is_some() {
            fs::write(&path, &expected).unwrap();
        }
        assert!(fs::read_to_string(&path).unwrap() == expected, "docs/convert.md is out of date: make docs");
    }

    fn tables() -> String {
        let mut text = String::new();
        for (title, keys) in [
            ("accelerate config", config_keys().collect::<Vec<_>>()),
            ("accelerate launch, beside the names of its config", launch_keys().collect()),
            ("DeepSpeed config", deepspeed_keys().collect()),
            ("train.py", script_keys().collect()),
        ] {
            text += &format!("\n### {title}\n\n| setting | job file | remark |\n| --- | --- | --- |\n");
            for Key { name, ours, remark, takes } in keys {
                if matches!(takes, Takes::Section) {
                    continue;
                }
                let ours: Vec<_> =
                    ours.split(", ").filter(|key| !key.is_empty()).map(|key| format!("`{key}`")).collect();
                let ours = if ours.is_empty() { "none".to_owned() } else { ours.join(", ") };
                text += &format!("| `{name}` | {ours} | {} |\n", remark.replace('|', "\\|"));
            }
        }
        text
    }
}
