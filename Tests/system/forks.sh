#!/bin/bash
# Forks of a btrfs under heavy write load, by this kernel (nbdfuse and a loop device); needs root.
#
# Each fork passes `btrfs check` and mounts, to be written or, of --read-only, on a device that can't be; what is written to it
# is never seen in its source, and what the source writes afterwards is never seen in it.
. "$(dirname "$0")/lib.sh"
bed "$@"
needs_mounts mkfs.btrfs btrfs sqlite3
forks=$(pick 10 200)

at=$WORK/mnt w=$WORK/mnt/work
configure
margined disk create work --size 8G || fail "disk create"
start_daemon
attach "$URI/work"
check mkfs.btrfs -q "$LOOP"
mount_at "$w" -o commit=1 "$LOOP" || fail "mount"
work=("$LOOP" "$FUSE" "$FUSE_PID")

# The load: a number that only grows, each value synced; files that come and go, each with its checksum in its name; sqlite.
counting() {
  local n=0
  while [ ! -e "$WORK/over" ]; do
    n=$((n + 1))
    echo "$n" >"$w/count.new" && sync "$w/count.new" && mv "$w/count.new" "$w/count" && sync -f "$w" || { echo "count" >>"$WORK/load-failed"; return; }
    echo "$n" >"$WORK/counted.new" && mv "$WORK/counted.new" "$WORK/counted"
  done
}
churning() {
  local n=0 sum
  mkdir -p "$w/files"
  while [ ! -e "$WORK/over" ]; do
    n=$((n + 1))
    head -c $((RANDOM * 40 + 1)) /dev/urandom >"$w/files/new" && sync "$w/files/new" && sum=$(sha256sum <"$w/files/new") && mv "$w/files/new" "$w/files/$n-${sum%% *}" || { echo "churn" >>"$WORK/load-failed"; return; }
    [ $((n % 3)) = 0 ] && rm -f "$w/files/$((n - 2))"-*
    [ $((n % 40)) = 0 ] && { btrfs -q subvolume snapshot "$w" "$w/snap$n" && btrfs -q subvolume delete "$w/snap$n" || echo "snapshot" >>"$WORK/load-failed"; }
    [ $((n % 200)) = 0 ] && rm -f "$w/files"/*-*
    [ $((n % 10)) = 0 ] && dd if=/dev/urandom of="$w/unsynced" bs=1M count=$((n % 7 + 1)) 2>/dev/null
  done
}
rows() {
  local n
  while [ ! -e "$WORK/over" ]; do
    { echo 'PRAGMA synchronous=FULL; CREATE TABLE IF NOT EXISTS t(k INTEGER PRIMARY KEY, v BLOB);'
      for n in $(seq 20); do echo 'INSERT INTO t(v) VALUES(randomblob(2000));'; done; } | sqlite3 "$w/rows.db" || echo "sqlite" >>"$WORK/load-failed"
  done
}
counting & loads=("$!")
churning & loads+=("$!")
rows & loads+=("$!")
PIDS+=("${loads[@]}")

# All files whose name tells their checksum have it.
whole() {
  (cd "$1/files" 2>/dev/null || exit 0; for f in [0-9]*-*; do [ -e "$f" ] || continue; s=$(sha256sum <"$f"); [ "${f#*-}" = "${s%% *}" ] || { echo "$f"; exit 1; }; done)
}
until [ -s "$WORK/counted" ] && [ "$(cat "$WORK/counted")" -ge 3 ]; do [ ! -e "$WORK/load-failed" ] || fail "the load"; sleep 0.1; done

written=0 readonly=0 scrubbed=0 slowest=0
for i in $(seq "$forks"); do
  kind=$((i % 5)) flags=()
  [ $kind = 0 ] && flags=(--read-only)
  [ $kind = 1 ] && flags=(--now)
  before=$(cat "$WORK/counted")
  t=$(date +%s%N)
  margined disk fork work "fork$i" ${flags[@]+"${flags[@]}"} 2>"$WORK/out" || fail "fork $i ${flags[*]-}: $(cat "$WORK/out")"
  ms=$((($(date +%s%N) - t) / 1000000))
  [ $kind = 1 ] || [ $ms -le $slowest ] || slowest=$ms
  f=$at/fork$i
  if [ $kind = 0 ]; then
    LOOP_ARGS=-r attach "$URI/fork$i"
    [ "$(blockdev --getro "$LOOP")" = 1 ] || fail "read-only fork $i can be written"
    check btrfs check --readonly "$LOOP"
    mount_at "$f" -o ro "$LOOP" || fail "read-only fork $i does not mount on a read-only device: $(dmesg | tail -n 3)"
    readonly=$((readonly + 1))
  else
    attach "$URI/fork$i"
    check btrfs check --readonly "$LOOP"
    mount_at "$f" "$LOOP" || fail "fork $i does not mount"
    written=$((written + 1))
  fi
  seen=$(cat "$f/count" 2>/dev/null || echo 0)
  # What was synced before a fork --now is in it.
  [ $kind != 1 ] || [ "$seen" -ge "$before" ] || fail "fork $i --now shows $seen, and $before was synced before"
  # Primary super block and mirrors are of one generation: scrub finds nothing.
  if [ $((i % 5)) = 2 ]; then
    check btrfs scrub start -B -r "$f"
    grep -Eq 'super=[1-9]' "$WORK/out" && fail "fork $i has stale mirrors: $(cat "$WORK/out")"
    scrubbed=$((scrubbed + 1))
  fi
  bad=$(whole "$f") || fail "fork $i: $bad does not have the bytes it was written with"
  [ -z "$(find "$f" -maxdepth 1 -name 'by-*')" ] || fail "fork $i shows what another fork wrote"
  if [ $kind != 0 ]; then
    echo "$i" >"$f/by-fork$i"
    rm -rf "$f/files"
    dd if=/dev/urandom of="$f/own" bs=64k count=32 conv=fsync 2>/dev/null || fail "write to fork $i"
    sum=$(sha256sum <"$f/own")
  fi
  # The source has gone on meanwhile; read anew, the fork has not.
  now=$(cat "$WORK/counted")
  for n in $(seq 100); do [ "$(cat "$WORK/counted")" -gt $((now + 1)) ] && break; sleep 0.05; done
  unmount "$f"
  if [ $kind = 0 ]; then mount_at "$f" -o ro "$LOOP"; else mount_at "$f" "$LOOP"; fi || fail "fork $i does not mount again"
  [ "$(cat "$f/count" 2>/dev/null || echo 0)" = "$seen" ] || fail "fork $i goes on as its source does"
  if [ $kind != 0 ]; then
    [ "$(sha256sum <"$f/own")" = "$sum" ] && [ "$(cat "$f/by-fork$i")" = "$i" ] && [ ! -e "$f/files" ] || fail "fork $i lost what was written to it"
  fi
  unmount "$f"
  [ $kind = 0 ] || check btrfs check --readonly "$LOOP"
  detach
  [ -z "$(find "$w" -maxdepth 1 -name 'by-*' -o -maxdepth 1 -name own)" ] || fail "the source shows what fork $i wrote"
  [ ! -e "$WORK/load-failed" ] || fail "the load failed: $(sort -u "$WORK/load-failed" | tr '\n' ' ')"
  [ $((i % 3)) = 0 ] && { margined disk delete "fork$i" --force || fail "delete of fork $i"; }
done

touch "$WORK/over"
for p in "${loads[@]}"; do wait "$p"; done
[ ! -e "$WORK/load-failed" ] || fail "the load failed: $(sort -u "$WORK/load-failed" | tr '\n' ' ')"
last=$(cat "$WORK/counted")
unmount "$w"
LOOP=${work[0]} FUSE=${work[1]} FUSE_PID=${work[2]}
check btrfs check --readonly "$LOOP"
mount_at "$w" -o ro "$LOOP" || fail "mount of the source"
[ "$(cat "$w/count")" = "$last" ] || fail "the source shows $(cat "$w/count"), not $last"
bad=$(whole "$w") || fail "the source: $bad does not have the bytes it was written with"
[ -z "$(find "$w" -name 'by-*')" ] || fail "the source shows what a fork wrote"
unmount "$w"
detach
stop_daemon
say "$forks forks of a btrfs under load ($written written, $readonly read-only, $scrubbed scrubbed), each checked, mounted twice and on its own; $last syncs of the source meanwhile; the slowest fork took $slowest ms"
