//! The control plane: takes jobs, finds slots, drives stages, tells those who watch.
//!
//! `job` (what follows from a fact) with the `task` that runs, `rank` (how ranks end), `hang` (whom
//! the others wait for), `placement` and `workers` (where ranks run) and `stage` (what is done
//! already) know no protocol. `plane` is the one task that
//! owns all jobs (each an `entry`) and workers; `service` is gRPC in front of it. State is kept in memory.

mod entry;
mod events;
mod hang;
mod job;
mod metrics_log;
mod placement;
mod plane;
mod rank;
mod service;
mod stage;
pub mod store;
mod task;
mod workers;

pub use hang::listed as listed_ranks;
pub use metrics_log::FILE as METRICS_LOG_FILE;
pub use plane::Plane;
pub use service::{ServeError, Server, bind};
