//! `worker`: the node daemon, the rank, and the tools that need torch.
#![forbid(unsafe_code)]

/// Verbs and exit codes.
mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
