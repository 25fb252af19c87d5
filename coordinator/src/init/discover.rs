//! From what the user names to repositories: a URL, a repository, or a directory of repositories.

use std::path::{Path, PathBuf};

/// How far below a directory its repositories are looked for: `host/org/team/repo`.
const MAX_DEPTH: usize = 4;
/// Directories that are looked into before giving up: init should answer at once.
const MAX_DIRECTORIES: usize = 20_000;

/// Why there are no repositories.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path is not there.
    #[error("{path}: {cause}")]
    Read {
        /// What the user named.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// No repository.
    #[error(
        "{0}: neither a git repository nor a directory with repositories at most {MAX_DEPTH} levels below; \
         make one with git init and git commit, or name another path"
    )]
    None(PathBuf),
    /// A path that a job file cannot hold.
    #[error("{0}: the path must be UTF-8: it becomes part of the dataset's manifest")]
    NotUtf8(PathBuf),
}

/// The repositories that `source` stands for: local ones as absolute paths, URLs as they are.
pub fn repositories(source: &str, cwd: &Path) -> Result<Vec<String>, Error> {
    let path = cwd.join(source);
    let is_url = source.contains("://") || (source.contains(':') && !path.exists());
    if is_url {
        return Ok(vec![source.to_owned()]);
    }
    let path = path.canonicalize().map_err(|cause| Error::Read { path: source.into(), cause })?;
    let mut found = match path.ancestors().find(|dir| is_repository(dir)) {
        // A directory inside a repository stands for the repository: it is what can be collected.
        Some(repository) => vec![repository.to_owned()],
        None => below(&path),
    };
    if found.is_empty() {
        return Err(Error::None(path));
    }
    found.sort();
    found
        .into_iter()
        .map(|path| path.into_os_string().into_string().map_err(|p| Error::NotUtf8(p.into())))
        .collect()
}

/// A work tree (whose `.git` is a file in linked ones), or a bare repository.
fn is_repository(dir: &Path) -> bool {
    dir.join(".git").exists()
        || (dir.join("HEAD").is_file() && dir.join("objects").is_dir() && dir.join("refs").is_dir())
}

fn below(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut looked_at = 0;
    let mut queue = std::collections::VecDeque::from([(root.to_owned(), 0)]);
    while let Some((dir, depth)) = queue.pop_front() {
        looked_at += 1;
        if is_repository(&dir) {
            found.push(dir);
            continue;
        }
        if depth == MAX_DEPTH || looked_at > MAX_DIRECTORIES {
            continue;
        }
        // What cannot be read is passed over: it could not be collected either.
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            if !hidden && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                queue.push_back((entry.path(), depth + 1));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::fs::create_dir_all;

    use super::*;

    #[test]
    fn directories_lead_to_the_repositories_in_around_and_below_them() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        for dir in [
            "team/b/.git",
            "team/a/.git",
            "team/a/src",
            "team/.hidden/c/.git",
            "empty/x",
            "bare/refs",
            "bare/objects",
        ] {
            create_dir_all(root.join(dir)).unwrap();
        }
        std::fs::write(root.join("bare/HEAD"), "ref: refs/heads/main\n").unwrap();
        let path = |text: &str| root.join(text).to_str().unwrap().to_owned();
        assert_eq!(repositories("team", &root).unwrap(), [path("team/a"), path("team/b")]);
        assert_eq!(repositories("team/a/src", &root).unwrap(), [path("team/a")]);
        assert_eq!(repositories("./bare", &root).unwrap(), [path("bare")]);
        for url in ["https://host/org/repo", "git@host:org/repo"] {
            assert_eq!(repositories(url, &root).unwrap(), [url]);
        }
        assert!(matches!(repositories("empty", &root), Err(Error::None(_))));
        assert!(matches!(repositories("absent", &root), Err(Error::Read { .. })));
    }
}
