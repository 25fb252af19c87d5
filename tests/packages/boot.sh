#!/usr/bin/env bash
# systemd as PID 1 of its own namespaces, over a root that it may change: boot.sh BASE SCRATCH [FROM:TO]...
# Each FROM is seen there, read-only, as TO. Its output is the console.
set -euo pipefail
base=$1 scratch=$2
shift 2
if [ "${inside:-}" != 1 ]; then
  mkdir -p "$scratch"/{upper,work,root}
  inside=1 exec unshare --mount --pid --net --ipc --uts --cgroup --fork --kill-child --propagation private \
    "$0" "$base" "$scratch" "$@"
fi
root=$scratch/root
mount -t overlay overlay -o "lowerdir=$base,upperdir=$scratch/upper,workdir=$scratch/work" "$root"
for pair in "$@"; do
  to=$root/${pair#*:}
  mkdir -p "$to"
  mount --bind -o ro "${pair%%:*}" "$to"
done
cd "$root"
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
for node in "null 1 3" "zero 1 5" "full 1 7" "random 1 8" "urandom 1 9" "tty 5 0"; do
  read -r name major minor <<<"$node"
  mknod -m 666 "dev/$name" c "$major" "$minor"
done
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout
ln -s /proc/self/fd/2 dev/stderr
mkdir -p dev/shm dev/pts .old
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ip link set lo up
pivot_root . .old
umount -l /.old
unset inside
export container=unshare
exec /lib/systemd/systemd --unit=multi-user.target --log-target=console --show-status=no --log-level=notice
