//! The flags of a daemon from a YAML file: `suspect_after: 10` in it is `--suspect-after 10` on the command line.
//!
//! A flag has one definition, one manual (`--help`) and one check, wherever it is given. The command line wins over
//! the environment, and that over the file. Relative paths in a file are taken from its directory.

use std::any::TypeId;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, Command};

use crate::job::diagnostic::Sink;
use crate::job::tree::{self, Node, Value};
use crate::job::{Diagnostics, did_you_mean, shown};

/// The flag that names the file.
const CONFIG: &str = "--config";
/// Flags that make no sense in a file.
const NOT_IN_FILES: [&str; 3] = ["config", "help", "version"];

/// Why a file of flags is not used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("{path}: {cause}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// What is wrong in it.
    #[error(transparent)]
    Faults(#[from] Diagnostics),
}

/// `arguments` (program, verb, flags) with those that the verb's `--config` file adds; as they are where it has none.
///
/// # Errors
/// Every fault of the file, each with its place.
pub fn complete(verb: &Command, arguments: Vec<OsString>) -> Result<Vec<OsString>, Error> {
    let (before, flags) = arguments.split_at(arguments.len().min(2));
    let Some(path) = config_of(flags) else { return Ok(arguments) };
    let text = std::fs::read_to_string(&path).map_err(|cause| Error::Read { path: path.clone(), cause })?;
    let added = flags_of(verb, &path, &text)?;
    let is_given = |arg: &Arg| {
        let by_environment = arg.get_env().is_some_and(|variable| std::env::var_os(variable).is_some());
        by_environment || arg.get_long().is_some_and(|long| flags.iter().any(|flag| is_flag(flag, long)))
    };
    let added = added.into_iter().filter(|(arg, _)| !is_given(arg)).map(|(_, flag)| flag);
    Ok(before.iter().cloned().chain(added).chain(flags.iter().cloned()).collect())
}

/// The file that is named.
fn config_of(flags: &[OsString]) -> Option<PathBuf> {
    let at = flags.iter().position(|flag| is_flag(flag, &CONFIG[2..]))?;
    let flag = flags.get(at)?;
    match flag.to_str().and_then(|text| text.split_once('=')) {
        Some((_, path)) => Some(PathBuf::from(path)),
        None => flags.get(at + 1).map(PathBuf::from),
    }
}

/// Whether `flag` is `--long`, with or without a value in it.
fn is_flag(flag: &OsStr, long: &str) -> bool {
    let name = flag.to_str().and_then(|text| text.strip_prefix("--"));
    name.is_some_and(|name| name.split('=').next() == Some(long))
}

/// What a file says, as flags.
fn flags_of<'a>(verb: &'a Command, path: &Path, text: &str) -> Result<Vec<(&'a Arg, OsString)>, Diagnostics> {
    let mut sink = Sink::default();
    let mut flags = Vec::new();
    match tree::parse(text) {
        Ok(Node { value: Value::Null, .. }) => {}
        Ok(Node { value: Value::Map(entries), .. }) => {
            let mut seen: Vec<&str> = Vec::new();
            for (key, node) in &entries {
                if seen.contains(&key.name.as_str()) {
                    sink.report(&key.place, format!("key {} is given twice", shown(&key.name)));
                    continue;
                }
                seen.push(&key.name);
                match known(verb, &key.name) {
                    Some(arg) => flags.extend(read(arg, &key.name, node, path, &mut sink)),
                    None => sink.report(&key.place, unknown(verb, &key.name)),
                }
            }
        }
        Ok(node) => {
            let found = node.value.found();
            sink.report(&node.place, format!("expected a mapping of flags to values, got {found}"));
        }
        Err(fault) => sink.report(&fault.place, fault.message),
    }
    sink.finish(path.display().to_string(), Some(flags))
}

/// Key of a flag in a file.
fn key_of(arg: &Arg) -> Option<String> {
    let long = arg.get_long().filter(|long| !NOT_IN_FILES.contains(long))?;
    Some(long.replace('-', "_"))
}

fn known<'a>(verb: &'a Command, key: &str) -> Option<&'a Arg> {
    verb.get_arguments().find(|arg| key_of(arg).as_deref() == Some(key))
}

fn unknown(verb: &Command, key: &str) -> String {
    let keys: Vec<String> = verb.get_arguments().filter_map(key_of).collect();
    let advice = did_you_mean(key, keys.iter().map(String::as_str));
    let known = if advice.is_empty() { format!("; known: {}", keys.join(", ")) } else { advice };
    format!("unknown key {}{known}", shown(key))
}

/// One key as flags: none where it says nothing, or is wrong and reported.
fn read<'a>(arg: &'a Arg, key: &str, node: &Node, file: &Path, sink: &mut Sink) -> Vec<(&'a Arg, OsString)> {
    let long = arg.get_long().unwrap_or_default();
    let mut flags = Vec::new();
    match (&node.value, arg.get_action()) {
        (Value::Null, _) => {}
        (Value::Bool(is_set), ArgAction::SetTrue) => {
            if *is_set {
                flags.push((arg, OsString::from(format!("--{long}"))));
            }
        }
        (value, ArgAction::SetTrue) => {
            sink.report(&node.place, format!("{key}: expected true or false, got {}", value.found()));
        }
        (Value::List(nodes), ArgAction::Append) => {
            for node in nodes {
                flags.extend(read(arg, key, node, file, sink));
            }
        }
        (Value::Integer(_, text) | Value::Float(_, text) | Value::Text(text), _) => match check(arg, text) {
            Ok(()) => flags.push((arg, with_value(arg, long, text, file))),
            Err(cause) => sink.report(&node.place, format!("{key}: {}: {cause}", shown(text))),
        },
        (value, _) => sink.report(&node.place, format!("{key}: expected a value, got {}", value.found())),
    }
    flags
}

fn with_value(arg: &Arg, long: &str, text: &str, file: &Path) -> OsString {
    let mut flag = OsString::from(format!("--{long}="));
    let is_path = arg.get_value_parser().type_id() == TypeId::of::<PathBuf>();
    match file.parent().filter(|_| is_path) {
        Some(dir) => flag.push(dir.join(text)),
        None => flag.push(text),
    }
    flag
}

/// Whether the flag takes this value, by its own rule.
fn check(arg: &Arg, text: &str) -> Result<(), String> {
    let alone = Arg::new("value").long("value").value_parser(arg.get_value_parser().clone());
    let parsed = Command::new("check").arg(alone).try_get_matches_from(["check", &format!("--value={text}")]);
    match parsed {
        Ok(_) => Ok(()),
        Err(error) => Err(match std::error::Error::source(&error) {
            Some(cause) => cause.to_string(),
            None => error.kind().as_str().unwrap_or("not a value of this flag").to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Flags {
        #[arg(long)]
        config: Option<PathBuf>,
        #[arg(long)]
        listen: std::net::SocketAddr,
        #[arg(long, default_value_t = 5.0)]
        suspect_after: f64,
        #[arg(long)]
        state: Option<PathBuf>,
        #[arg(long)]
        insecure: bool,
        #[arg(long)]
        name: Vec<String>,
    }

    fn parse(text: &str, given: &[&str]) -> Result<Flags, String> {
        let dir = std::env::temp_dir().join(format!(
            "flags-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        std::fs::create_dir_all(&dir).unwrap();
        let file = dir.join("serve.yaml");
        std::fs::write(&file, text).unwrap();
        let mut arguments = vec![OsString::from("coordinator"), OsString::from("serve")];
        arguments.extend([OsString::from(CONFIG), file.into_os_string()]);
        arguments.extend(given.iter().map(OsString::from));
        let verb = <Flags as clap::CommandFactory>::command();
        let completed = complete(&verb, arguments);
        std::fs::remove_dir_all(&dir).unwrap();
        let completed = completed.map_err(|error| error.to_string())?;
        <Flags as clap::Parser>::try_parse_from(completed.into_iter().skip(1))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_says_what_the_command_line_leaves_open() {
        let text = "listen: 127.0.0.1:1\nsuspect_after: 7\nstate: here\ninsecure: true\nname: [a, b]\n";
        let flags = parse(text, &["--suspect-after", "9"]).unwrap();
        assert_eq!(flags.listen.port(), 1, "a flag that must be given may be in the file");
        assert_eq!(flags.suspect_after, 9.0);
        assert!(flags.insecure && flags.config.is_some());
        assert_eq!(flags.name, ["a", "b"]);
        let state = flags.state.unwrap();
        assert!(state.is_absolute() && state.ends_with("here"), "{}", state.display());
        assert!(!parse("listen: 127.0.0.1:1\ninsecure: false\n", &[]).unwrap().insecure);
    }

    #[test]
    fn every_fault_of_a_file_is_told_with_its_place() {
        let text = "lisen: 127.0.0.1:1\nsuspect_after: soon\ninsecure: 3\nstate: {a: b}\nconfig: x\nname: a\nname: b\n";
        let faults = parse(text, &[]).unwrap_err();
        let expected = [
            ":1:1: unknown key \"lisen\" (did you mean \"listen\"?)",
            ":2:16: suspect_after: \"soon\": invalid float literal",
            ":3:11: insecure: expected true or false, got \"3\"",
            ":4:8: state: expected a value, got a mapping",
            ":5:1: unknown key \"config\"; known: listen, suspect_after, state, insecure, name",
            ":7:1: key \"name\" is given twice",
        ];
        assert_eq!(faults.lines().count(), expected.len(), "{faults}");
        for (fault, expected) in faults.lines().zip(expected) {
            assert!(fault.contains("serve.yaml") && fault.ends_with(expected), "{fault}");
        }
        let not_a_map = parse("- a\n", &[]).unwrap_err();
        assert!(not_a_map.contains(":1:1: expected a mapping of flags to values, got a list"), "{not_a_map}");
    }
}
