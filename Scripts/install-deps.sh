#!/bin/bash
# Installs Debian packages: Scripts/install-deps.sh [build] [run] [test] [chaos] [ceph]   (default: build)
#   build  what the build links against    run   what the printed lines of Scripts/run.sh attach with
#   test   what Scripts/test.sh drives     chaos  what Scripts/chaos-tcpkill.sh needs beside that
#   ceph   Ceph's object gateway, for the tests against it
# Only what is missing is installed; as root, or by sudo. Prints nothing where nothing is missing.
set -eu
build="binutils gcc libc6-dev libstdc++-12-dev git ca-certificates tzdata libxml2 libncurses6 libedit2 libpython3.11 pkg-config
  zlib1g-dev libssl-dev liburing-dev libcurl4-openssl-dev libzstd-dev libxxhash-dev libb2-dev"
run="nbd-client libnbd-bin fuse3 btrfs-progs qemu-utils"
test="python3 nbdkit nbd-client nbd-server libnbd-bin libnbd-dev python3-libnbd qemu-utils fio btrfs-progs e2fsprogs
  fuse3 sqlite3 curl openssl procps iproute2 groff man-db"
chaos="python3 dsniff qemu-system-x86 busybox-static kmod cpio nbd-client libnbd-bin btrfs-progs fuse3 iproute2 util-linux procps"
ceph="ceph-mon ceph-osd radosgw ceph-common curl openssl"

wanted=
for group in "${@:-build}"; do
  case $group in
    build | run | test | chaos | ceph) wanted="$wanted ${!group}" ;;
    *) echo "usage: Scripts/install-deps.sh [build] [run] [test] [chaos] [ceph]" >&2; exit 64 ;;
  esac
done
missing=()
for package in $wanted; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

as_root=()
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null || { echo "install-deps.sh: missing ${missing[*]}, and neither root nor sudo to install them: run 'apt-get install ${missing[*]}' as root" >&2; exit 1; }
  as_root=(sudo)
fi
echo "installing ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() { ${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" >"$log" 2>&1; }
# The package lists may be old or not there at all: fetch them when the first try fails.
install || { ${as_root[@]+"${as_root[@]}"} apt-get update >"$log" 2>&1 && install; } || {
  tail -n 5 "$log" >&2
  echo "install-deps.sh: apt could not install ${missing[*]}: mend that and run this again" >&2
  exit 1
}
