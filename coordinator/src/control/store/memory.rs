//! A store that ends with its process: for a job with a coordinator of its own, and for tests, where another
//! coordinator may go on with it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tunefleet_proto::ids::{Attempt, JobId};
use tunefleet_proto::rpc::{AuditRecord, JobEvent};

use super::{AttemptRow, History, JobRow, Loaded, Store, StoreError, WorkerRow, Write};
use crate::control::placement::WorkerName;

/// Rows in memory, shared by their readers.
#[derive(Debug, Clone, Default)]
pub struct Memory(Arc<Mutex<Rows>>);

#[derive(Debug, Clone, Default)]
struct Rows {
    generation: u64,
    jobs: BTreeMap<JobId, JobRow>,
    attempts: BTreeMap<(JobId, Attempt), AttemptRow>,
    events: BTreeMap<JobId, Vec<JobEvent>>,
    workers: BTreeMap<WorkerName, WorkerRow>,
    audit: Vec<AuditRecord>,
}

impl Memory {
    fn rows(&self) -> MutexGuard<'_, Rows> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for Memory {
    fn load(&mut self) -> Result<Loaded, StoreError> {
        let mut rows = self.rows();
        rows.generation += 1;
        Ok(Loaded {
            cluster: "memory".to_owned(),
            generation: rows.generation,
            jobs: rows.jobs.values().cloned().collect(),
            attempts: rows.attempts.values().cloned().collect(),
            workers: rows.workers.values().cloned().collect(),
        })
    }

    fn commit(&mut self, writes: &[Write]) -> Result<(), StoreError> {
        let mut rows = self.rows();
        for write in writes.iter().cloned() {
            match write {
                Write::Job(row) => drop(rows.jobs.insert(row.id.clone(), row)),
                Write::Attempt(row) => drop(rows.attempts.insert((row.job.clone(), row.attempt), row)),
                Write::Event(event) => {
                    let events = rows.events.entry(JobId(event.job.clone())).or_default();
                    let next = events.last().map_or(0, |last| last.sequence) + 1;
                    if event.sequence != next {
                        return Err(StoreError::Reader(format!(
                            "event {} where {next} comes",
                            event.sequence
                        )));
                    }
                    events.push(event);
                }
                Write::Worker(row) => drop(rows.workers.insert(row.name.clone(), row)),
                Write::Audit(record) => rows.audit.push(record),
                Write::Forget(job) => {
                    rows.jobs.remove(&job);
                    rows.attempts.retain(|(of, _), _| *of != job);
                    rows.events.remove(&job);
                }
                Write::ForgetAudit { before_unix_ms } => {
                    rows.audit.retain(|record| record.unix_ms >= before_unix_ms);
                }
            }
        }
        Ok(())
    }

    fn waits_for_a_disk(&self) -> bool {
        false
    }
}

impl History for Memory {
    fn events(&self, job: &JobId, after: u64, limit: usize) -> Result<Vec<JobEvent>, StoreError> {
        let rows = self.rows();
        let events = rows.events.get(job).map(Vec::as_slice).unwrap_or_default();
        let first = events.partition_point(|event| event.sequence <= after);
        Ok(events.iter().skip(first).take(limit).cloned().collect())
    }

    fn audit(&self, since_unix_ms: u64, limit: usize) -> Result<Vec<AuditRecord>, StoreError> {
        let rows = self.rows();
        let since: Vec<_> = rows.audit.iter().filter(|record| record.unix_ms >= since_unix_ms).collect();
        Ok(since.iter().skip(since.len().saturating_sub(limit)).map(|record| (*record).clone()).collect())
    }
}
