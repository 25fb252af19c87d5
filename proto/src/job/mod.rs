//! The job file. [`JobFile`](file) is what the user wrote; [`JobSpec`] is what is true.

mod spec;

pub use spec::*;
