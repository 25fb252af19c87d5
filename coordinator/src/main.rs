//! `coordinator`: the command line, the control plane, repositories and datasets. No torch.
#![forbid(unsafe_code)]

/// Verbs and exit codes.
mod cli;
/// `coordinator init`: a job file for the user's own code.
mod init;
/// `coordinator plan`: what a job needs, before anything runs.
mod plan;
/// `coordinator validate`: what is wrong with a job file.
mod validate;

fn main() -> std::process::ExitCode {
    cli::main()
}
