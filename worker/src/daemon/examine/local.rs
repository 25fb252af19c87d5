//! What a machine has: programs, memory, disk, limits, and how fast its ranks speak to each other.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statvfs::statvfs;
use tunefleet_proto::rpc::Finding;
use tunefleet_proto::rpc::finding::Verdict;
use tunefleet_sandbox::{Isolation, Limits, Program, Sandbox};

use super::{Subject, finding};
use crate::comm::nccl;

const GIB: f64 = (1u64 << 30) as f64;
/// NCCL keeps its buffers there: with the 64 MiB that containers have by default it fails.
const SHARED_MEMORY_BYTES: u64 = 1 << 30;
/// Journal, spool and last words.
const STATE_BYTES: u64 = 1 << 30;
/// Ranks, their logs, connections to all peers.
const DESCRIPTORS: u64 = 4096;
/// How long measuring collectives may take: libtorch and CUDA start slowly.
const COLLECTIVES_LIMIT: Duration = Duration::from_secs(90);

pub fn findings(subject: &Subject) -> Vec<Finding> {
    vec![
        keeper(),
        sandbox(),
        shared_memory(free_bytes(Path::new("/dev/shm")), subject.gpus),
        disk(free_bytes(&subject.state), &subject.state),
        memory(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default(), subject.slots),
        descriptors(getrlimit(Resource::RLIMIT_NOFILE).map(|(soft, _)| soft).unwrap_or(0)),
    ]
}

fn free_bytes(dir: &Path) -> Result<u64, String> {
    let stat = statvfs(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / GIB)
}

fn keeper() -> Finding {
    match tunefleet_keeper::find() {
        Some(path) => finding("keeper", Verdict::Ok, path.display().to_string()),
        None => {
            let detail = "no program `keeper` beside this one or on PATH: ranks cannot be started".to_owned();
            finding("keeper", Verdict::Critical, detail)
        }
    }
}

/// Whether a job may run programs that its model writes.
fn sandbox() -> Finding {
    let nothing = Program { argv: vec!["/bin/true".to_owned()], readable: Vec::new(), stdin: String::new() };
    let ran = Sandbox::find(Isolation::Full, Limits::default()).and_then(|sandbox| sandbox.run(&nothing));
    match ran {
        Ok(_) => finding("sandbox", Verdict::Ok, "programs that models write are kept apart".to_owned()),
        Err(error) => {
            let detail = format!("{error}: jobs that evaluate with programs end there");
            finding("sandbox", Verdict::Warning, detail)
        }
    }
}

fn shared_memory(free: Result<u64, String>, gpus: u32) -> Finding {
    let (verdict, detail) = match free {
        Ok(free) if gpus < 2 => {
            (Verdict::Ok, format!("{} free in /dev/shm; not needed with {gpus} GPUs", gib(free)))
        }
        Ok(free) if free >= SHARED_MEMORY_BYTES => (Verdict::Ok, format!("{} free in /dev/shm", gib(free))),
        Ok(free) => {
            let detail = format!(
                "{} free in /dev/shm: NCCL fails with so little; give the container {} or more (`--shm-size`, or an \
                 emptyDir in memory)",
                gib(free),
                gib(SHARED_MEMORY_BYTES)
            );
            (Verdict::Critical, detail)
        }
        Err(error) => (Verdict::Unknown, error),
    };
    finding("shared memory", verdict, detail)
}

fn disk(free: Result<u64, String>, dir: &Path) -> Finding {
    let (verdict, detail) = match free {
        Ok(free) => {
            let detail = format!("{} free for the journal in {}", gib(free), dir.display());
            let verdict = match free {
                free if free < STATE_BYTES / 10 => Verdict::Critical,
                free if free < STATE_BYTES => Verdict::Warning,
                _ => Verdict::Ok,
            };
            (verdict, detail)
        }
        Err(error) => (Verdict::Unknown, error),
    };
    finding("disk", verdict, detail)
}

/// `meminfo` is the text of /proc/meminfo.
fn memory(meminfo: &str, slots: u32) -> Finding {
    let bytes = |key: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
    };
    let (verdict, detail) = match (bytes("MemAvailable:"), bytes("MemTotal:")) {
        (Some(available), Some(total)) => {
            let detail = format!("{} of {} free, for {slots} ranks", gib(available), gib(total));
            // Something else fills this machine.
            let verdict = if available < total / 2 { Verdict::Warning } else { Verdict::Ok };
            (verdict, detail)
        }
        _ => (Verdict::Unknown, "/proc/meminfo does not tell".to_owned()),
    };
    finding("memory", verdict, detail)
}

fn descriptors(limit: u64) -> Finding {
    let verdict = if limit < DESCRIPTORS { Verdict::Warning } else { Verdict::Ok };
    let hint = if limit < DESCRIPTORS { ": raise it to 4096 or more (`LimitNOFILE=` in a unit)" } else { "" };
    finding("open files", verdict, format!("at most {limit}{hint}"))
}

/// Measures in a process of its own: this one holds nothing of libtorch that could go wrong.
pub async fn collectives(gpus: u32, is_busy: bool) -> Finding {
    let (verdict, detail) = if is_busy {
        (Verdict::Unknown, "not measured: ranks run here".to_owned())
    } else if gpus == 1 {
        (Verdict::Ok, "one GPU has nobody to speak to here".to_owned())
    } else {
        measured(gpus).await
    };
    finding("collectives", verdict, detail)
}

async fn measured(gpus: u32) -> (Verdict, String) {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return (Verdict::Unknown, format!("finding this program: {error}")),
    };
    let mut command = tokio::process::Command::new(program);
    command.args(["measure", "--link", "--gpus", &gpus.to_string()]).envs(nccl::SETTINGS);
    command.stdin(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    match tokio::time::timeout(COLLECTIVES_LIMIT, command.output()).await {
        Ok(Ok(output)) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            let rate = text.parse::<f64>().map(|rate| format!("{:.2} GB/s", rate / 1e9)).unwrap_or(text);
            let between =
                if gpus > 1 { format!("{gpus} GPUs over NCCL") } else { "two ranks over TCP".to_owned() };
            (Verdict::Ok, format!("{rate} from each rank between {between}"))
        }
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().last().unwrap_or_default().to_owned();
            (Verdict::Critical, format!("{}: {last}", output.status))
        }
        Ok(Err(error)) => (Verdict::Unknown, error.to_string()),
        Err(_) => (Verdict::Critical, format!("no result in {} s: they hang", COLLECTIVES_LIMIT.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_shared_memory_is_critical_only_where_nccl_needs_it() {
        let of = |free, gpus| shared_memory(Ok(free), gpus).verdict();
        assert_eq!(of(64 << 20, 8), Verdict::Critical);
        assert_eq!(of(64 << 20, 1), Verdict::Ok);
        assert_eq!(of(2 << 30, 8), Verdict::Ok);
        assert_eq!(shared_memory(Err("gone".to_owned()), 8).verdict(), Verdict::Unknown);
    }

    #[test]
    fn a_machine_that_something_else_fills_is_warned_of() {
        let of = |available: u64| {
            let text = format!("MemTotal:       1000 kB\nMemFree: 1 kB\nMemAvailable:    {available} kB\n");
            memory(&text, 2).verdict()
        };
        assert_eq!((of(900), of(400)), (Verdict::Ok, Verdict::Warning));
        assert_eq!(memory("", 2).verdict(), Verdict::Unknown);
    }

    #[test]
    fn a_disk_and_a_limit_of_descriptors_have_a_least() {
        let of = |free| disk(Ok(free), Path::new("/state")).verdict();
        assert_eq!(
            [of(2 << 30), of(500 << 20), of(50 << 20)],
            [Verdict::Ok, Verdict::Warning, Verdict::Critical]
        );
        assert_eq!(descriptors(1024).verdict(), Verdict::Warning);
        assert_eq!(descriptors(65536).verdict(), Verdict::Ok);
    }
}
