//! The job file. [`JobFile`] is what the user wrote; [`JobSpec`] is what is true.
//!
//! Text becomes a [`tree`] that knows its places; `--set` [`overrides`] are laid over it; the tree
//! is [`read`] into a [`JobFile`]; that is [`resolve`]d, with defaults, into a [`JobSpec`]. Faults
//! of every step are collected and reported together.

pub(crate) mod diagnostic;
pub mod tree;
mod overrides;
mod read;
mod file;
mod location;
mod filters;
mod resolve;
mod spec;

use std::path::Path;

pub use diagnostic::{Diagnostic, Diagnostics, Place, did_you_mean, shown};
pub use file::*;
pub use filters::default_filters;
pub use location::absolute;
pub use read::{At, Field, ManualEntry};
pub use spec::*;

/// Reads a job file: `text` is what `path` holds, `overrides` are `--set` arguments, applied in
/// their order before anything is checked, and `cwd` is the absolute current directory.
///
/// Does no IO: whether the paths exist is for the stages that use them to see.
///
/// # Errors
/// Every fault of the file, each with its place.
pub fn load(path: &Path, text: &str, overrides: &[String], cwd: &Path) -> Result<JobSpec, Diagnostics> {
    let mut sink = diagnostic::Sink::default();
    let spec = match tree::parse(text) {
        Ok(mut root) => {
            for argument in overrides {
                overrides::apply(&mut root, argument, &mut sink);
            }
            match read::read(&root, "", &mut sink) {
                Field::Given(file) => resolve::resolve(&file.value, path, cwd, &mut sink),
                Field::Absent => resolve::resolve(&JobFile::default(), path, cwd, &mut sink),
                Field::Wrong => None,
            }
        }
        Err(fault) => {
            sink.report(&fault.place, fault.message);
            None
        }
    };
    sink.finish(path.display().to_string(), spec)
}

#[cfg(test)]
mod tests;
