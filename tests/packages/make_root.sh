#!/usr/bin/env bash
# Makes a small Debian with systemd in DIR, from the mirror that this machine's apt uses; does nothing where it is there.
#
#   make_root.sh DIR
set -euo pipefail
dir=$1
# Two tests use it.
mkdir -p "$(dirname "$dir")"
exec 9>"$dir.lock"
flock 9
[ ! -e "$dir/.complete" ] || exit 0
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
mirror=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null || true; } |
  sed -nE 's/^URIs: *([^ ]+).*/\1/p; s/^deb (\[[^]]*\] )?([^ ]+) .*/\2/p' | awk 'NR == 1')
[ -n "$mirror" ] || { echo "make_root: apt names no mirror" >&2; exit 1; }
rm -rf "$dir"
mkdir -p "$dir"
packages=systemd,adduser,init-system-helpers,ca-certificates,libgomp1,libssl3,libstdc++6
debootstrap --variant=minbase --include=$packages "$suite" "$dir" "$mirror" >"$dir.log" 2>&1 ||
  { tail -n 20 "$dir.log" | sed -E 's#[a-z]+://[^ ]+#(mirror)#g' >&2; exit 1; }
rm -rf "$dir"/var/cache/apt/archives/*.deb "$dir"/var/lib/apt/lists/*
touch "$dir/.complete"
