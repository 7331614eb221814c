# What the test beds share: a store, a daemon, a client's attachment, and an end that leaves nothing behind. To be sourced.
#
# Every bed is a script of its own: `Tests/system/NAME.sh [--quick] [--seed N]`. It prints what it did, exits 0 when everything
# held, 1 when something did not (the first line says what), 77 when this machine lacks what it needs (and says what).
# Environment: STORE_KIND=file|s3check|ceph (default file), MARGINED (the binary; default: the release build, made if it is
# not there), KEEP=1 leaves the work directory. Everything listens on loopback only; only own processes are ended.
set -u
BED=$(basename "$0" .sh)
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=/usr/bin/python3   # the one that Debian's python3-libnbd belongs to
STORE_KIND=${STORE_KIND:-file}
QUICK=0 SEED=$(( $(date +%s) % 100000 ))
BEGAN=$(date +%s)
WORK= PIDS=() MOUNTS=() LOOPS=() FUSES=() SERVER_STOP=

say() { printf '%s: %s\n' "$BED" "$*"; }
fail() { printf '%s: FAILED: %s\n' "$BED" "$*"; [ -n "$WORK" ] && [ -f "$WORK/daemon.log" ] && { daemon_lines; }; exit 1; }
# What the daemon said last; of a crash, what and where.
daemon_lines() {
  echo "--- the daemon:"
  grep -v '^ *$' "$WORK/daemon.log" | sed -n '/Fatal error\|Program crashed\|Precondition failed/,$p' | sed -n "1p;/ crashed:/,/^Thread/p" | cut -c 1-200 | head -n 24
  grep -E '^[0-9]{4}-|^(<[0-9]>)?(trace|debug|info|notice|warning|error|critical)' "$WORK/daemon.log" | tail -n 8 | cut -c 1-300
}
skip() { printf '%s: SKIP: %s\n' "$BED" "$*"; exit 77; }
check() { "$@" >"$WORK/out" 2>&1; local s=$?; [ $s = 0 ] || { tail -n 20 "$WORK/out"; fail "$* (status $s)"; }; }
quick() { [ "$QUICK" = 1 ]; }
# pick QUICK LONG: the one that goes with the form.
pick() { if quick; then echo "$1"; else echo "$2"; fi; }

# Reads the options; makes the work directory and has it removed at the end, however that comes.
bed() {
  while [ $# -gt 0 ]; do
    case $1 in
      --quick) QUICK=1 ;;
      --seed) SEED=${2:?}; shift ;;
      -h | --help) sed -n '2,/^[^#]/{s/^# \{0,1\}//;/^[^#]/p}' "$0" | sed '/^\. /,$d'; exit 0 ;;
      *) echo "usage: $0 [--quick] [--seed N]" >&2; exit 64 ;;
    esac
    shift
  done
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/margarine-$BED.XXXXXX")
  trap cleanup EXIT
  trap 'exit 130' INT TERM
  find_margined
  PORT=$(free_port)
  SOCKET=$WORK/nbd.sock SCRATCH=$WORK/scratch
  URI=nbd://127.0.0.1:$PORT
  export MARGINED WORK STORE_KIND PORT SOCKET SCRATCH QUICK SEED ROOT
  start_store
  say "$(pick quick long) form, seed $SEED, store $STORE_KIND"
}

find_margined() {
  if [ -z "${MARGINED:-}" ]; then
    MARGINED=$ROOT/.build/release/margined
    [ -x "$MARGINED" ] || { say "building margined"; (cd "$ROOT" && swift build -c release --product margined >"$WORK/build" 2>&1) || { tail -n 20 "$WORK/build"; fail "the build"; }; }
  fi
  [ -x "$MARGINED" ] || fail "no margined at $MARGINED"
}

# needs TOOL...: skips the bed where a tool is missing.
needs() { local t; for t in "$@"; do command -v "$t" >/dev/null || skip "no $t here (apt-get install nbdkit libnbd-bin nbdfuse nbd-client qemu-utils fio btrfs-progs sqlite3)"; done; }
# Mounting an export takes root, FUSE and a loop device.
needs_mounts() {
  [ "$(id -u)" = 0 ] || skip "mounting needs root"
  [ -c /dev/fuse ] || skip "no /dev/fuse on this machine"
  [ -c /dev/loop-control ] && losetup -f >/dev/null 2>&1 || skip "no loop devices on this machine"
  needs nbdfuse losetup blkid "$@"
}

free_port() { $PYTHON -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# ---- the store: sets STORE (and, for S3, credentials in the environment)

start_store() {
  case $STORE_KIND in
    file) mkdir "$WORK/store"; STORE=file://$WORK/store ;;
    s3check)
      $PYTHON "$ROOT/Tests/servers/s3check.py" --state "$WORK/objects" --dir "$WORK/objects/data" >"$WORK/objects.log" 2>&1 &
      PIDS+=("$!")
      local n
      for n in $(seq 200); do [ -f "$WORK/objects/env" ] && break; sleep 0.05; done
      [ -f "$WORK/objects/env" ] || { tail -n 5 "$WORK/objects.log"; fail "the S3 checking server did not start"; } ;;
    ceph)
      "$ROOT/Tests/servers/ceph.sh" start "$WORK/objects" >"$WORK/objects.log" 2>&1 || { tail -n 5 "$WORK/objects.log"; skip "Ceph did not start here"; }
      SERVER_STOP=$ROOT/Tests/servers/ceph.sh ;;
    *) echo "STORE_KIND is file, s3check or ceph" >&2; exit 64 ;;
  esac
  if [ "$STORE_KIND" != file ]; then
    set -a; . "$WORK/objects/env"; set +a
    if [ "$STORE_KIND" = ceph ]; then   # both gateways behind one address
      $PYTHON "$ROOT/Tests/system/gate.py" "${S3_ENDPOINT#http://}" "${S3_ENDPOINT2#http://}" >"$WORK/gate" 2>&1 &
      PIDS+=("$!")
      for n in $(seq 100); do [ -s "$WORK/gate" ] && break; sleep 0.05; done
      S3_ENDPOINT=http://127.0.0.1:$(cat "$WORK/gate")
    fi
    STORE="s3://$S3_BUCKET/$BED?endpoint=$S3_ENDPOINT&region=$AWS_REGION"
  fi
  export STORE MARGARINE_STORE=$STORE
}

# Of a Ceph store, ends one of the two gateways, once; a bed calls it in the middle of its load.
hurt_store() {
  [ "$STORE_KIND" = ceph ] && [ -z "${HURT:-}" ] || return 0
  HURT=1
  "$ROOT/Tests/servers/ceph.sh" kill "$WORK/objects" rgw1 >/dev/null || fail "the gateway could not be ended"
  say "one of the two gateways is ended"
}

# ---- the daemon: DAEMON is its pid

# configure [LINE...]: the configuration file; lines of TOML with their [table] first are added.
configure() {
  { echo '[serve]'; echo 'log-level = "info"'; echo '[commit]'; echo "commit-interval = \"${COMMIT_INTERVAL:-500ms}\""
    echo "heartbeat-interval = \"500ms\""; echo "owner-dead-after = \"2s\""; for l in "$@"; do echo "$l"; done; } >"$WORK/margined.toml"
}

start_daemon() {
  [ -f "$WORK/margined.toml" ] || configure
  : >"$WORK/ready"
  "$MARGINED" serve --config "$WORK/margined.toml" --store "$STORE" --scratch "$SCRATCH" --listen "127.0.0.1:$PORT" --unix "$SOCKET" "$@" >"$WORK/ready" 2>>"$WORK/daemon.log" &
  DAEMON=$!
  PIDS+=("$DAEMON")
  local n
  for n in $(seq 600); do
    grep -q '^ready' "$WORK/ready" && return 0
    kill -0 "$DAEMON" 2>/dev/null || { wait "$DAEMON"; fail "margined serve ended with status $? before it was ready"; }
    sleep 0.05
  done
  fail "margined was not ready within 30 s"
}

# SIGTERM, and it must end well.
stop_daemon() {
  kill -TERM "$DAEMON"
  local n
  for n in $(seq 1200); do kill -0 "$DAEMON" 2>/dev/null || break; sleep 0.05; done
  kill -0 "$DAEMON" 2>/dev/null && fail "margined did not end within 60 s of SIGTERM"
  wait "$DAEMON" || fail "margined ended with status $? after SIGTERM"
}

kill_daemon() { kill -9 "$DAEMON"; wait "$DAEMON" 2>/dev/null; true; }

margined() { "$MARGINED" "$@"; }
# field NAME KEY: of `disk show`.
field() { "$MARGINED" disk show "$1" --json | $PYTHON -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$2"; }

# ---- the client: an export as a block device of this kernel, by nbdfuse and a loop device

# attach URI: sets LOOP and FUSE_PID.
attach() {
  FUSE_COUNT=$((${FUSE_COUNT:-0} + 1))
  local at=$WORK/fuse$FUSE_COUNT n
  mkdir "$at"
  setsid nbdfuse ${NBDFUSE_ARGS:-} -P "$at.pid" "$at/nbd" "$1" >>"$WORK/nbdfuse.log" 2>&1 &
  FUSE_PID=$!
  PIDS+=("$FUSE_PID"); FUSES+=("$at")
  for n in $(seq 200); do [ -e "$at/nbd" ] && break; kill -0 "$FUSE_PID" 2>/dev/null || break; sleep 0.05; done
  [ -e "$at/nbd" ] || { tail -n 5 "$WORK/nbdfuse.log"; fail "nbdfuse could not attach $1"; }
  LOOP=$(losetup ${LOOP_ARGS:-} -f --show "$at/nbd") || fail "no loop device"
  LOOPS+=("$LOOP"); FUSE=$at
}

detach() {
  local n i
  losetup -d "$LOOP" || fail "losetup -d $LOOP"
  for n in $(seq 100); do losetup "$LOOP" >/dev/null 2>&1 || break; sleep 0.05; done
  umount "$FUSE" 2>/dev/null || { sleep 0.5; umount "$FUSE" || fail "the FUSE mount is in use"; }
  for n in $(seq 200); do kill -0 "$FUSE_PID" 2>/dev/null || break; sleep 0.05; done
  forget_loop "$LOOP"
}

forget_loop() { local l kept=(); for l in ${LOOPS[@]+"${LOOPS[@]}"}; do [ "$l" = "$1" ] || kept+=("$l"); done; LOOPS=(${kept[@]+"${kept[@]}"}); }

# mount_at DIR ARGS...: mount, and remember it.
mount_at() { local d=$1; shift; mkdir -p "$d"; mount "$@" "$d" || return 1; MOUNTS+=("$d"); }
unmount() { umount "$1" || { sleep 1; umount "$1"; } || fail "umount $1"; }

cleanup() {
  local status=$? i p
  trap - EXIT INT TERM
  for ((i = ${#MOUNTS[@]} - 1; i >= 0; i--)); do mountpoint -q "${MOUNTS[i]}" && { umount "${MOUNTS[i]}" 2>/dev/null || umount -l "${MOUNTS[i]}" 2>/dev/null; }; done
  for i in ${LOOPS[@]+"${LOOPS[@]}"}; do losetup "$i" 2>/dev/null | grep -q "$WORK" && losetup -d "$i" 2>/dev/null; done
  for i in ${FUSES[@]+"${FUSES[@]}"}; do mountpoint -q "$i" && { umount "$i" 2>/dev/null || umount -l "$i" 2>/dev/null; }; done
  for p in ${PIDS[@]+"${PIDS[@]}"}; do kill -TERM "$p" 2>/dev/null; done
  for p in ${PIDS[@]+"${PIDS[@]}"}; do for i in $(seq 40); do kill -0 "$p" 2>/dev/null || break; sleep 0.05; done; kill -9 "$p" 2>/dev/null; done
  [ -n "$SERVER_STOP" ] && "$SERVER_STOP" stop "$WORK/objects" >/dev/null 2>&1
  if [ -n "${KEEP:-}" ]; then say "kept: $WORK"; elif [ -n "$WORK" ]; then rm -rf --one-file-system "$WORK"; fi
  case $status in
    0) say "passed in $(($(date +%s) - BEGAN)) s" ;;
    77 | 64) ;;
    *) say "failed with status $status after $(($(date +%s) - BEGAN)) s (seed $SEED)" ;;
  esac
  exit $status
}
