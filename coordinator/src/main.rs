//! `coordinator`: the command line, the control plane, repositories and datasets. No torch.
#![forbid(unsafe_code)]

/// `coordinator audit`: who asked for what.
mod audit;
/// `coordinator certs`: certificates of a coordinator and its workers.
mod certs;
/// Verbs and exit codes.
mod cli;
/// `coordinator collect`: repositories to a dataset.
mod collect;
/// `coordinator compare`: runs beside each other.
mod compare;
/// How verbs reach a coordinator.
mod connect;
/// `coordinator convert`: a job file from the settings of other trainers.
mod convert;
/// The control plane: jobs, workers, stages.
mod control;
/// Segments, their manifest, and what is in them.
mod dataset;
/// `coordinator doctor`: are the machines fit to train?
mod doctor;
/// `coordinator events`: what happened to a job.
mod events;
/// What this machine has.
mod hardware;
/// Pages of one file.
mod html;
/// `coordinator init`: a job file for the user's own code.
mod init;
/// The arguments that name a job file, and reading it.
mod job_file;
/// The verbs that ask about jobs.
mod jobs;
/// `coordinator launch`: a job from repositories to an exported model.
mod launch;
/// `coordinator logs`: what ranks wrote.
mod logs;
/// What the coordinator shows to Prometheus.
mod metrics;
/// Metrics, discovery and health over plain HTTP.
mod monitor;
/// `coordinator plan`: what a job needs, before anything runs.
mod plan;
/// Progress of long work on stderr.
mod progress;
/// Repositories: sources, git access, filters, notebooks.
mod repos;
/// Datasets that others made, as sources.
mod tables;
/// `coordinator serve`: the control plane as a program of its own.
mod serve;
/// `coordinator store`: the state as a file.
mod store_verb;
/// Spans for OpenTelemetry.
mod traces;
/// `coordinator tokens`: who may ask for what.
mod tokens;
/// `coordinator validate`: what is wrong with a job file.
mod validate;
/// `coordinator version`: which programs speak to each other.
mod version;
/// `coordinator workers`, `drain`, `undrain`.
mod workers;

fn main() -> std::process::ExitCode {
    cli::main()
}
