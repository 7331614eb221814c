#!/bin/bash
# Real file systems on a disk, by this kernel (nbdfuse and a loop device); needs root.
#
# 1. mkfs.btrfs on a 2 TiB disk takes seconds, its whole-device trim included.
# 2. btrfs: a tree of /usr, snapshots, deletes, balance, sqlite with its fsyncs, while generations are committed; then the
#    daemon starts again with an empty scratch directory on the same store: everything is there, every checksum right.
# 3. Every generation of that load, exported, passes `btrfs check` and mounts.
# 4. ext4 with safe-points = flush: every generation recovers its journal and passes `e2fsck -fn`.
. "$(dirname "$0")/lib.sh"
bed "$@"
needs_mounts mkfs.btrfs btrfs mkfs.ext4 e2fsck sqlite3 qemu-img
quick && files=6000 || files=25000
want=$(pick 12 30)   # generations

at=$WORK/mnt
sums() { (cd "$1" && find "$2" -type f -print0 | LC_ALL=C sort -z | xargs -0 -r sha256sum) | sha256sum | cut -d' ' -f1; }
# Copies files out of /usr into DIR until there are so many; small ones, and in quick form few large ones.
copy_tree() {
  (cd /usr && find lib share include -xdev -type f -size -"$(pick 64k 512k)" 2>/dev/null | LC_ALL=C sort | head -n "$files" | tar cf - -T - 2>/dev/null) | tar xf - -C "$1"
}
database() { # FILE ROWS: each insert is a transaction of its own, so an fsync
  { echo 'PRAGMA synchronous=FULL; CREATE TABLE IF NOT EXISTS t(k INTEGER PRIMARY KEY, v BLOB);'
    for i in $(seq "$2"); do echo "INSERT INTO t(v) VALUES(randomblob(900));"; done; } | sqlite3 "$1"
}
generation() { field "$1" generation; }

configure
margined disk create big --size 2T || fail "disk create"
margined disk create work --size 20G --safe-points auto --durability scratch --history-density 16 || fail "disk create"
margined disk create ext --size 4G --safe-points flush --durability scratch --history-density 16 || fail "disk create"
start_daemon

# 1
attach "$URI/big"
t=$(date +%s%N)
check mkfs.btrfs -q "$LOOP"
ms=$((($(date +%s%N) - t) / 1000000))
mount_at "$at/big" "$LOOP" || fail "mount of the 2 TiB disk"
unmount "$at/big"
detach
[ $ms -lt 20000 ] || fail "mkfs.btrfs on 2 TiB took $ms ms"
say "mkfs.btrfs on 2 TiB: $ms ms; mounted; $(field big storedBytes) bytes stored"

# 2
attach "$URI/work"
check mkfs.btrfs -q "$LOOP"
mount_at "$at/work" -o commit=1 "$LOOP" || fail "mount"
w=$at/work
first=$(generation work); [ "$first" -gt 0 ] || first=1
check btrfs subvolume create "$w/tree"
copy_tree "$w/tree" || fail "the copy of /usr"
count=$(find "$w/tree" -type f | wc -l)
[ "$count" -ge $((files * 9 / 10)) ] || fail "only $count files were found in /usr"
sync -f "$w"
check btrfs subvolume snapshot -r "$w/tree" "$w/snap0"
(database "$w/base.db" "$(pick 250 3000)" || echo failed >"$WORK/sqlite-failed") &
sqlite=$!
n=0
until [ $(($(generation work) - first)) -ge "$want" ] && [ $n -ge 8 ]; do
  n=$((n + 1))
  [ $n != 4 ] || hurt_store
  [ $n -le 400 ] || fail "only $(($(generation work) - first)) generations in $n rounds of load"
  mkdir -p "$w/tree/round$n"
  cp -r "$w/tree/share"/. "$w/tree/round$n/" 2>/dev/null &
  c=$!
  sleep 0.3
  kill $c 2>/dev/null; wait $c 2>/dev/null
  dd if=/dev/urandom of="$w/blob$((n % 3))" bs=64k count=20 conv=notrunc 2>/dev/null || fail "write: dd"
  dd if=/dev/urandom of="$w/direct" bs=64k count=16 oflag=direct conv=notrunc,fsync 2>/dev/null || fail "direct write: dd"
  [ $((n % 3)) = 0 ] && rm -rf "$w/tree/round$((n - 1))"
  [ $((n % 4)) = 0 ] && { btrfs -q subvolume snapshot "$w/tree" "$w/snap$n" || fail "snapshot"; }
  [ $((n % 8)) = 0 ] && { btrfs -q subvolume delete "$w/snap$((n - 4))" || fail "subvolume delete"; }
  [ $((n % 5)) = 0 ] && fstrim "$w"
  [ $((n % 2)) = 0 ] && sync -f "$w"
done
wait $sqlite
[ ! -e "$WORK/sqlite-failed" ] || fail "sqlite"
quick || check btrfs balance start -dusage=50 "$w"
rows=$(sqlite3 "$w/base.db" 'select count(*) from t; pragma integrity_check;' | tr '\n' ' ')
before=$(sums "$w" .)
unmount "$w"
detach
stop_daemon
last=$(generation work)
say "btrfs: $count files of /usr, $n rounds of load, sqlite $rows; generations $first to $last"

rm -rf "$SCRATCH"
start_daemon
attach "$URI/work"
check btrfs check --readonly "$LOOP"
mount_at "$w" "$LOOP" || fail "mount after the loss of scratch"
check btrfs scrub start -B -r "$w"
[ "$(sqlite3 "$w/base.db" 'select count(*) from t; pragma integrity_check;' | tr '\n' ' ')" = "$rows" ] || fail "the database differs"
after=$(sums "$w" .)
[ "$before" = "$after" ] || fail "the files' checksums differ after the restart with an empty scratch"
unmount "$w"
detach
stop_daemon
say "restart with an empty scratch: check and scrub clean, every file's checksum as before"

# 3: one generation after another; the image's bytes stay sparse
examine() { # IMAGE GENERATION
  local l
  btrfs check --readonly "$1" >"$WORK/out" 2>&1 || { tail -n 15 "$WORK/out"; fail "btrfs check of generation $2"; }
  l=$(losetup -f --show "$1") || fail "no loop device"
  LOOPS+=("$l")
  # A log commit wants its log replayed, which takes a device that can be written (the image is ours).
  mount_at "$at/gen" "$l" || fail "generation $2 does not mount"
  (cd "$at/gen" && find . -type f -size -8k -print0 | head -z -n 500 | xargs -0 -r cat >/dev/null) || fail "generation $2 has unreadable files"
  unmount "$at/gen"
  losetup -d "$l"; forget_loop "$l"
}
have=0 no=0
for g in $(seq "$first" "$last"); do
  margined disk export "work@$g" "$WORK/gen.img" >/dev/null 2>"$WORK/out" || fail "export of generation $g: $(cat "$WORK/out")"
  if [ "$g" -gt "$first" ] || blkid -p "$WORK/gen.img" >/dev/null; then
    if [ -z "$(blkid -p -o value -s TYPE "$WORK/gen.img")" ]; then
      [ $have = 0 ] || fail "generation $g holds no file system"
      no=$((no + 1)); rm -f "$WORK/gen.img"; continue
    fi
    examine "$WORK/gen.img" "$g"; have=$((have + 1))
  fi
  rm -f "$WORK/gen.img"
done
[ $have -ge "$want" ] || fail "only $have generations hold a file system, wanted $want"
say "btrfs: $have generations exported, checked and mounted ($no from before mkfs was done)"

# 4
start_daemon
attach "$URI/ext"
check mkfs.ext4 -q -F "$LOOP"
mount_at "$at/ext" -o commit=1 "$LOOP" || fail "mount of ext4"
e=$at/ext
first=$(generation ext) n=0; [ "$first" -gt 0 ] || first=1
mkdir "$e/usr"
until [ $(($(generation ext) - first)) -ge "$(pick 8 30)" ]; do
  n=$((n + 1)); [ $n -le 200 ] || fail "only $(($(generation ext) - first)) generations of ext4"
  cp -r "/usr/share/perl5" "$e/usr/r$((n % 4))" 2>/dev/null & c=$!
  sleep 0.4; kill $c 2>/dev/null; wait $c 2>/dev/null
  dd if=/dev/urandom of="$e/f$((n % 5))" bs=16k count=$((n % 7 + 1)) conv=fsync 2>/dev/null || fail "write on ext4"
  [ $((n % 3)) = 0 ] && rm -rf "$e/usr/r$(((n + 1) % 4))"
done
unmount "$e"
detach
stop_daemon
last=$(generation ext) have=0
for g in $(seq "$first" "$last"); do
  margined disk export "ext@$g" "$WORK/gen.img" >/dev/null || fail "export of ext generation $g"
  # Replays the journal and nothing else; then nothing may be left to repair.
  e2fsck -E journal_only -p "$WORK/gen.img" >"$WORK/out" 2>&1; [ $? -le 1 ] || { cat "$WORK/out"; fail "journal of ext generation $g"; }
  e2fsck -fn "$WORK/gen.img" >"$WORK/out" 2>&1 || { tail -n 15 "$WORK/out"; fail "e2fsck of ext generation $g"; }
  have=$((have + 1))
  rm -f "$WORK/gen.img"
done
say "ext4: $have generations, each clean after its journal was replayed"
