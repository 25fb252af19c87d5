//! The node daemon: owns slots, dials the coordinator, runs ranks as child processes.

/// Command line of `worker daemon`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// What can end the daemon.
#[derive(Debug, thiserror::Error)]
pub enum Error {}

/// Runs until the coordinator or the parent process is gone.
///
/// # Errors
/// See [`Error`].
pub fn run(_args: Args) -> Result<(), Error> {
    Ok(())
}
