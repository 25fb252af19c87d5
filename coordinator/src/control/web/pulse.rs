//! All jobs and workers, as rows of JSON, looked at twice a second while anybody watches: once for all watchers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use tunefleet_proto::rpc::{JobStatus, WorkerState, WorkerStatus};

use crate::control::plane::{Message, Plane};
use crate::jobs;

const PERIOD: Duration = Duration::from_millis(500);

/// Rows by name.
pub type Rows = BTreeMap<String, Arc<str>>;

/// One moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Jobs, without their attempts.
    pub jobs: Rows,
    /// Workers.
    pub workers: Rows,
}

/// What looks.
pub struct Pulse {
    newest: Arc<watch::Sender<Option<Arc<Snapshot>>>>,
}

impl Pulse {
    /// Begins; it ends with the plane or with this.
    pub fn start(plane: Plane) -> Self {
        let newest = Arc::new(watch::Sender::new(None));
        let weak = Arc::downgrade(&newest);
        let plane = plane.downgrade();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(PERIOD).await;
                let Some(newest) = weak.upgrade() else { return };
                if newest.receiver_count() == 0 {
                    // What is old is shown to nobody.
                    newest.send_replace(None);
                    continue;
                }
                let Some(plane) = plane.upgrade() else { return };
                let jobs = plane.ask(|reply| Message::List { reply }).await;
                let workers = plane.ask(|reply| Message::Workers { reply }).await;
                let (Ok(jobs), Ok(workers)) = (jobs, workers) else { return };
                let snapshot = Snapshot {
                    jobs: jobs.iter().map(|job| (job.job.clone(), job_row(job).to_string().into())).collect(),
                    workers: workers
                        .iter()
                        .map(|worker| (worker.name.clone(), worker_row(worker).to_string().into()))
                        .collect(),
                };
                newest.send_replace(Some(Arc::new(snapshot)));
            }
        });
        Pulse { newest }
    }

    /// One more who watches.
    pub fn watch(&self) -> watch::Receiver<Option<Arc<Snapshot>>> {
        self.newest.subscribe()
    }
}

/// What has changed between what a browser has and what there is, or nothing.
pub fn change(shown: Option<&Rows>, now: &Rows) -> Option<String> {
    let changed = now.iter().filter(|(name, row)| shown.and_then(|shown| shown.get(*name)) != Some(row));
    let changed: Vec<&str> = changed.map(|(_, row)| row.as_ref()).collect();
    let gone: Vec<&String> =
        shown.into_iter().flat_map(BTreeMap::keys).filter(|name| !now.contains_key(*name)).collect();
    if shown.is_some() && changed.is_empty() && gone.is_empty() {
        return None;
    }
    let gone = Value::from_iter(gone.into_iter().map(String::as_str));
    Some(format!("{{\"whole\":{},\"changed\":[{}],\"gone\":{gone}}}", shown.is_none(), changed.join(",")))
}

fn job_row(status: &JobStatus) -> Value {
    let mut row = jobs::to_json(status);
    if let Some(row) = row.as_object_mut() {
        row.remove("attempts");
        // To the second: a row that says the same is not sent again.
        row.insert("remaining_seconds".to_owned(), json!(status.remaining_seconds.round()));
        row.insert("goodput_ratio".to_owned(), json!((status.goodput_ratio * 1000.0).round() / 1000.0));
    }
    row
}

fn worker_row(status: &WorkerStatus) -> Value {
    let known = status.registered.clone().unwrap_or_default();
    let is_silent = matches!(status.state(), WorkerState::Suspect | WorkerState::Lost);
    let mut jobs: Vec<&str> = status.tasks.iter().map(|task| task.job.as_str()).collect();
    jobs.dedup();
    json!({
        "name": status.name,
        "state": status.state().name(),
        "slots": known.slots,
        "used_slots": status.used_slots,
        "gpus": known.gpus,
        "gpu_name": known.devices.first().map(|device| device.name.as_str()).unwrap_or_default(),
        "cores": known.cores,
        "memory_bytes": known.memory_bytes,
        "silent_seconds": if is_silent { status.silent_ms / 1000 } else { 0 },
        "jobs": jobs,
        "version": known.version,
        "detail": status.detail,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_browser_is_told_all_at_first_and_then_only_what_is_different() {
        let rows = |rows: &[(&str, &str)]| -> Rows {
            rows.iter().map(|(name, row)| ((*name).to_owned(), Arc::from(*row))).collect()
        };
        let first = rows(&[("a", "1"), ("b", "2")]);
        assert_eq!(change(None, &first).unwrap(), r#"{"whole":true,"changed":[1,2],"gone":[]}"#);
        assert_eq!(change(Some(&first), &first), None);
        let second = rows(&[("b", "3")]);
        assert_eq!(change(Some(&first), &second).unwrap(), r#"{"whole":false,"changed":[3],"gone":["a"]}"#);
        assert!(change(None, &rows(&[])).is_some(), "nothing is something to know");
    }
}
