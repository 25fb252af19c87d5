//! The dataset directory: how rows become segments, and how a whole dataset replaces another.
//!
//! split -> segment (one file) -> writer (all files) -> staging (the directory) ; reader goes the other way.

/// Which files are held out.
pub mod split;
/// One file of rows, hashed while it is written.
mod segment;
/// Rows in, segments and manifest out.
pub mod writer;
/// A directory that replaces another as a whole.
pub mod staging;
/// The manifest on disk.
pub mod manifest;
/// Segments, checked against their manifest.
pub mod reader;
/// What is in a dataset.
pub mod report;
/// A report as a page.
mod page;
/// What differs between two datasets.
mod diff;
/// A dataset to the hub.
mod push;
/// `coordinator dataset`.
pub mod inspect;
/// What goes wrong with a dataset.
mod error;

pub use error::Error;
