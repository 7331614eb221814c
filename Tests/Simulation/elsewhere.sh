#!/bin/bash
# The same seeds on this machine and on another one: Tests/Simulation/elsewhere.sh [--seed N] [--runs R]
# The other one is a virtual machine with Debian's kernel and a processor of QEMU's own making (no SSE4.2, no AVX, half the
# memory and one core), on which the same program must print the same hashes. SIMULATE is the program. Exit status 0: it did;
# 77: this machine lacks what it takes.
set -u
cd "$(dirname "$0")/../.." || exit 1
seed=1 runs=6
while [ $# -gt 0 ]; do
  case $1 in
    --seed) seed=${2:?} ;;
    --runs) runs=${2:?} ;;
    *) sed -n '2,6s/^# //p' "$0" >&2; exit 64 ;;
  esac
  shift 2
done
simulate=${SIMULATE:-$PWD/.build/release/simulate}
PATH=$PATH:/usr/sbin:/sbin
skip() { echo "SKIP: $1"; exit 77; }
for tool in qemu-system-x86_64 busybox cpio dpkg-deb depmod; do command -v $tool >/dev/null || skip "no $tool on this machine"; done
kernel=$(bash Tests/chaos/guest-kernel.sh "${GUEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/margarine-chaos}") || skip "no kernel for the guest"

work=$(mktemp -d "${TMPDIR:-/tmp}/margarine-elsewhere.XXXXXX")
trap 'rm -rf "$work"' EXIT
tree=$work/tree
mkdir -p "$tree"/{bin,proc,sys,dev,tmp,etc}
cp "$(command -v busybox)" "$tree/bin/busybox"
for f in sh mount poweroff; do ln -s busybox "$tree/bin/$f"; done
for f in "$simulate" $(ldd "$simulate" | grep -o '/[^ ]*'); do mkdir -p "$tree$(dirname "$f")"; cp -pL "$f" "$tree$f"; done
cat >"$tree/init" <<INIT
#!/bin/sh
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
$simulate --verbose --seed $seed --runs $runs
echo "status \$?"
poweroff -f
INIT
chmod 755 "$tree/init"
(cd "$tree" && find . -mindepth 1 | cpio --quiet -o -H newc) | gzip -1 >"$work/initrd" || exit 1

"$simulate" --verbose --seed "$seed" --runs "$runs" | grep '^seed [0-9]*:' >"$work/here" || { cat "$work/here"; exit 1; }
timeout 1800 qemu-system-x86_64 -accel tcg -machine pc -cpu qemu64 -smp 1 -m 2048 -nodefaults -no-user-config -display none -no-reboot \
  -kernel "$(echo "$kernel"/boot/vmlinuz-*)" -initrd "$work/initrd" -append "console=ttyS0 panic=-1 mitigations=off loglevel=3" \
  -serial stdio -monitor none </dev/null 2>"$work/qemu.log" | tr -d '\r' >"$work/console"
grep '^seed [0-9]*:' "$work/console" >"$work/there"
if [ -s "$work/here" ] && grep -q '^status 0' "$work/console" && diff "$work/here" "$work/there"; then
  echo "$(wc -l <"$work/there") seeds from $seed on went the same way on another machine: $(grep -o 'hash [0-9a-f]*' "$work/there" | tail -n 1) the last"
else
  tail -n 12 "$work/console" "$work/qemu.log"
  echo "FAILED: another machine went another way"
  exit 1
fi
