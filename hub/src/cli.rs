//! The command line of a push, a part of other verbs'.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::target::{self, RepoId, RepoKind, Target};
use super::{Error, push};

/// How a push goes; what takes them has an argument `push` that says where to.
#[derive(Debug, Clone, clap::Args)]
pub struct PushOptions {
    /// Make the repository private, where it has to be made.
    #[arg(long, requires = "push")]
    private: bool,
    /// Branch to push to, which is made where it is absent.
    #[arg(long, requires = "push", default_value = "main")]
    revision: String,
    /// Address of the hub; else what HF_ENDPOINT says, else the public one.
    #[arg(long, requires = "push", value_name = "URL")]
    endpoint: Option<String>,
    /// File with the token to push with; else HF_TOKEN, else the one of `hf auth login`.
    #[arg(long, requires = "push", value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl PushOptions {
    /// A repository as the target of a push.
    ///
    /// # Errors
    /// [`Error::Setting`], before anything is done.
    pub fn target(&self, kind: RepoKind, repo: RepoId) -> Result<Target, Error> {
        let variable = |name: &str| std::env::var(name).ok();
        Ok(Target {
            kind,
            repo,
            private: self.private,
            revision: target::revision(&self.revision)?,
            endpoint: target::endpoint(self.endpoint.as_deref(), variable)?,
            token: target::token(self.token_file.as_deref(), variable)?,
        })
    }
}

/// Where what was made goes, if anywhere.
#[derive(Debug, Clone, clap::Args)]
pub struct PushArgs {
    /// Push what was written to this repository of the Hugging Face hub, which is made where it is absent.
    #[arg(long, value_name = "OWNER/NAME")]
    push: Option<RepoId>,
    #[command(flatten)]
    options: PushOptions,
}

impl PushArgs {
    /// The target, where a push was asked for.
    ///
    /// # Errors
    /// [`Error::Setting`], before anything is done.
    pub fn target(&self) -> Result<Option<Target>, Error> {
        let Some(repo) = self.push.clone() else { return Ok(None) };
        self.options.target(RepoKind::Model, repo).map(Some)
    }
}

/// Pushes and says on stdout what was done.
///
/// # Errors
/// As [`push`](super::push).
pub fn push_and_tell(dir: &Path, target: &Target) -> Result<(), Error> {
    let pushed = push(dir, target)?;
    let line = match &pushed.commit {
        Some(commit) => format!("{}: commit {commit}", pushed.url),
        None => format!("{}: has these files already", pushed.url),
    };
    // A reader that has gone away wants no more.
    let _ = writeln!(std::io::stdout(), "{line}");
    Ok(())
}
