#!/bin/bash
# The NBD clients of others work and lose no byte: libnbd (nbdinfo, nbdcopy), QEMU (qemu-img, qemu-io), fio with verify,
# nbd-client; on TCP and on the unix socket; and what they wrote is what `disk export` gives.
. "$(dirname "$0")/lib.sh"
bed "$@"
needs nbdinfo nbdcopy qemu-img qemu-io fio nbd-client

size=$(pick 96 1024)   # MiB
image=$WORK/source.img
# Data, holes, zeroes that are written, a length that is no multiple of a block.
$PYTHON - "$image" "$size" "$SEED" <<'PYTHON'
import random, sys
path, size, rng = sys.argv[1], int(sys.argv[2]) << 20, random.Random(int(sys.argv[3]))
with open(path, "wb") as f:
    f.truncate(size)
    at = 0
    while at < size:
        n = min(rng.choice([1, 4, 16, 20]) << 20, size - at)
        f.seek(at)
        kind = rng.random()
        if kind < 0.5: f.write(rng.randbytes(n))
        elif kind < 0.6: f.write(bytes(n))
        at += n
    f.seek(size - 4096)
    f.write(rng.randbytes(4096))
PYTHON
for n in tcp unix; do
  margined disk create "copy-$n" --size "${size}M" --safe-points flush --durability scratch || fail "disk create"
  margined disk create "play-$n" --size 1G --safe-points flush --durability memory || fail "disk create"
done
start_daemon

uri() { if [ "$1" = tcp ]; then echo "nbd://127.0.0.1:$PORT/$2"; else echo "nbd+unix:///$2?socket=$SOCKET"; fi; }
for via in tcp unix; do
  u=$(uri $via copy-$via)
  [ "$(nbdinfo --size "$u")" = $((size << 20)) ] || fail "nbdinfo --size over $via"
  nbdinfo --json "$u" >"$WORK/info.json" || fail "nbdinfo over $via"
  for f in can_multi_conn can_fua can_flush can_trim can_zero; do grep -q "\"$f\": true" "$WORK/info.json" || fail "$f is not offered"; done
  nbdinfo --map "$u" >"$WORK/map" || fail "nbdinfo --map"
  grep -q 'hole,zero' "$WORK/map" || fail "an empty disk is not told to be a hole: $(head -1 "$WORK/map")"
  nbdinfo --list "$(uri $via '' )" >"$WORK/list" 2>&1 || fail "nbdinfo --list"
  grep -q "export=\"copy-$via\"" "$WORK/list" || fail "nbdinfo --list does not name copy-$via"

  check nbdcopy --flush "$image" "$u"
  check nbdcopy "$u" "$WORK/back.img"
  cmp "$image" "$WORK/back.img" || fail "nbdcopy there and back over $via"
  nbdinfo --map "$u" >"$WORK/map" || fail "nbdinfo --map"
  grep -q 'data' "$WORK/map" || fail "a full disk has no data in its map"
  check qemu-img compare -f raw -F raw "$image" "$u"
  say "$via: nbdinfo, nbdcopy both ways ($size MiB), block status"

  check qemu-img convert -f raw -O raw "$u" "$WORK/converted.img"
  cmp "$image" "$WORK/converted.img" || fail "qemu-img convert from $via"
  p=$(uri $via play-$via)
  check qemu-img convert -n -f raw -O raw "$image" "$p"
  check qemu-img compare -f raw -F raw "$image" "$p"   # the rest of the larger disk must be zeroes
  check qemu-io -f raw -c 'write -P 17 3145728 5242880' -c 'write -P 18 3149824 512' -c 'write -z 4194304 1048576' -c 'write -z -u 5242880 1000448' \
    -c 'discard 6291456 1048576' -c 'aio_write -P 19 8388608 65536' -c 'aio_write -P 20 8454144 65536' -c 'aio_flush' -c flush \
    -c 'write -f -P 21 1000000 1500000' "$p"
  qemu-io -f raw -c 'read -P 17 3145728 4096' -c 'read -P 18 3149824 512' -c 'read -P 17 3150336 1043968' -c 'read -P 0 4194304 2048000' \
    -c 'read -P 19 8388608 65536' -c 'read -P 20 8454144 65536' -c 'read -P 21 1000000 1500000' -c 'map' "$p" >"$WORK/out" 2>&1 || { cat "$WORK/out"; fail "qemu-io over $via"; }
  grep -q 'Pattern verification failed' "$WORK/out" && { cat "$WORK/out"; fail "qemu-io: wrong bytes over $via"; }
  say "$via: qemu-img convert and compare, qemu-io patterns"

  for bs in 4k-4k 512-64k; do
    check fio --name=v --ioengine=nbd --uri="$p" --rw=randrw --bsrange=$bs --size="$(pick 48M 512M)" --io_size="$(pick 48M 1G)" \
      --iodepth=32 --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_state_save=0 --randseed="$SEED" --fsync=64
  done
  say "$via: fio randrw with verify, 4k and 512 to 64k"
done
nbd-client -l 127.0.0.1 "$PORT" >"$WORK/list" 2>&1 || fail "nbd-client -l over TCP"
grep -q copy-tcp "$WORK/list" || fail "nbd-client -l does not name the disks"
nbd-client -l -u "$SOCKET" >"$WORK/list" 2>&1 || fail "nbd-client -l over unix"
grep -q copy-unix "$WORK/list" || fail "nbd-client -l does not name the disks"
if nbdinfo "$(uri tcp no-such-disk)" >/dev/null 2>"$WORK/out"; then fail "an unknown name was let in"; fi
say "nbd-client -l on both; an unknown name is refused"

stop_daemon
for n in tcp unix; do
  check margined disk export "copy-$n" "$WORK/export.img"
  cmp "$image" "$WORK/export.img" || fail "the export of copy-$n"
done
say "after the drain, disk export gives the same bytes"
