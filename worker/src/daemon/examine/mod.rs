//! Is this machine fit to train? Asked by `coordinator doctor`, and by `worker doctor` on the machine itself.
//!
//! `local` looks at what a machine has, `gpus` at its GPUs, `probe` at the way to the other workers.

pub(super) mod gpus;
mod local;
mod probe;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::net::TcpListener;
use tunefleet_proto::rpc::finding::Verdict;
use tunefleet_proto::rpc::{Examine, Examined, Finding, worker_message};

use super::ranks::Ranks;

/// Measuring takes all of a machine for a moment.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
/// How long others may take to probe this worker.
const PROBED_FOR: Duration = Duration::from_secs(120);

/// What is looked at.
pub struct Subject {
    /// Ranks that this worker has room for.
    pub slots: u32,
    /// GPUs that ranks would see.
    pub gpus: u32,
    /// Where the journal is.
    pub state: PathBuf,
    /// Whether ranks run here: then nothing is measured, so as not to disturb them.
    pub is_busy: bool,
}

impl Subject {
    fn of(ranks: &Ranks) -> Self {
        Subject {
            slots: ranks.node.slots,
            gpus: ranks.node.gpus,
            state: ranks.journal().dir().to_owned(),
            is_busy: !ranks.tasks().is_empty(),
        }
    }
}

/// What a machine has, and whether that will do.
pub async fn findings(subject: Subject) -> Vec<Finding> {
    let (gpus, is_busy) = (subject.gpus, subject.is_busy);
    let looked = tokio::task::spawn_blocking(move || {
        let mut found = local::findings(&subject);
        found.extend(gpus::findings(subject.gpus));
        found
    });
    let mut found = looked.await.unwrap_or_default();
    found.push(local::collectives(gpus, is_busy).await);
    found
}

/// Answers the coordinator, in its own time.
pub(super) fn answer(ranks: &Arc<Ranks>, asked: Examine) {
    let ranks = Arc::clone(ranks);
    tokio::spawn(async move {
        let Examine { request, secret, probes, peers } = asked;
        let (findings, probe_address) = match probes {
            true => (probe::peers(&ranks.node.name, peers, &secret).await, String::new()),
            false => {
                let (address, listens) = listen(ranks.node.address, secret).await;
                let mut found = match ONE_AT_A_TIME.try_lock() {
                    Ok(_alone) => findings(Subject::of(&ranks)).await,
                    Err(_) => {
                        let detail = "somebody else has just asked, and is being answered".to_owned();
                        vec![finding("machine", Verdict::Unknown, detail)]
                    }
                };
                found.extend(listens);
                (found, address)
            }
        };
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        ranks.say_once(worker_message::Body::Examined(Examined {
            request,
            findings,
            probe_address,
            unix_ms,
        }));
    });
}

/// Listens for probes of other workers, for a while; where, or why not.
async fn listen(address: IpAddr, secret: Vec<u8>) -> (String, Option<Finding>) {
    let bound = TcpListener::bind((address, 0)).await;
    match bound.and_then(|listener| Ok((listener.local_addr()?, listener))) {
        Ok((address, listener)) => {
            tokio::spawn(tokio::time::timeout(PROBED_FOR, probe::serve(listener, secret)));
            (address.to_string(), None)
        }
        Err(error) => {
            let detail =
                format!("{address} is not an address of this machine ({error}): give one by --advertise");
            (String::new(), Some(finding("network", Verdict::Critical, detail)))
        }
    }
}

fn finding(check: &str, verdict: Verdict, detail: String) -> Finding {
    Finding { place: String::new(), check: check.to_owned(), verdict: verdict.into(), detail }
}
