//! The packages and units, under systemd as PID 1 of namespaces and a root of their own.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;
use tunefleet_tests::job::Job;
use tunefleet_tests::process::Running;
use tunefleet_tests::programs::{self, root};
use tunefleet_tests::skip;

const LIMIT: Duration = Duration::from_secs(60);
/// Exposure as systemd counts it, times ten.
const MAX_EXPOSURE: [(&str, u32); 3] = [("coordinator", 20), ("worker", 35), ("server", 20)];

fn run(command: &mut Command) -> Output {
    let out = command.output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{command:?}: {said}");
    out
}

pub fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    dirs.push("/usr/sbin".into());
    dirs.iter().any(|dir| dir.join(program).exists())
}

/// Whether packages can be made and installed here; says so where they cannot.
pub fn can_install() -> bool {
    let needed = ["debootstrap", "dpkg-deb", "unshare", "cargo-deb", "ip"];
    if !nix::unistd::Uid::effective().is_root() {
        skip("installing packages needs root");
        return false;
    }
    if let Some(missing) = needed.into_iter().find(|program| !on_path(program)) {
        skip(&format!(
            "no {missing}: apt-get install -y debootstrap iproute2, cargo install --locked cargo-deb"
        ));
        return false;
    }
    true
}

/// Both packages of the programs under test, as revision `revision`.
pub fn packages(dir: &Path, revision: u32) -> [PathBuf; 2] {
    let man = root().join("target/man");
    std::fs::create_dir_all(&man).unwrap();
    run(Command::new(programs::coordinator()).arg("man").arg(&man));
    run(Command::new(programs::worker()).arg("man").arg(&man));
    ["coordinator", "worker"].map(|package| {
        let path = dir.join(format!("{package}-{revision}.deb"));
        let mut command = Command::new("cargo");
        command.current_dir(root()).args(["deb", "--no-build", "--no-strip", "--fast", "--profile", "dev"]);
        command.args(["-p", &format!("tunefleet-{package}"), "--deb-version", &format!("0.1.0-{revision}")]);
        run(command.arg("--output").arg(&path));
        path
    })
}

/// A small Debian with systemd; it is made once.
pub fn debian_root() -> PathBuf {
    let base = root().join("target/debian-root");
    run(Command::new(root().join("tests/packages/make_root.sh")).arg(&base));
    base
}

/// A booted machine.
struct Machine {
    /// Killed with this.
    _console: Running,
    pid: u32,
    dir: PathBuf,
}

impl Machine {
    fn boot(dir: &Path, torch: &Path) -> Self {
        let mut command = Command::new(root().join("tests/packages/boot.sh"));
        command.arg(debian_root()).arg(dir.join("machine"));
        command.arg(format!("{}:opt/tunefleet", torch.display()));
        command.arg(format!("{}:packages", dir.join("packages").display()));
        let console = Running::start(command);
        let began = Instant::now();
        let pid = loop {
            // unshare's child becomes systemd.
            let children = format!("/proc/{0}/task/{0}/children", console.pid());
            let child = std::fs::read_to_string(children).unwrap_or_default();
            let child = child.split_whitespace().next().and_then(|pid| pid.parse::<u32>().ok());
            let is_systemd = |pid: &u32| {
                let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                name.trim() == "systemd"
            };
            if let Some(pid) = child.filter(is_systemd) {
                break pid;
            }
            assert!(began.elapsed() < LIMIT, "systemd does not start");
            std::thread::sleep(Duration::from_millis(50));
        };
        let machine = Machine { _console: console, pid, dir: dir.join("machine/upper") };
        machine.wait("the system is up", |machine| {
            let state = machine.try_run("systemctl is-system-running");
            String::from_utf8_lossy(&state.stdout).trim() == "running"
        });
        machine
    }

    fn try_run(&self, script: &str) -> Output {
        let mut command = Command::new("timeout");
        command.args([
            "-k",
            "5",
            "120",
            "nsenter",
            "-t",
            &self.pid.to_string(),
            "-m",
            "-p",
            "-n",
            "-i",
            "-u",
            "-C",
        ]);
        command.args(["sh", "-c", script]).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("DEBIAN_FRONTEND", "noninteractive").current_dir("/").output().unwrap()
    }

    fn run(&self, script: &str) -> String {
        let out = self.try_run(script);
        let said = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{script}: {said}\n{}", self.journal());
        said.into_owned()
    }

    fn journal(&self) -> String {
        String::from_utf8_lossy(&self.try_run("journalctl --no-pager -o cat -n 60").stdout).into_owned()
    }

    fn wait(&self, what: &str, mut condition: impl FnMut(&Machine) -> bool) {
        let began = Instant::now();
        while !condition(self) {
            assert!(began.elapsed() < LIMIT, "not yet: {what}\n{}", self.journal());
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn property(&self, unit: &str, property: &str) -> String {
        self.run(&format!("systemctl show tunefleet-{unit} --property {property} --value")).trim().to_owned()
    }

    fn status(&self) -> Value {
        let said = self.run(
            "runuser -u tunefleet -- coordinator status test --json --coordinator http://127.0.0.1:7070",
        );
        serde_json::from_str(&said).unwrap()
    }

    /// Processes of ranks, and their keepers.
    fn ranks(&self) -> Vec<String> {
        let said = self.try_run("grep -lz '^rank$' /proc/[0-9]*/cmdline 2>/dev/null");
        let found = String::from_utf8_lossy(&said.stdout).into_owned();
        let mut ranks: Vec<String> =
            found.lines().map(str::to_owned).filter(|path| !path.contains("self")).collect();
        ranks.sort();
        ranks
    }
}

#[test]
fn packages_install_run_a_job_upgrade_under_it_and_leave_nothing_behind() {
    let torch = root().join(".libtorch").canonicalize().ok().and_then(|dir| Some(dir.parent()?.to_owned()));
    let Some(torch) = torch.filter(|dir| dir.join("torch/lib/libtorch_cpu.so").exists()) else {
        return skip("no libtorch of a wheel in .libtorch: make setup");
    };
    if !can_install() {
        return;
    }
    let job = Job::builder().steps(100_000).checkpoint_every(1000).build();
    std::fs::create_dir(job.dir().join("packages")).unwrap();
    let (first, second) =
        (packages(&job.dir().join("packages"), 1), packages(&job.dir().join("packages"), 2));
    assert!(first.iter().chain(&second).all(|path| path.exists()));
    let machine = Machine::boot(job.dir(), &torch);

    // The coordinator runs as soon as it is installed.
    machine.run("dpkg -i /packages/coordinator-1.deb");
    assert_eq!(machine.property("coordinator", "ActiveState"), "active");
    assert_eq!(machine.property("coordinator", "StatusText"), "listens on http://127.0.0.1:7070");
    assert_eq!(machine.property("coordinator", "UnitFileState"), "enabled");

    // The worker says what it lacks.
    let said = machine.run("dpkg -i /packages/worker-1.deb");
    assert!(said.contains("/etc/default/tunefleet-worker"), "{said}");
    assert_eq!(machine.property("worker", "ActiveState"), "inactive");
    let lacks = machine.try_run("worker --version");
    let said = String::from_utf8_lossy(&lacks.stderr);
    assert_eq!(lacks.status.code(), Some(78), "{said}");
    assert!(said.contains("libtorch 2.11.0 is needed, and LIBTORCH is not set"), "{said}");
    machine.run("echo LIBTORCH=/opt/nowhere >> /etc/default/tunefleet-worker");
    let said = machine.try_run("worker --version").stderr;
    assert!(String::from_utf8_lossy(&said).contains("LIBTORCH=/opt/nowhere holds no lib/libtorch_cpu.so"));
    machine.run("sed -i 's#/opt/nowhere#/opt/tunefleet/torch#' /etc/default/tunefleet-worker");
    machine.run("printf 'cpu: true\\nslots: 2\\n' >> /etc/tunefleet/worker.yaml");
    machine.run("systemctl enable --now tunefleet-worker");
    assert_eq!(machine.property("worker", "ActiveState"), "active");
    assert!(machine.property("worker", "StatusText").ends_with(": 2 slots, 0 GPUs"));

    // systemd has nothing to complain of, and counts little exposure.
    machine.run("cp /usr/share/doc/tunefleet-worker/server.yaml /etc/tunefleet/");
    for (unit, most) in MAX_EXPOSURE {
        let said = machine.run(&format!(
            "systemd-analyze verify --man=no /lib/systemd/system/tunefleet-{unit}.service 2>&1"
        ));
        assert_eq!(said, "", "tunefleet-{unit}.service");
        machine.run(&format!(
            "systemd-analyze security --offline=true --threshold={most} /lib/systemd/system/tunefleet-{unit}.service"
        ));
    }

    // A job trains.
    let place = machine.dir.join("srv/tunefleet/job");
    run(Command::new("cp").arg("-r").arg(job.dir().join("repos")).arg(job.config()).arg("-t").arg({
        std::fs::create_dir_all(&place).unwrap();
        &place
    }));
    machine.run("chown -R tunefleet:tunefleet /srv/tunefleet/job");
    machine.run(
        "cd /srv/tunefleet/job && runuser -u tunefleet -- coordinator launch --config job.yaml --detach \
         --coordinator http://127.0.0.1:7070",
    );
    machine.wait("steps", |machine| machine.status()["step"].as_u64().unwrap_or(0) > 5);
    let ranks = machine.ranks();
    let before = ["coordinator", "worker"].map(|unit| machine.property(unit, "MainPID"));
    assert_eq!(ranks.len(), 4, "{ranks:?}");

    // Both programs are replaced under it.
    machine.run("dpkg -i /packages/coordinator-2.deb /packages/worker-2.deb");
    machine.wait("other programs run", |machine| {
        let now = ["coordinator", "worker"].map(|unit| machine.property(unit, "MainPID"));
        now.iter().zip(&before).all(|(now, before)| now != before && now != "0")
            && machine.property("worker", "ActiveState") == "active"
    });
    assert_eq!(machine.ranks(), ranks, "the same processes train on");
    let at = machine.status()["step"].as_u64().unwrap();
    machine.wait("more steps", |machine| machine.status()["step"].as_u64().unwrap_or(0) > at + 5);
    assert_eq!(machine.status()["attempt"], 1, "nothing was started again");

    // The server's unit serves, when it has a model.
    machine.run("runuser -u tunefleet -- coordinator cancel test --coordinator http://127.0.0.1:7070");
    machine.wait("the job has stopped", |machine| machine.status()["state"] == "stopped");
    machine.run(
        "cp -r /srv/tunefleet/job/output/model /srv/tunefleet/model && \
         cp -r /srv/tunefleet/job/output/tokenizer/* /srv/tunefleet/model/ && \
         chown -R tunefleet:tunefleet /srv/tunefleet/model && systemctl start tunefleet-server",
    );
    assert_eq!(machine.property("server", "StatusText"), "serves model on 127.0.0.1:8080");
    assert_eq!(machine.run("systemctl --failed --no-legend --plain"), "");

    // Removed, nothing runs; purged, nothing is left but what the job made.
    machine.run("dpkg -r tunefleet-worker tunefleet-coordinator");
    machine.wait("nothing runs", |machine| machine.run("find /proc -maxdepth 1 -user tunefleet").is_empty());
    machine.run("dpkg -P tunefleet-worker tunefleet-coordinator");
    for gone in [
        "/etc/tunefleet/worker.yaml",
        "/etc/tunefleet/coordinator.yaml",
        "/var/lib/tunefleet",
        "/usr/lib/tunefleet",
    ] {
        assert!(!machine.try_run(&format!("test -e {gone}")).status.success(), "{gone} is left");
    }
    machine.run("test -e /srv/tunefleet/job/output/checkpoints");
    assert_eq!(machine.run("systemctl --failed --no-legend --plain"), "");
}
