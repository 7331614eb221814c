#!/bin/bash
# Builds margined and serves a demo disk: Scripts/run.sh
# Needs Debian 12 and a Swift toolchain; installs the rest by apt. The disk `demo` (10 GiB) lives in a directory store under
# ./var and stays there. Ctrl-C drains and ends. PORT (default 10809) and VAR (default ./var) choose other places.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
. Scripts/toolchain.sh
find_swift
Scripts/install-deps.sh build run
port=${PORT:-10809}
mkdir -p "${VAR:-var}"
var=$(cd "${VAR:-var}" && pwd)
socket=$var/margined.sock

# The same flags as Scripts/test.sh, so that the two share one build.
echo "building (a few minutes the first time)"
swift build -c release -Xswiftc -enable-testing --product margined 2>&1 | grep -E '^\[.*(Compiling|Linking)|error:|Compiling|warning:' | tail -n 20 | cut -c 1-160 || true
margined=$root/.build/release/margined
[ -x "$margined" ] || { echo "run.sh: the build failed: run 'swift build -c release' to see why" >&2; exit 1; }

export MARGARINE_STORE=file://$var/store
mkdir -p "$var/store"
if ! "$margined" disk show demo >/dev/null 2>&1; then
  "$margined" disk create demo --size 10G
fi

lines() {
  cat <<TEXT

The disk 'demo' is served. Attach it with one of these, as root, in another terminal:

  nbd-client (where the kernel has the nbd module):
    modprobe nbd && nbd-client -N 'demo?session=demo1' 127.0.0.1 $port /dev/nbd0
    ... and when done: nbd-client -d /dev/nbd0

  nbdfuse and a loop device (needs no kernel module of its own):
    mkdir -p /tmp/demo && nbdfuse /tmp/demo/nbd 'nbd+unix:///demo?socket=$socket' &
    losetup -f --show /tmp/demo/nbd
    ... and when done: losetup -d /dev/loopN && umount /tmp/demo

  QEMU:
    qemu-system-x86_64 ... -drive file=nbd:unix:$socket:exportname=demo,format=raw,if=virtio
    qemu-img info 'nbd://127.0.0.1:$port/demo'

  A btrfs on it (DEVICE is /dev/nbd0 or /dev/loopN; once), and what margined makes of it:
    mkfs.btrfs DEVICE && mount -o discard=async,noatime DEVICE /mnt
    $margined disk show demo --store $MARGARINE_STORE
    $margined status --scratch $var/scratch

Ctrl-C ends it: the disk is committed first.
TEXT
}

# margined runs in a process group of its own, so that Ctrl-C reaches this script alone, which passes it on once. A second
# Ctrl-C ends it at once; its journal keeps what was not committed.
fifo=$(mktemp -u "${TMPDIR:-/tmp}/margined-ready.XXXXXX")
mkfifo -m 600 "$fifo"
set -m
"$margined" serve --scratch "$var/scratch" --listen "127.0.0.1:$port" --unix "$socket" >"$fifo" </dev/null &
pid=$!
set +m
exec 3<"$fifo"
rm -f "$fifo"
trap 'kill -TERM $pid 2>/dev/null' INT TERM HUP
if read -r line <&3; then
  echo "$line"
  lines
fi
status=0
while kill -0 "$pid" 2>/dev/null; do
  status=0
  wait "$pid" || status=$?
done
exit "$status"
