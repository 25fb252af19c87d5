//! A control group for a process and all that it starts: nothing escapes it by leaving the process group. Version
//! 2 where a subtree is ours to write, else version 1's memory hierarchy, else none: it is a help and no condition.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const ROOT: &str = "/sys/fs/cgroup";

/// One group; it goes when its keeper ends.
#[derive(Debug)]
pub struct Cgroup {
    dir: PathBuf,
    version: Version,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Cgroup {
    /// A fresh group below that of this process; `None` where none can be made.
    pub fn make(name: &str, memory_limit_bytes: Option<u64>) -> Option<Self> {
        let membership = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        candidates(&membership).into_iter().find_map(|(version, parent)| {
            let dir = parent.join(name);
            fs::create_dir(&dir).ok()?;
            let group = Cgroup { dir, version };
            // Without its files it is a plain directory, on a file system of another kind.
            if !group.dir.join("cgroup.procs").exists() {
                return None;
            }
            if let Some(limit) = memory_limit_bytes {
                let file = if version == Version::Two { "memory.max" } else { "memory.limit_in_bytes" };
                fs::write(group.dir.join(file), limit.to_string()).ok()?;
            }
            Some(group)
        })
    }

    /// Takes a process in.
    pub fn admit(&self, pid: i32) {
        // One that is gone already needs no group.
        let _ = fs::write(self.dir.join("cgroup.procs"), pid.to_string());
    }

    /// Whether the kernel has killed processes of it for their memory.
    pub fn was_out_of_memory(&self) -> bool {
        let file = if self.version == Version::Two { "memory.events" } else { "memory.oom_control" };
        oom_kills(&fs::read_to_string(self.dir.join(file)).unwrap_or_default()) > 0
    }

    /// Kills all that is in it.
    pub fn kill(&self) {
        if self.version == Version::Two && fs::write(self.dir.join("cgroup.kill"), "1").is_ok() {
            return;
        }
        let members = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        for pid in members.lines().filter_map(|line| line.parse::<i32>().ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.dir);
    }
}

/// Directories in which a group can be made, the best first.
fn candidates(membership: &str) -> Vec<(Version, PathBuf)> {
    let below = |root: &Path, path: &str| root.join(path.trim_start_matches('/'));
    let mut found = Vec::new();
    for line in membership.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        if controllers.is_empty() {
            // A group with processes of its own cannot give controllers to those below it: the daemon's own
            // subtree has to be delegated with its processes in a leaf.
            let own = below(Path::new(ROOT), path);
            let parent = own.parent().map(Path::to_owned).unwrap_or_default();
            let memory = |dir: &Path| {
                fs::read_to_string(dir.join("cgroup.subtree_control"))
                    .is_ok_and(|text| text.contains("memory"))
            };
            found.extend([own, parent].into_iter().filter(|dir| memory(dir)).map(|dir| (Version::Two, dir)));
        } else if controllers.split(',').any(|controller| controller == "memory") {
            let own = below(&Path::new(ROOT).join("memory"), path);
            found.push((Version::One, own));
            found.push((Version::One, Path::new(ROOT).join("memory")));
        }
    }
    found.sort_by_key(|(version, _)| *version == Version::One);
    found
}

/// `oom_kill N` stands in both versions' files.
fn oom_kills(text: &str) -> u64 {
    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_say_how_often_the_kernel_killed() {
        assert_eq!(oom_kills("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"), 2);
        assert_eq!(oom_kills("low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\noom_group_kill 0\n"), 1);
        assert_eq!(oom_kills(""), 0);
    }

    #[test]
    fn the_memory_hierarchy_of_version_1_is_found() {
        let membership = "9:name=systemd:/\n4:memory:/api/x\n1:cpu:/\n0::/\n";
        let found = candidates(membership);
        assert!(found.contains(&(Version::One, PathBuf::from("/sys/fs/cgroup/memory/api/x"))), "{found:?}");
    }
}
