//! A root directory in memory: the system's programs and libraries and what else the program may read, read-only; a few
//! devices; `/tmp` to write to. Nothing else of the machine has a name in it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::pivot_root;

/// Where programs and libraries are, on all distributions together.
const SYSTEM: [&str; 7] = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache"];
const DEVICES: [&str; 4] = ["null", "zero", "random", "urandom"];
/// Of the root itself: directories, links and empty files.
const ROOT_BYTES: u64 = 1 << 20;
const MAX_FILES: u32 = 4096;
/// Any directory that exists everywhere: the new root is put together over it.
const WORKSHOP: &str = "/tmp";

/// Puts this process, in a mount namespace of its own, into such a root; its directory is `/tmp` then.
///
/// # Errors
/// What the system refused.
pub fn enter(readable: &[PathBuf], file_bytes: u64) -> Result<(), String> {
    let nothing = None::<&str>;
    let step = |what: &str, error: nix::Error| format!("{what}: {error}");
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)
        .map_err(|error| step("keeping mounts to itself", error))?;
    tmpfs(Path::new(WORKSHOP), ROOT_BYTES)?;
    let [old, new] = ["old", "new"].map(|name| Path::new(WORKSHOP).join(name));
    for dir in [&old, &new] {
        make_dir(dir)?;
    }
    pivot_root(WORKSHOP, &old).map_err(|error| step("changing the root", error))?;
    let [old, new] = ["/old", "/new"].map(Path::new);
    tmpfs(new, ROOT_BYTES)?;
    let system = SYSTEM.iter().map(Path::new);
    for path in system.chain(readable.iter().map(PathBuf::as_path)) {
        show(old, new, path)?;
    }
    make_dir(&new.join("dev"))?;
    for name in DEVICES {
        let path = Path::new("/dev").join(name);
        let at = below(new, &path);
        fs::write(&at, "").map_err(|error| format!("{}: {error}", at.display()))?;
        bind(&below(old, &path), &at)?;
    }
    let tmp = new.join("tmp");
    make_dir(&tmp)?;
    std::env::set_current_dir(new).map_err(|error| format!("the new root: {error}"))?;
    let leftover = new.join("left");
    make_dir(&leftover)?;
    pivot_root(".", "left").map_err(|error| step("entering the new root", error))?;
    umount2("/left", MntFlags::MNT_DETACH).map_err(|error| step("leaving the old root", error))?;
    let _ = fs::remove_dir("/left");
    read_only(Path::new("/"))?;
    tmpfs(Path::new("/tmp"), file_bytes)?;
    std::env::set_current_dir("/tmp").map_err(|error| format!("/tmp: {error}"))
}

fn tmpfs(at: &Path, bytes: u64) -> Result<(), String> {
    let options = format!("size={bytes},nr_inodes={MAX_FILES},mode=755");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some(options.as_str()))
        .map_err(|error| format!("a file system in memory at {}: {error}", at.display()))
}

/// Shows `path` of the old root at the same place of the new one; what is not there is left out.
fn show(old: &Path, new: &Path, path: &Path) -> Result<(), String> {
    let (from, to) = (below(old, path), below(new, path));
    let Ok(found) = fs::symlink_metadata(&from) else { return Ok(()) };
    if fs::symlink_metadata(&to).is_ok() {
        // It lies in what is shown already.
        return Ok(());
    }
    if let Some(parent) = to.parent() {
        make_dir(parent)?;
    }
    if found.is_symlink() {
        let target = fs::read_link(&from).map_err(|error| format!("{}: {error}", path.display()))?;
        return symlink(target, &to).map_err(|error| format!("{}: {error}", path.display()));
    }
    if found.is_dir() {
        make_dir(&to)?;
    } else {
        fs::write(&to, "").map_err(|error| format!("{}: {error}", path.display()))?;
    }
    bind(&from, &to)?;
    for at in mounts_below(old, &to)? {
        read_only(&at)?;
    }
    Ok(())
}

fn bind(from: &Path, to: &Path) -> Result<(), String> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .map_err(|error| format!("showing {}: {error}", to.display()))
}

/// `at` and all mounts that came with it, by the old root's /proc.
fn mounts_below(old: &Path, at: &Path) -> Result<Vec<PathBuf>, String> {
    let table = old.join("proc/self/mountinfo");
    let text = fs::read_to_string(&table).map_err(|error| format!("{}: {error}", table.display()))?;
    let points = text.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut found: Vec<PathBuf> = points.filter(|point| point.starts_with(at)).collect();
    found.sort();
    Ok(found)
}

/// A mount that others own keeps the rules that they gave it: they must be repeated.
fn read_only(at: &Path) -> Result<(), String> {
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID;
    let now = statvfs(at).map_err(|error| format!("{}: {error}", at.display()))?.flags();
    for (has, also) in [
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ] {
        if now.contains(has) {
            flags |= also;
        }
    }
    mount(None::<&str>, at, None::<&str>, flags, None::<&str>)
        .map_err(|error| format!("keeping {} from being written: {error}", at.display()))
}

fn make_dir(at: &Path) -> Result<(), String> {
    fs::create_dir_all(at).map_err(|error| format!("{}: {error}", at.display()))
}

/// An absolute path below another root.
fn below(root: &Path, path: &Path) -> PathBuf {
    let parts = path.components().filter(|part| matches!(part, Component::Normal(_)));
    root.join(parts.collect::<PathBuf>())
}
