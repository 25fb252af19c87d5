//! `coordinator`: the command line, the control plane, repositories and datasets. No torch.
#![forbid(unsafe_code)]

/// Verbs and exit codes.
mod cli;
/// How verbs reach a coordinator.
mod connect;
/// The control plane: jobs, workers, stages.
mod control;
/// What this machine has.
mod hardware;
/// `coordinator init`: a job file for the user's own code.
mod init;
/// The arguments that name a job file, and reading it.
mod job_file;
/// The verbs that ask about jobs.
mod jobs;
/// `coordinator launch`: a job from repositories to an exported model.
mod launch;
/// What the coordinator shows to Prometheus.
mod metrics;
/// `coordinator plan`: what a job needs, before anything runs.
mod plan;
/// `coordinator serve`: the control plane as a program of its own.
mod serve;
/// `coordinator validate`: what is wrong with a job file.
mod validate;

fn main() -> std::process::ExitCode {
    cli::main()
}
