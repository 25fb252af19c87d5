//! One rank of one attempt: a session to its daemon, and the task it was assigned.

/// Command line of `worker rank`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// What can end a rank badly.
#[derive(Debug, thiserror::Error)]
pub enum Error {}

/// Runs the assignment and reports how it went.
///
/// # Errors
/// See [`Error`].
pub fn run(_args: Args) -> Result<(), Error> {
    Ok(())
}
