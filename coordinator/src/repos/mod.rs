//! Repositories: from a location in the job file to the text of its files, read from the object store.
//!
//! organisation -> location -> fetch (with credentials, with patience) -> tree walk -> filters -> duplicates -> files.

/// The repositories of an organisation or a user, by a forge's API.
pub mod organization;
/// Where a repository is, and what it is called.
pub mod location;
/// Proof of identity for remotes: tokens, ssh agent, key files, git's credential helpers.
pub mod credentials;
/// Servers that hang or break off.
mod patience;
/// From a location to a pinned commit in a local object store.
pub mod fetch;
/// What was changed since a day.
pub mod history;
/// What `.gitattributes` says of a path.
pub mod attributes;
/// The paths of a commit, in tree order.
mod tree;
/// Which files are kept, and why the others are not.
pub mod filter;
/// Licences of repositories and files.
mod licenses;
/// Bytes to text.
mod encoding;
/// Keys, passwords and addresses of people in text.
pub mod secrets;
/// Text that is no code worth learning.
mod text;
/// Jupyter notebooks as text.
mod notebook;
/// Texts of evaluation tasks.
pub mod contamination;
/// Files that say what an earlier one has said.
pub mod duplicates;
/// The kept files of a commit, read in parallel and handed on in order.
pub mod files;
/// What goes wrong with a repository.
mod error;

pub use error::Error;
