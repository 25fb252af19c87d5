//! The first process of a sandbox: it gives up what a program must not have, one thing after the other, and becomes the
//! program.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use caps::CapSet;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::sethostname;
use serde::{Deserialize, Serialize};

use crate::{Isolation, Limits, filter, root};

/// Files that are open at once.
const OPEN_FILES: u64 = 64;

/// What this process is told, as an argument.
#[derive(Debug, Serialize, Deserialize)]
pub struct Orders {
    /// Executable and arguments.
    pub argv: Vec<String>,
    /// What it may read.
    pub readable: Vec<std::path::PathBuf>,
    /// What it may take.
    pub limits: Limits,
    /// How far it is kept apart.
    pub isolation: Isolation,
}

/// Becomes the program; only a failure comes back.
pub fn run(orders: &[u8]) -> String {
    let orders: Orders = match serde_json::from_slice(orders) {
        Ok(orders) => orders,
        Err(error) => return format!("the orders: {error}"),
    };
    match prepare(&orders) {
        Ok(mut command) => format!("{}: {}", orders.argv.first().map_or("", String::as_str), command.exec()),
        Err(cause) => cause,
    }
}

fn prepare(orders: &Orders) -> Result<Command, String> {
    let step = |what: &'static str| move |error: nix::Error| format!("{what}: {error}");
    let limits = &orders.limits;
    if orders.isolation == Isolation::Full {
        unshare(CloneFlags::CLONE_NEWNS).map_err(step("a mount namespace"))?;
        sethostname("sandbox").map_err(step("a host name of its own"))?;
        root::enter(&orders.readable, limits.file_bytes)?;
        for set in [CapSet::Ambient, CapSet::Bounding, CapSet::Inheritable] {
            caps::clear(None, set).map_err(|error| format!("giving up capabilities: {error}"))?;
        }
    }
    // Its supervisor's end is its own, and that of its namespace.
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(step("ending with the supervisor"))?;
    let cpu_seconds = (limits.wall_seconds.ceil() as u64).saturating_add(1);
    for (resource, most) in [
        (Resource::RLIMIT_AS, limits.memory_bytes),
        (Resource::RLIMIT_NPROC, limits.processes),
        (Resource::RLIMIT_FSIZE, limits.file_bytes),
        (Resource::RLIMIT_NOFILE, OPEN_FILES),
        (Resource::RLIMIT_CPU, cpu_seconds),
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_MEMLOCK, 0),
        (Resource::RLIMIT_MSGQUEUE, 0),
    ] {
        setrlimit(resource, most, most).map_err(step("a limit"))?;
    }
    let (program, arguments) = orders.argv.split_first().ok_or("there is no program")?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear();
    command.envs([("PATH", "/usr/bin:/bin"), ("LANG", "C.UTF-8"), ("HOME", "/tmp"), ("TMPDIR", "/tmp")]);
    prctl::set_no_new_privs().map_err(step("no new privileges"))?;
    if orders.isolation == Isolation::Full {
        for set in [CapSet::Effective, CapSet::Permitted] {
            caps::clear(None, set).map_err(|error| format!("giving up capabilities: {error}"))?;
        }
    }
    filter::apply(orders.isolation)?;
    Ok(command)
}
