//! `coordinator collect` in a place of its own, and what it collects from.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;
use tunefleet_proto::dataset::Manifest;

use crate::process::{Ended, Running};
use crate::{programs, skip};

/// A place for repositories, a home directory and datasets.
pub struct Place {
    dir: TempDir,
}

impl Place {
    /// An empty one.
    #[expect(clippy::new_without_default, reason = "it makes a directory")]
    pub fn new() -> Self {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        fs::create_dir_all(place.path("home/.ssh")).unwrap();
        place
    }

    /// The directory of all.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path in it.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    /// `coordinator collect` of `sources` into `out`, with a home directory of its own.
    pub fn collect(&self, out: &str, sources: &[&str], options: &[&str]) -> Ended {
        Running::start(self.command(out, sources, options)).wait()
    }

    /// The command of [`collect`](Self::collect).
    pub fn command(&self, out: &str, sources: &[&str], options: &[&str]) -> Command {
        let mut command = self.coordinator(&["collect"]);
        command.args(sources).arg("--out").arg(self.path(out)).args(options);
        command.args(["--validation-fraction", "0"]);
        if !options.contains(&"--duplicates") {
            // The files of `repository::sources` say nearly the same.
            command.args(["--duplicates", "keep"]);
        }
        command
    }

    /// `coordinator collect --config` of a job file whose `collect` section is given in JSON. The dataset goes to
    /// `NAME/dataset`.
    pub fn collect_job(&self, name: &str, collect: &Value) -> Command {
        let job = json!({
            "name": name, "output": self.path(name), "model": {"init": {"preset": "tiny"}}, "collect": collect,
        });
        let file = self.path(&format!("{name}.yaml"));
        fs::write(&file, job.to_string()).unwrap();
        let mut command = self.coordinator(&["collect", "--config"]);
        command.arg(file);
        command
    }

    /// The coordinator, in a home directory of its own.
    pub fn coordinator(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(programs::coordinator());
        command.args(arguments).env("HOME", self.path("home"));
        for variable in [
            "SSH_AUTH_SOCK",
            "XDG_CONFIG_HOME",
            "XDG_CACHE_HOME",
            "http_proxy",
            "HTTP_PROXY",
            "GH_TOKEN",
            "GITHUB_TOKEN",
            "GH_ENTERPRISE_TOKEN",
            "GITHUB_ENTERPRISE_TOKEN",
            "GITEA_TOKEN",
            "HF_HOME",
            "HF_TOKEN",
        ] {
            command.env_remove(variable);
        }
        command
    }

    /// The manifest of a dataset.
    pub fn manifest(&self, out: &str) -> Manifest {
        serde_json::from_slice(&fs::read(self.path(out).join("manifest.json")).unwrap()).unwrap()
    }

    /// The rows of a dataset by path, as the Python package `datasets` reads them.
    pub fn rows(&self, out: &str, kind: &str) -> Option<BTreeMap<String, Value>> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let python = root.join(".venv/bin/python");
        if !python.exists() {
            skip("the contents are read by Python's `datasets`, which `make setup-tests` installs");
            return None;
        }
        let mut command = Command::new(python);
        command.arg(root.join("tests/collect/read_dataset.py")).arg(self.path(out)).arg(kind);
        let output = command.arg(self.path("cache")).env("HF_HUB_OFFLINE", "1").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let rows = output.stdout.lines().map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
        Some(rows.map(|row| (row["file_path"].as_str().unwrap().to_owned(), row)).collect())
    }
}

/// What git prints, which must succeed.
pub fn git(dir: &Path, arguments: &[&str]) -> String {
    let output = Command::new("git").arg("-C").arg(dir).args(arguments).output().unwrap();
    assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A server that ends with the test.
pub struct Server {
    /// Its process.
    pub child: Child,
    _stdin: Option<ChildStdin>,
    /// Where it listens.
    pub port: u16,
}

impl Server {
    /// One that was started.
    pub fn new(child: Child, port: u16) -> Self {
        Server { child, _stdin: None, port }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves the repositories below `root`, and lists them as a forge does; see the script.
pub fn serve_http(root: &Path, credentials: Option<&str>) -> Server {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("collect/git_http_server.py");
    let mut command = Command::new("python3");
    command.arg(script).arg(root).args(credentials).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    Server { _stdin: child.stdin.take(), child, port: line.trim().parse().unwrap() }
}
