//! Small git repositories.

use std::path::{Path, PathBuf};

use git2::{IndexAddOption, Repository, Signature, Time};

/// Makes a repository of one commit at `dir`. The commit is the same on every machine and day.
pub fn commit(dir: &Path, files: &[(String, String)]) -> PathBuf {
    let files: Vec<_> = files.iter().map(|(path, text)| (path.clone(), text.clone().into_bytes())).collect();
    commit_bytes(dir, &files)
}

/// As [`commit`], of files that need not be text.
pub fn commit_bytes(dir: &Path, files: &[(String, Vec<u8>)]) -> PathBuf {
    let repository = Repository::init(dir).unwrap();
    for (path, content) in files {
        let path = dir.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    commit_all(&repository, "Begin");
    dir.to_owned()
}

/// Adds a commit with one more file.
pub fn commit_more(dir: &Path, path: &str, content: &str) {
    std::fs::write(dir.join(path), content).unwrap();
    commit_all(&Repository::open(dir).unwrap(), "Go on");
}

fn commit_all(repository: &Repository, message: &str) {
    let mut index = repository.index().unwrap();
    index.add_all(["*"], IndexAddOption::FORCE, None).unwrap();
    index.write().unwrap();
    let tree = repository.find_tree(index.write_tree().unwrap()).unwrap();
    let author = Signature::new("Test", "test@example.invalid", &Time::new(1_700_000_000, 0)).unwrap();
    let parent = repository.head().ok().map(|head| head.peel_to_commit().unwrap());
    let parents: Vec<_> = parent.iter().collect();
    repository.commit(Some("HEAD"), &author, &author, message, &tree, &parents).unwrap();
}

/// So many small source files with something to learn in them; another `dialect`, other names.
pub fn sources(dialect: &str, files: usize) -> Vec<(String, String)> {
    (0..files).map(|i| (format!("src/{dialect}_{i}.py"), source(dialect, i))).collect()
}

fn source(dialect: &str, file: usize) -> String {
    let mut text = format!("\"\"\"Part {file} of {dialect}.\"\"\"\n\nimport math\n\n");
    for function in 0..6 {
        let (a, b) = (file * 7 + function, function * 3 + 1);
        text += &format!(
            "def {dialect}_{function}(values, limit={a}):\n    total = {b}\n    for value in values:\n        \
             if value > limit:\n            total += math.sqrt(value) * {b}\n    return total\n\n\n"
        );
    }
    text
}
