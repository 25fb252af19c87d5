//! Repositories: from a location in the job file to the text of its files, read from the object store.
//!
//! location -> fetch (with credentials) -> tree walk -> filters -> duplicates -> files.

/// Where a repository is, and what it is called.
pub mod location;
/// Proof of identity for remotes: ssh agent, key files, git's credential helpers.
mod credentials;
/// From a location to a pinned commit in a local object store.
pub mod fetch;
/// The paths of a commit, in tree order.
mod tree;
/// Which files are kept, and why the others are not.
pub mod filter;
/// Keys, passwords and addresses of people in text.
pub mod secrets;
/// Text that is no code worth learning.
mod text;
/// Code cells of Jupyter notebooks.
mod notebook;
/// Files that say what an earlier one has said.
pub mod duplicates;
/// The kept files of a commit, read in parallel and handed on in order.
pub mod files;
/// What goes wrong with a repository.
mod error;

pub use error::Error;
