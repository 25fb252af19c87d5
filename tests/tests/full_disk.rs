//! A disk that fills up while a checkpoint is written.

use std::fs;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tunefleet_tests::job::Job;
use tunefleet_tests::skip;

const STEPS: u64 = 12;

#[test]
fn a_full_disk_leaves_the_last_checkpoint_sound() {
    // Of this thread alone, and of what it starts: nothing is left to unmount.
    match unshare(CloneFlags::CLONE_NEWNS) {
        Ok(()) => {}
        Err(Errno::EPERM) => return skip("a mount namespace needs root"),
        Err(error) => panic!("mount namespace: {error}"),
    }
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();

    let job = Job::builder().steps(STEPS).checkpoint_every(4).build();
    let twin = job.twin();
    twin.run(&[]).expect(0);
    let checkpoint = job.checkpoint(4).parent().unwrap().to_owned();
    let bytes: u64 = fs::read_dir(twin.checkpoint(STEPS))
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum();

    // Room for one checkpoint and a half.
    fs::create_dir_all(&checkpoint).unwrap();
    let resize = |flags, size: u64| {
        mount(Some("tmpfs"), &checkpoint, Some("tmpfs"), flags, Some(format!("size={size}").as_str()))
            .unwrap();
    };
    resize(MsFlags::empty(), bytes * 3 / 2);
    job.run(&[]).expect(1).says(&["checkpoint", "No space left on device"]);
    assert_eq!(job.checkpoints(), [4], "the last good checkpoint must survive, and only it");

    resize(MsFlags::MS_REMOUNT, bytes * 8);
    job.run(&["--resume"]).expect(0);
    assert_eq!(job.metrics().losses(), twin.metrics().losses());
}
