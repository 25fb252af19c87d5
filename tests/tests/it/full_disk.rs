//! Disks that fill up: that of the checkpoints, and that of the coordinator's state.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;
use tunefleet_tests::cluster::Cluster;
use tunefleet_tests::collecting::Place;
use tunefleet_tests::job::Job;
use tunefleet_tests::process::LIMIT;
use tunefleet_tests::{repository, skip};

const STEPS: u64 = 12;

/// Mounts of this thread alone, and of what it starts. `false` where there can be none.
fn own_mounts() -> bool {
    match unshare(CloneFlags::CLONE_NEWNS) {
        Ok(()) => {}
        Err(Errno::EPERM) => {
            skip("a mount namespace needs root");
            return false;
        }
        Err(error) => panic!("mount namespace: {error}"),
    }
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    true
}

/// A directory that is a small disk; it is unmounted with this, or the directory could not be removed.
struct Disk(PathBuf);

impl Disk {
    fn make(dir: PathBuf, bytes: u64) -> Self {
        fs::create_dir_all(&dir).unwrap();
        let disk = Disk(dir);
        disk.mount(MsFlags::empty(), bytes);
        disk
    }

    fn resize(&self, bytes: u64) {
        self.mount(MsFlags::MS_REMOUNT, bytes);
    }

    fn mount(&self, flags: MsFlags, bytes: u64) {
        let size = format!("size={bytes}");
        mount(Some("tmpfs"), &self.0, Some("tmpfs"), flags, Some(size.as_str())).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_coordinator_whose_disk_is_full_holds_up_no_training_and_loses_nothing() {
    if !own_mounts() {
        return;
    }
    let job = Job::builder().steps(60).checkpoint_every(10).train("dropout: 0.1").build();
    let state = job.dir().join("coordinator");
    let disk = Disk::make(state.clone(), 8 << 20);
    let mut cluster = Cluster::start(job.dir(), &[1, 1]);
    cluster.launch(&job, &["--detach"]).wait().expect(0);
    cluster.wait_for("some steps", |_| job.metrics().last_step() >= 5, "test");

    // Not one byte more.
    let mut filler = fs::File::create(state.join("filler")).unwrap();
    while filler.write_all(&[0; 4096]).is_ok() {}
    cluster.wait_for_coordinator_to_say("the state cannot be written, training goes on");
    let told = job.metrics().last_step();
    assert!(told < 60, "it had ended before");
    // Ranks know nothing of it.
    let began = Instant::now();
    while job.checkpoints().last() != Some(&60) {
        assert!(began.elapsed() < LIMIT, "training stands still: {:?}", job.checkpoints());
        sleep(Duration::from_millis(50));
    }
    assert!(job.metrics().last_step() < 60, "what is told was not kept");

    disk.resize(64 << 20);
    cluster.wait_for_state("test", "completed");
    let events = cluster.ask(&["events", "test", "--json"]).expect(0).stdout;
    let steps: Vec<u64> = events
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|event| event["kind"] == "step")
        .map(|event| event["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, (1..=60).collect::<Vec<_>>());
    let twin = job.twin();
    twin.run(&[]).expect(0);
    assert_eq!(job.metrics().losses(), twin.metrics().losses());
}

#[test]
fn a_full_disk_leaves_the_last_checkpoint_sound() {
    if !own_mounts() {
        return;
    }
    let job = Job::builder().steps(STEPS).checkpoint_every(4).build();
    let twin = job.twin();
    twin.run(&[]).expect(0);
    let checkpoint = job.checkpoint(4).parent().unwrap().to_owned();
    let bytes: u64 = fs::read_dir(twin.checkpoint(STEPS))
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum();

    // Room for one checkpoint and a half.
    let disk = Disk::make(checkpoint, bytes * 3 / 2);
    job.run(&[]).expect(1).says(&["checkpoint", "No space left on device"]);
    assert_eq!(job.checkpoints(), [4], "the last good checkpoint must survive, and only it");

    disk.resize(bytes * 8);
    job.run(&["--resume"]).expect(0);
    assert_eq!(job.metrics().losses(), twin.metrics().losses());
}

#[test]
fn a_full_disk_while_collecting_leaves_the_earlier_dataset_and_the_next_run_goes_on() {
    if !own_mounts() {
        return;
    }
    let place = Place::new();
    // Text that does not compress well.
    let text = |n: u64| {
        let mut state = n + 1;
        let mut word = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            format!("{:x}", state >> 20)
        };
        (0..4000).map(|line| format!("v_{line} = \"{}\"\n", word())).collect::<String>()
    };
    let file = |n: u64| (format!("f{n}.py"), text(n));
    let repo = place.path("repo").display().to_string();
    repository::commit(&place.path("repo"), &[file(0)]);
    let disk = Disk::make(place.path("disk"), 3 << 20);
    place.collect("disk/set", &[&repo], &[]).expect(0);
    let earlier = place.manifest("disk/set");

    for n in 1..120 {
        let (path, text) = file(n);
        fs::write(place.path("repo").join(path), text).unwrap();
    }
    repository::commit_more(&place.path("repo"), "more.py", "more = 1\n");
    place.collect("disk/set", &[&repo], &[]).expect(1).says(&["train-00000.arrow", "free some space"]);
    assert_eq!(place.manifest("disk/set"), earlier);
    assert!(!place.path("disk/set.incomplete").exists(), "the disk stays full");

    disk.resize(64 << 20);
    place.collect("disk/set", &[&repo], &[]).expect(0);
    assert_eq!(place.manifest("disk/set").repositories[0].files, 121);
}
