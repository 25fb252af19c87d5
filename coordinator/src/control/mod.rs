//! The control plane: takes jobs, finds slots, drives stages, tells those who watch.
//!
//! `job` (one attempt, as a machine of facts and effects) with the `task` that runs, `rank` (how ranks end) and
//! `hang` (whom the others wait for); `entry` (a job over its attempts), `restart` (whether another is worth it),
//! `budget` (how long a rank may take), `workers`, `placement` and `queue` (where ranks run), all in the `fleet`:
//! none of these does IO. `store` keeps what the fleet says, `plane` is the one task that owns both and does what
//! follows, with `work` and `output` for what touches files; `service` is gRPC in front of it and `web` a page for people;
//! `relay` passes on what workers answer in pieces, `doctor` asks them about their machines, `goodput` and `figures` are
//! what metrics are made of, with what `telemetry` counts. Who reaches the service comes through `listen`
//! (connections, with `tls`) and the `guard`, who knows from `access` who may do what.

mod access;
mod budget;
mod doctor;
mod entry;
mod event_file;
mod events;
mod fleet;
mod guard;
mod hang;
mod job;
mod listen;
mod figures;
mod goodput;
mod metrics_log;
mod output;
mod placement;
mod plane;
mod queue;
mod rank;
mod relay;
mod restart;
mod service;
mod settings;
#[cfg(test)]
mod sim;
mod stage;
pub mod store;
mod streams;
mod task;
mod telemetry;
mod tls;
mod web;
mod work;
mod workers;

pub use access::{Access, AccessError, Grants, Role};
pub use figures::{Figures, JobFigures};
pub use goodput::Lost;
pub use hang::listed as listed_ranks;
pub use metrics_log::FILE as METRICS_LOG_FILE;
pub use plane::{Plane, StartError};
pub use service::{Door, ServeError, Server, bind};
pub use settings::Settings;
pub use tls::{Certificate, TlsFiles, certificates};
