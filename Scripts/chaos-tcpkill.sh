#!/bin/bash
# Real file systems on real kernels while everything around them fails: Scripts/chaos-tcpkill.sh [OPTION...]
#
# A btrfs on a disk of margined is loaded (archives unpacked, fsync from several writers, sqlite, snapshots, discards,
# overwriting with and without copy-on-write) while connections are cut at random instants by tcpkill and otherwise, the
# daemon is killed or drained, its scratch wiped, the disk moved to a second daemon, the store failing. After each round the
# disk is attached anew, checked by `btrfs check`, mounted, and everything that was synced is looked for.
#
#   --host          this kernel, by nbdfuse and a loop device (default)
#   --guest         nbd.ko and btrfs of Debian's kernel in a guest of QEMU; no KVM needed
#   --rounds N      default: 500 on the host, 100 in the guest; quick: as many as fit
#   --minutes N     no new round begins after so many
#   --quick         a few rounds of each mode, less than 5 minutes in the guest as well
#   --modes LIST    resume,rollback (default both): a resume window and a client that reconnects; window 0, and a client that
#                   attaches anew after each cut
#   --faults LIST   of tcpkill,reset,half,stall,client,kill,drain,wipe,move-dead,move-force,outage (default all)
#   --seed N        the same faults and load again; their instants differ
#   --store URL     another store than one made for the run; or STORE_KIND=file|s3check|ceph
#   --evidence DIR  where violations are kept (default: var/chaos/SEED)
#   --break RULE    the run passes if it FINDS the daemon's broken rule; MARGINED must be a build with MARGARINE_FAULTS
#
# Needs root. Network, mounts and processes are in namespaces of their own, which end with the run. Exit status: 0 all held,
# 1 something did not (a violation, or too few cuts took effect), 64 usage, 77 this machine lacks what it takes.
# Docs/Chaos.md tells how to read what it prints and keeps.
root=$(cd "$(dirname "$0")/.." && pwd)
self=$root/Scripts/chaos-tcpkill.sh

if [ -z "${CHAOS_INSIDE:-}" ]; then
  for word in "$@"; do case $word in -h | --help) sed -n '2,/^[^#]/{s/^# \{0,1\}//;/^[^#]/p}' "$self" | sed '/^root=/,$d'; exit 0 ;; esac; done
  [ "$(id -u)" = 0 ] || { echo "chaos-tcpkill: SKIP: it takes root"; exit 77; }
  "$root/Scripts/install-deps.sh" test chaos || { echo "chaos-tcpkill: SKIP: packages are missing"; exit 77; }
  if [[ " $* " == *" --guest "* ]]; then
    export GUEST_CACHE=${CHAOS_GUEST_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/margarine-chaos}
    KERNEL_TREE=$("$root/Tests/chaos/guest-kernel.sh" "$GUEST_CACHE" 2>&1) || { echo "chaos-tcpkill: SKIP: ${KERNEL_TREE##*$'\n'}"; exit 77; }
    export KERNEL_TREE
  fi
  # Processes end with the first of them, mounts and interfaces with their namespaces. A store elsewhere needs the host's network.
  spaces=(--mount --pid --net)
  for word in "$@"; do case $word in s3://*) spaces=(--mount --pid) ;; esac; done
  unshare "${spaces[@]}" true 2>/dev/null || { echo "chaos-tcpkill: SKIP: no namespaces here"; exit 77; }
  CHAOS_INSIDE=1 unshare "${spaces[@]}" --fork --kill-child --mount-proc "$self" "$@" &
  child=$!
  trap 'kill -TERM "$(pgrep -P $child)" 2>/dev/null' INT TERM HUP
  while kill -0 $child 2>/dev/null; do wait $child; status=$?; done
  exit $status
fi

. "$root/Tests/system/lib.sh"
BED=chaos
form=host rounds= minutes=0 modes=resume,rollback faults= store= evidence= breaks= words=()
while [ $# -gt 0 ]; do
  case $1 in
    --host | --guest) form=${1#--} ;;
    --quick) words+=(--quick) ;;
    --seed) words+=(--seed "${2:?}"); shift ;;
    --rounds) rounds=${2:?}; shift ;;
    --minutes) minutes=${2:?}; shift ;;
    --modes) modes=${2:?}; shift ;;
    --faults) faults=${2:?}; shift ;;
    --store) store=${2:?}; shift ;;
    --evidence) evidence=${2:?}; shift ;;
    --break) breaks=${2:?}; shift ;;
    *) echo "chaos-tcpkill: unknown '$1'; see --help" >&2; exit 64 ;;
  esac
  shift
done
[[ ,resume,rollback, == *,${modes%%,*},* && ,resume,rollback, == *,${modes##*,},* ]] || { echo "chaos-tcpkill: --modes is resume, rollback or both" >&2; exit 64; }

ip link set lo up 2>/dev/null
if [ -n "$store" ]; then start_store() { STORE=$store; export STORE MARGARINE_STORE=$store; }; STORE_KIND=url; fi
bed ${words[@]+"${words[@]}"}
[ -c /dev/fuse ] || skip "no /dev/fuse on this machine"
needs tcpkill ss ip nsenter btrfs mkfs.btrfs nbdfuse losetup
# The pid namespace's first process ends on no signal that it does not ask for.
trap 'exit 130' INT TERM HUP

if [ -z "$rounds" ]; then
  if [ $form = host ]; then rounds=$(pick 60 500); else rounds=$(pick 8 100); fi
fi
if quick && [ "$minutes" = 0 ]; then minutes=$(if [ $form = host ]; then echo 2; else echo 3; fi); fi
[ -n "$evidence" ] || evidence=$root/var/chaos/$SEED
mkdir -p "$evidence"; evidence=$(cd "$evidence" && pwd); rmdir "$evidence"

# What the load unpacks: small files in folders, the same on every machine.
$PYTHON - "$WORK/archive.tar" $(if [ $form = host ]; then echo 80; else echo 25; fi) <<'PYTHON'
import io, random, sys, tarfile
rng = random.Random(1)
with tarfile.open(sys.argv[1], "w") as t:
    for i in range(int(sys.argv[2])):
        data = rng.randbytes(rng.choice([0, 100, 3000, 9000])) + b"line\n" * rng.randrange(600)
        m = tarfile.TarInfo(f"d{i % 7}/e{i % 3}/f{i}")
        m.size = len(data)
        t.addfile(m, io.BytesIO(data))
PYTHON

# The client's side of the network: a namespace on the host, the guest otherwise; the daemon's address is on this side.
server=198.18.77.1 client=198.18.77.2 interface=mgchaos$(($$ % 1000)) inside= guest=
# Whatever the end: what the run has started is killed, one by one (this is the first process of its own namespace), then its
# mounts and loop devices go, so that nothing holds the work directory.
end_all() {
  local p at loop loops
  loops=$(losetup -a | grep -F "($WORK/" | cut -d: -f1)     # without their files they do not say whose they are
  {
    [ $$ = 1 ] && for p in /proc/[0-9]*; do p=${p#/proc/}; [ "$p" = 1 ] || kill -9 "$p"; done
    wait
  } 2>/dev/null
  while read -r _ at _; do [[ $at == "$WORK"/* ]] && { umount "$at" 2>/dev/null || umount -l "$at"; }; done < <(tac /proc/self/mounts)
  for loop in $loops; do losetup "$loop" 2>/dev/null | grep -q nbd && losetup -d "$loop"; done
  ip link del "$interface" 2>/dev/null
}
trap 'status=$?; end_all; (exit $status); cleanup' EXIT
if [ $form = host ]; then
  needs_mounts
  unshare --net sleep infinity &
  space=$!
  PIDS+=("$space")
  for n in $(seq 100); do [ "$(readlink /proc/$space/ns/net)" != "$(readlink /proc/self/ns/net)" ] && break; sleep 0.02; done
  ip link add "$interface" type veth peer name mgclient netns "$space" || skip "no veth here"
  inside="nsenter -t $space --net"
  $inside ip link set lo up
  $inside ip addr add $client/30 dev mgclient
  $inside ip link set mgclient up
  mkdir "$WORK/client"; cp "$WORK/archive.tar" "$WORK/client/"
else
  . "$root/Tests/chaos/guest.sh"
  ip tuntap add "$interface" mode tap || skip "no tap device here"
fi
ip addr add $server/30 dev "$interface" && ip link set "$interface" up || fail "the network"
[ $form = host ] || start_guest

say "$form form, modes $modes, up to $rounds rounds${breaks:+, with the rule '$breaks' broken}"
[ -z "$breaks" ] || export MARGARINE_FAULT=$breaks
export STORE_KIND
$PYTHON "$root/Tests/chaos/chaos.py" --form $form --rounds "$rounds" --minutes "$minutes" --modes "$modes" --faults "$faults" --breaks "$breaks" \
  --evidence "$evidence" --server $server --client $client --interface "$interface" --inside "$inside" --guest "$guest" &
chaos=$!
PIDS+=("$chaos")
status=0
wait $chaos || status=$?
exit $status
