//! What a keeper and the daemon that started it agree on: files in a rank's directory.
//!
//! A rank's process is the child of a keeper and not of the daemon, so that how it ended is known though no
//! daemon runs at that moment. The keeper is small and needs no torch: it starts the process, waits, ends all
//! that is left of it, and notes the exit.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Limits and kills a process with all its descendants.
pub mod cgroup;

/// Written when the rank's process runs.
pub const CHILD_FILE: &str = "child.json";
/// Written when it is gone, with all that it started.
pub const EXIT_FILE: &str = "exit.json";

/// A process, told from another that has its number later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    /// When it started, in clock ticks since the machine did: `/proc/PID/stat`, field 22.
    pub started: u64,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Unless a signal ended it, or it never started.
    pub code: Option<i32>,
    /// Number of the signal that ended it.
    pub signal: Option<i32>,
    /// Why it could not be started; empty when it was.
    pub start_error: String,
    /// The kernel killed processes of it for their memory.
    pub out_of_memory: bool,
}

impl Process {
    /// The process of this number, if it lives.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name of the program stands in parentheses, and may hold any character.
        let fields = stat.rsplit_once(')')?.1;
        let mut fields = fields.split_ascii_whitespace();
        // A zombie is no process any more.
        if fields.next()? == "Z" {
            return None;
        }
        Some(Process { pid, started: fields.nth(18)?.parse().ok()? })
    }

    /// Whether it still lives.
    pub fn is_alive(&self) -> bool {
        Process::of(self.pid).is_some_and(|now| now == *self)
    }
}

/// Writes a file of a rank's directory, whole or not at all.
///
/// # Errors
/// When it cannot be written.
pub fn write<T: Serialize>(dir: &Path, name: &str, value: &T) -> io::Result<()> {
    let begun = dir.join(format!("{name}.begun"));
    let file = fs::File::create(&begun)?;
    serde_json::to_writer(&file, value)?;
    file.sync_data()?;
    fs::rename(begun, dir.join(name))
}

/// Reads a file of a rank's directory; `None` when it is not there or not whole.
pub fn read<T: DeserializeOwned>(dir: &Path, name: &str) -> Option<T> {
    serde_json::from_slice(&fs::read(dir.join(name)).ok()?).ok()
}

/// The `keeper` program: beside this one, or on PATH.
pub fn find() -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|path| Some(path.parent()?.join("keeper")));
    let on_path = std::env::var_os("PATH").unwrap_or_default();
    let on_path: Vec<PathBuf> = std::env::split_paths(&on_path).map(|dir| dir.join("keeper")).collect();
    beside.into_iter().chain(on_path).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_a_later_one_of_its_number() {
        let this = Process::of(std::process::id() as i32).unwrap();
        assert!(this.is_alive());
        assert!(!Process { started: this.started + 1, ..this }.is_alive());
        assert_eq!(Process::of(i32::MAX), None);
    }

    #[test]
    fn half_a_file_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let exit = Exit { code: Some(3), signal: None, start_error: String::new(), out_of_memory: false };
        write(dir.path(), EXIT_FILE, &exit).unwrap();
        assert_eq!(read::<Exit>(dir.path(), EXIT_FILE), Some(exit));
        fs::write(dir.path().join(EXIT_FILE), "{\"code\": 3").unwrap();
        assert_eq!(read::<Exit>(dir.path(), EXIT_FILE), None);
    }
}
