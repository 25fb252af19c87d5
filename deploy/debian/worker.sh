#!/bin/sh
# The `worker` program with libtorch, which this package does not bring: of LIBTORCH, else of /etc/default/tunefleet-worker.
set -eu
wanted=2.11.0
defaults=/etc/default/tunefleet-worker
if [ -z "${LIBTORCH:-}" ] && [ -r $defaults ]; then
  LIBTORCH=$(sed -n 's/^LIBTORCH=//p' $defaults | tail -n 1)
fi
fail() {
  echo "worker: $1" >&2
  echo "worker: PyTorch's wheel brings it: python3 -m venv /opt/tunefleet && /opt/tunefleet/bin/pip install torch==$wanted," >&2
  echo "worker: then LIBTORCH=/opt/tunefleet/lib/python3.X/site-packages/torch in $defaults" >&2
  exit 78
}
[ -n "${LIBTORCH:-}" ] || fail "libtorch $wanted is needed, and LIBTORCH is not set"
[ -e "$LIBTORCH/lib/libtorch_cpu.so" ] || fail "LIBTORCH=$LIBTORCH holds no lib/libtorch_cpu.so"
found=$(cat "$LIBTORCH/build-version" 2>/dev/null || sed -n "s/^__version__ = '\(.*\)'/\1/p" "$LIBTORCH/version.py" 2>/dev/null || true)
case $found in
  "$wanted"*) ;;
  *) fail "libtorch $wanted is needed, and LIBTORCH=$LIBTORCH is version ${found:-unknown}" ;;
esac
# A CUDA build of the wheel has NVIDIA's libraries beside it.
for dir in "$LIBTORCH/lib" "$LIBTORCH"/../nvidia/*/lib; do
  [ ! -d "$dir" ] || LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$dir
done
export LIBTORCH LD_LIBRARY_PATH
exec /usr/lib/tunefleet/worker "$@"
