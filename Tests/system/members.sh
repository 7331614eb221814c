#!/bin/bash
# A btrfs over two disks, written by this kernel (nbdfuse and loop devices) while both are forked with `disk fork --into`; needs
# root. Each pair of forks passes `btrfs check`, mounts without any repair, and scrubs clean; what was synced before is there.
. "$(dirname "$0")/lib.sh"
bed "$@"
needs_mounts mkfs.btrfs btrfs
rounds=$(pick 4 40)

w=$WORK/mnt/work f=$WORK/mnt/fork
configure
sed -i "1a scratch = \"$SCRATCH\"" "$WORK/margined.toml"   # where the control socket is
for d in a b; do margined disk create $d --size 2G || fail "disk create"; done
start_daemon
attach "$URI/a"; one=$LOOP first=("$LOOP" "$FUSE" "$FUSE_PID")
attach "$URI/b"; two=$LOOP
check mkfs.btrfs -q -d raid0 -m raid0 "$one" "$two"
btrfs device scan "$one" "$two" >/dev/null
mount_at "$w" -o commit=1 "$one" || fail "mount"

counting() {
  local n=0
  while [ ! -e "$WORK/over" ]; do
    n=$((n + 1))
    head -c 200000 /dev/urandom >"$w/file$((n % 20))"
    echo "$n" >"$w/count.new" && sync "$w/count.new" && mv "$w/count.new" "$w/count" && sync -f "$w" || { echo count >>"$WORK/load-failed"; return; }
    echo "$n" >"$WORK/counted.new" && mv "$WORK/counted.new" "$WORK/counted"
  done
}
counting & load=$!
PIDS+=("$load")
until [ -s "$WORK/counted" ]; do [ ! -e "$WORK/load-failed" ] || fail "the load"; sleep 0.1; done

# Of one alone it is said that it is a part.
margined disk fork a alone 2>"$WORK/out" || fail "fork of one: $(cat "$WORK/out")"
grep -q 'has 2 devices' "$WORK/out" || fail "no warning for one of two members: $(cat "$WORK/out")"
margined disk delete alone --force || fail "disk delete"

before=()
for i in $(seq "$rounds"); do
  before[i]=$(cat "$WORK/counted")
  margined disk fork a b --into "x$i" "y$i" --config "$WORK/margined.toml" 2>"$WORK/out" || fail "fork $i: $(cat "$WORK/out")"
  [ ! -s "$WORK/out" ] || fail "fork $i says: $(cat "$WORK/out")"
  sleep 0.$((i % 10))
  [ ! -e "$WORK/load-failed" ] || fail "the load failed"
done
touch "$WORK/over"
wait "$load"
[ ! -e "$WORK/load-failed" ] || fail "the load failed"
unmount "$w"
detach
LOOP=${first[0]} FUSE=${first[1]} FUSE_PID=${first[2]}
detach
btrfs device scan --forget >/dev/null 2>&1

# Only now, for the kernel and btrfs-progs tell file systems apart by their id.
for i in $(seq "$rounds"); do
  for d in x y; do margined disk export "$d$i" "$WORK/$d.img" >/dev/null || fail "export"; done
  lx=$(losetup -f --show "$WORK/x.img") && ly=$(losetup -f --show "$WORK/y.img") || fail "no loop device"
  LOOPS+=("$lx" "$ly")
  check btrfs device scan "$lx" "$ly"
  check btrfs check --readonly "$lx"
  mount_at "$f" "$lx" || fail "fork $i does not mount: $(dmesg | tail -n 3)"
  seen=$(cat "$f/count" 2>/dev/null || echo 0)
  [ "$seen" -ge "${before[i]}" ] || fail "fork $i shows $seen, and ${before[i]} was synced before"
  check btrfs scrub start -B "$f"
  unmount "$f"
  btrfs device scan --forget >/dev/null 2>&1
  losetup -d "$lx"; losetup -d "$ly"; forget_loop "$lx"; forget_loop "$ly"
  rm -f "$WORK/x.img" "$WORK/y.img"
done
stop_daemon
say "$rounds pairs of forks of a btrfs over two disks under load: checked, mounted, scrubbed; $(cat "$WORK/counted") syncs meanwhile"
