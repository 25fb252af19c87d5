//! `coordinator collect` from every kind of place, against what git itself says.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;
use tunefleet_proto::dataset::Manifest;
use tunefleet_tests::process::{Ended, Running};
use tunefleet_tests::{programs, repository, skip};

/// A place for repositories, a home directory and datasets.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        fs::create_dir_all(place.path("home/.ssh")).unwrap();
        place
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    /// `coordinator collect` of `sources` into `out`, with a home directory of its own.
    fn collect(&self, out: &str, sources: &[&str], options: &[&str]) -> Ended {
        Running::start(self.command(out, sources, options)).wait()
    }

    fn command(&self, out: &str, sources: &[&str], options: &[&str]) -> Command {
        let mut command = Command::new(programs::coordinator());
        command.arg("collect").args(sources).arg("--out").arg(self.path(out)).args(options);
        command.args(["--validation-fraction", "0"]).env("HOME", self.path("home"));
        for variable in ["SSH_AUTH_SOCK", "XDG_CONFIG_HOME", "http_proxy", "HTTP_PROXY"] {
            command.env_remove(variable);
        }
        command
    }

    fn manifest(&self, out: &str) -> Manifest {
        serde_json::from_slice(&fs::read(self.path(out).join("manifest.json")).unwrap()).unwrap()
    }

    /// The rows of a dataset by path, as the Python package `datasets` reads them.
    fn rows(&self, out: &str, kind: &str) -> Option<BTreeMap<String, Value>> {
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

fn git(dir: &Path, arguments: &[&str]) -> String {
    let output = Command::new("git").arg("-C").arg(dir).args(arguments).output().unwrap();
    assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Files of which some must be dropped, each for a reason of its own.
fn mixed_files() -> Vec<(String, Vec<u8>)> {
    let notebook = json!({"nbformat": 4, "metadata": {}, "cells": [
        {"cell_type": "code", "source": ["import a\n"]}, {"cell_type": "markdown", "source": "# b"},
        {"cell_type": "code", "source": "c = 1"}]});
    let text = |text: &str| text.as_bytes().to_vec();
    [
        ("src/main.py", text("print('main')\n")),
        // The original drops these three: their names end in the letters of an extension.
        ("src/monkey", text("ook\n")),
        ("zindex", text("z\n")),
        (".github/workflows/ci.yml", text("on: push\n")),
        ("deep/er/and/deeper/x.rs", text("fn x() {}\n")),
        ("notebook.ipynb", text(&notebook.to_string())),
        ("broken.ipynb", text("{\"cells\": [")),
        ("picture.PNG", text("not really a picture")),
        ("latin1.txt", b"caf\xe9\n".to_vec()),
        ("empty.py", Vec::new()),
        ("pkg/__pycache__/x.py", text("cached\n")),
        ("big.txt", vec![b'x'; (1 << 20) + 1]),
    ]
    .into_iter()
    .map(|(path, content)| (path.to_owned(), content))
    .collect()
}

#[test]
fn every_file_of_the_commit_is_kept_or_counted_by_the_reason_that_drops_it() {
    let place = Place::new();
    let repo = place.path("repo");
    repository::commit_bytes(&repo, &mixed_files());
    fs::write(repo.join("uncommitted.py"), "x = 1\n").unwrap();
    for (out, kind, options) in [("arrow-set", "arrow", &[][..]), ("parquet-set", "parquet", &["--parquet"])]
    {
        let collected = place.collect(out, &[repo.to_str().unwrap()], options);
        collected.expect(0).says(&["uncommitted work"]);
        let manifest = place.manifest(out);
        let in_commit = git(&repo, &["ls-tree", "-r", "--name-only", "HEAD"]).lines().count() as u64;
        let dropped: u64 = manifest.dropped.values().sum();
        assert_eq!(manifest.repositories[0].files + dropped, in_commit, "{:?}", manifest.dropped);
        assert_eq!(manifest.repositories[0].commit, git(&repo, &["rev-parse", "HEAD"]).trim());
        assert_eq!(manifest.repositories[0].repo_id, "repo");
        assert_eq!((manifest.repositories[0].files, dropped), (6, 6), "{:?}", manifest.dropped);
        assert!(manifest.dropped.values().all(|count| *count == 1), "{:?}", manifest.dropped);

        let Some(rows) = place.rows(out, kind) else { return };
        let kept: Vec<&str> = rows.keys().map(String::as_str).collect();
        let expected = [
            ".github/workflows/ci.yml",
            "deep/er/and/deeper/x.rs",
            "notebook.ipynb",
            "src/main.py",
            "src/monkey",
            "zindex",
        ];
        assert_eq!(kept, expected);
        assert_eq!(rows["notebook.ipynb"]["content"], "import a\n\nc = 1");
        assert_eq!(rows["src/main.py"]["content"], "print('main')\n");
        assert_eq!(rows["src/main.py"]["size_bytes"], 14);
        assert_eq!(rows["src/main.py"]["repo_id"], "repo");
    }
}

#[test]
fn one_repository_gives_one_dataset_from_a_path_a_file_url_a_bare_clone_and_a_revision() {
    let place = Place::new();
    let repo = place.path("repo");
    repository::commit(&repo, &repository::sources("x", 12));
    let first = git(&repo, &["rev-parse", "HEAD"]).trim().to_owned();
    git(place.dir.path(), &["clone", "--quiet", "--bare", "repo", "bare/repo.git"]);
    let digest = |out: &str, source: String| {
        place.collect(out, &[&source], &[]).expect(0);
        place.manifest(out).digest()
    };
    let path = digest("path", repo.display().to_string());
    assert_eq!(digest("url", format!("file://{}", repo.display())), path);
    assert_eq!(digest("bare-set", place.path("bare/repo.git").display().to_string()), path);
    // The branch moves on; the pinned commit stays what it was.
    repository::commit_more(&repo, "later.py", "later = True\n");
    assert_eq!(digest("pinned", format!("{}#{first}", repo.display())), path);
    assert_ne!(digest("moved", repo.display().to_string()), path);
}

#[test]
fn a_missing_repository_a_plain_directory_and_a_missing_revision_are_all_named_at_once() {
    let place = Place::new();
    let repo = place.path("repo");
    repository::commit(&repo, &repository::sources("x", 2));
    fs::create_dir(place.path("plain")).unwrap();
    let nowhere = place.path("nowhere");
    let sources = [
        nowhere.display().to_string(),
        place.path("plain").display().to_string(),
        format!("{}#no-such-branch", repo.display()),
    ];
    let sources: Vec<&str> = sources.iter().map(String::as_str).collect();
    let ended = place.collect("out", &sources, &[]).expect(4);
    ended.says(&[
        "nowhere",
        "no such directory",
        "plain",
        "not a git repository",
        "no revision `no-such-branch`",
    ]);
    assert!(!place.path("out").exists());
}

/// A server that ends with the test.
struct Server {
    child: Child,
    _stdin: Option<ChildStdin>,
    port: u16,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve_http(root: &Path, credentials: Option<&str>) -> Server {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("collect/git_http_server.py");
    let mut command = Command::new("python3");
    command.arg(script).arg(root).args(credentials).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    Server { _stdin: child.stdin.take(), child, port: line.trim().parse().unwrap() }
}

#[test]
fn repositories_come_over_http_and_unchanged_ones_are_not_fetched_again() {
    let place = Place::new();
    repository::commit(&place.path("srv/org/a"), &repository::sources("a", 30));
    repository::commit(&place.path("srv/org/b"), &repository::sources("b", 20));
    let server = serve_http(&place.path("srv"), None);
    let url = |name: &str| format!("http://127.0.0.1:{}/org/{name}/.git", server.port);
    let sources = [url("a"), url("b")];
    let sources: Vec<&str> = sources.iter().map(String::as_str).collect();
    place.collect("out", &sources, &[]).expect(0);
    let manifest = place.manifest("out");
    assert_eq!(manifest.repositories.iter().map(|r| r.files).collect::<Vec<_>>(), [30, 20]);

    // Shallow: the one commit, not its history.
    let modified = || fs::metadata(place.path("out/manifest.json")).unwrap().modified().unwrap();
    let before = modified();
    place.collect("out", &sources, &[]).expect(0);
    assert_eq!(modified(), before, "nothing had changed");
    repository::commit_more(&place.path("srv/org/b"), "more.py", "more = 1\n");
    place.collect("out", &sources, &[]).expect(0);
    assert_eq!(place.manifest("out").repositories[1].files, 21);

    let gone = url("gone");
    place.collect("none", &[&gone], &[]).expect(4).says(&["gone", "not found"]);
}

#[test]
fn a_credential_helper_opens_a_private_repository_and_its_secret_is_nowhere() {
    let place = Place::new();
    repository::commit(&place.path("srv/org/secret"), &repository::sources("s", 5));
    let server = serve_http(&place.path("srv"), Some("me:hunter2hunter2"));
    let url = format!("http://127.0.0.1:{}/org/secret/.git", server.port);
    place.collect("refused", &[&url], &[]).expect(5).says(&["credential"]);

    let helper = "[credential]\n\thelper = \"!f() { echo username=me; echo password=hunter2hunter2; }; f\"\n";
    fs::write(place.path("home/.gitconfig"), helper).unwrap();
    let ended = place.collect("out", &[&url], &[]).expect(0);
    assert!(!ended.output.contains("hunter2"), "{}", ended.output);
    let manifest = fs::read_to_string(place.path("out/manifest.json")).unwrap();
    assert!(!manifest.contains("hunter2"), "{manifest}");
    let kept = git_config_of_cache(&place.path("out.repos"));
    assert!(!kept.contains("hunter2"), "{kept}");
}

fn git_config_of_cache(cache: &Path) -> String {
    let repos = fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().path().join("config"));
    repos.map(|path| fs::read_to_string(path).unwrap_or_default()).collect()
}

#[test]
fn repositories_come_over_ssh_by_a_key_file_or_the_agent_and_a_stranger_host_is_refused() {
    let sshd = "/usr/sbin/sshd";
    if !Path::new(sshd).exists() || !nix::unistd::geteuid().is_root() {
        return skip("needs root and an SSH server (apt-get install openssh-server)");
    }
    let place = Place::new();
    let repo = place.path("srv/repo");
    repository::commit(&repo, &repository::sources("x", 9));
    let key = |path: &str| {
        let path = place.path(path);
        let made =
            Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&path).status();
        assert!(made.unwrap().success());
        fs::read_to_string(path.with_extension("pub")).unwrap()
    };
    let host_key = key("host_key");
    fs::write(place.path("authorized"), key("home/.ssh/id_ed25519")).unwrap();
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = format!(
        "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\n\
         PidFile none\nPermitRootLogin prohibit-password\nSetEnv PATH={}\n",
        place.path("host_key").display(),
        place.path("authorized").display(),
        std::env::var("PATH").unwrap(),
    );
    fs::write(place.path("sshd_config"), config).unwrap();
    fs::create_dir_all("/run/sshd").unwrap();
    let mut command = Command::new(sshd);
    command.args(["-D", "-e", "-f"]).arg(place.path("sshd_config")).stderr(Stdio::piped());
    let mut server = Server { child: command.spawn().unwrap(), _stdin: None, port };
    let log = BufReader::new(server.child.stderr.take().unwrap());
    let mut log = log.lines().map_while(Result::ok);
    assert!(log.any(|line| line.contains("Server listening")), "sshd did not start");
    std::thread::spawn(move || log.for_each(drop));

    let url = format!("ssh://root@127.0.0.1:{}{}", server.port, repo.display());
    place.collect("refused", &[&url], &[]).expect(5).says(&["not trusted", "known_hosts"]);
    let known = format!("[127.0.0.1]:{port} {host_key}");
    fs::write(place.path("home/.ssh/known_hosts"), known).unwrap();
    place.collect("out", &[&url], &[]).expect(0);
    assert_eq!(place.manifest("out").repositories[0].files, 9);
    assert_eq!(place.manifest("out").repositories[0].commit, git(&repo, &["rev-parse", "HEAD"]).trim());

    let elsewhere = place.path("key");
    fs::rename(place.path("home/.ssh/id_ed25519"), &elsewhere).unwrap();
    place.collect("denied", &[&url], &[]).expect(5).says(&["ssh-add"]);

    // The agent has it still.
    let socket = place.path("agent");
    let mut agent = Command::new("ssh-agent");
    agent.args(["-D", "-a"]).arg(&socket).stdout(Stdio::piped());
    let mut agent = Server { child: agent.spawn().unwrap(), _stdin: None, port: 0 };
    let mut line = String::new();
    BufReader::new(agent.child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let added = Command::new("ssh-add").arg("-q").arg(&elsewhere).env("SSH_AUTH_SOCK", &socket).status();
    assert!(added.unwrap().success());
    let mut command = place.command("by-agent", &[&url], &[]);
    command.env("SSH_AUTH_SOCK", &socket);
    Running::start(command).wait().expect(0);
    assert_eq!(place.manifest("by-agent").repositories[0].files, 9);
}

#[test]
fn an_object_that_is_missing_is_named_with_its_path() {
    let place = Place::new();
    let repo = place.path("repo");
    repository::commit(&repo, &repository::sources("x", 3));
    let blob = git(&repo, &["rev-parse", "HEAD:src/x_1.py"]);
    let (folder, file) = blob.trim().split_at(2);
    fs::remove_file(repo.join(".git/objects").join(folder).join(file)).unwrap();
    let ended = place.collect("out", &[repo.to_str().unwrap()], &[]).expect(1);
    ended.says(&["src/x_1.py", blob.trim(), "git fsck"]);
    assert!(!place.path("out").exists());
}
