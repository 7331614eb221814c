#!/bin/bash
# Benchmarks margined beside its peers, in one run on one machine, and prints ratios: Scripts/bench.sh [--quick] [--json FILE]
#
# All servers are up at once, with the same bytes in memory (peers: files in /dev/shm), over TCP on loopback. The cases are
# run in turns, server after server, several times; the median counts, so that a slow minute of the machine hits all.
# Load generator: Tests/load/nbdload.c. Exit status 1 if a bar is missed: 4 KiB random reads at depth 32 at least twice
# nbdkit's memory plugin (requests per second, and server CPU per request), 128 KiB reads and 4 KiB random writes not slower.
# MARGINED names another binary; ALSO="name=URI=PID ..." adds servers.
set -u
ROOT=$(cd "$(dirname "$0")/.." && pwd)
rounds=5 seconds=3 json=
while [ $# -gt 0 ]; do
  case $1 in
    --quick) rounds=3 seconds=1 ;;
    --json) json=${2:?}; shift ;;
    *) echo "usage: $0 [--quick] [--json FILE]" >&2; exit 64 ;;
  esac
  shift
done
missing=()
have() { command -v "$1" >/dev/null || missing+=("$2"); }
have cc gcc; have nbdkit nbdkit; have nbd-server nbd-server; have qemu-nbd qemu-utils; have python3 python3
if [ ${#missing[@]} -gt 0 ]; then
  echo "bench: installing ${missing[*]}"
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1 || echo "bench: could not install ${missing[*]}; going on without"
fi
command -v nbdkit >/dev/null && command -v cc >/dev/null && command -v python3 >/dev/null || { echo "bench: needs gcc, nbdkit and python3" >&2; exit 1; }

# What else this machine does should disturb all of them little (and alike).
renice -n -15 $$ >/dev/null 2>&1

work=$(mktemp -d "${TMPDIR:-/tmp}/margarine-bench.XXXXXX")
shm=$(mktemp -d /dev/shm/margarine-bench.XXXXXX)
pids=()
cleanup() {
  for p in ${pids[@]+"${pids[@]}"}; do kill "$p" 2>/dev/null; done
  for p in ${pids[@]+"${pids[@]}"}; do for _ in $(seq 100); do kill -0 "$p" 2>/dev/null || break; sleep 0.05; done; kill -9 "$p" 2>/dev/null; done
  rm -rf "$work" "$shm"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
die() { echo "bench: $*" >&2; [ -f "$work/margined.log" ] && tail -n 5 "$work/margined.log" >&2; exit 1; }

margined=${MARGINED:-$ROOT/.build/release/margined}
if [ -z "${MARGINED:-}" ]; then
  echo "bench: building (release)"
  (cd "$ROOT" && swift build -c release --product margined >"$work/build" 2>&1) || { tail -n 20 "$work/build"; die "the build failed"; }
fi
cc -O2 -o "$work/nbdload" "$ROOT/Tests/load/nbdload.c" -pthread || die "nbdload does not compile"

port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
answers() { for _ in $(seq 200); do (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null && return 0; sleep 0.05; done; return 1; }
range=256M
: >"$work/servers"

p=$(port)
export MARGARINE_STORE=file://$shm/store
mkdir -p "$shm/store"
"$margined" disk create bench --size 1G --safe-points flush --durability memory --resume-window 60s >/dev/null || die "disk create failed"
printf '[limits]\nmemory-cache = "2G"\ndirty-memory = "1G"\n' >"$work/margined.toml"
"$margined" serve --config "$work/margined.toml" --scratch "$work/scratch" --listen "127.0.0.1:$p" >"$work/ready" 2>"$work/margined.log" &
pids+=($!)
for _ in $(seq 400); do grep -q ^ready "$work/ready" && break; kill -0 $! 2>/dev/null || die "margined did not start"; sleep 0.05; done
echo "margined nbd://127.0.0.1:$p/bench $!" >>"$work/servers"

p=$(port); nbdkit -f -i 127.0.0.1 -p "$p" memory 1G 2>/dev/null & pids+=($!)
answers "$p" || die "nbdkit did not start"
echo "nbdkit-memory nbd://127.0.0.1:$p/ $!" >>"$work/servers"

if command -v qemu-nbd >/dev/null; then
  truncate -s 1G "$shm/qemu.img"
  p=$(port); qemu-nbd -t -e 16 -b 127.0.0.1 -p "$p" -f raw --cache=writeback "$shm/qemu.img" 2>/dev/null & pids+=($!)
  answers "$p" && echo "qemu-nbd nbd://127.0.0.1:$p/ $!" >>"$work/servers"
fi
if command -v nbd-server >/dev/null; then
  truncate -s 1G "$shm/nbd.img"
  p=$(port)
  printf '[generic]\nport = %s\nlistenaddr = 127.0.0.1\n[bench]\nexportname = %s\n' "$p" "$shm/nbd.img" >"$work/nbd-server.conf"
  nbd-server -C "$work/nbd-server.conf" -p "$work/nbd-server.pid" >/dev/null 2>&1
  # It goes into the background, and makes a process for each connection: its CPU is not told.
  answers "$p" && pids+=("$(cat "$work/nbd-server.pid")") && echo "nbd-server nbd://127.0.0.1:$p/bench - forks" >>"$work/servers"
fi
for a in ${ALSO:-}; do IFS='=' read -r n u i <<<"$a"; echo "$n $u $i" >>"$work/servers"; done

echo "bench: filling $range of each, $rounds rounds of $seconds s a case on $(nproc) cores; load generator nbdload"
while read -r name uri _; do "$work/nbdload" --uri "$uri" --fill --range $range || die "filling $name"; done <"$work/servers"
sleep 3   # margined commits what was filled
# Once over everything, so that each server has it in memory.
while read -r name uri _; do "$work/nbdload" --uri "$uri" --mode read --block 1M --depth 8 --range $range --requests 256 >/dev/null || die "reading $name"; done <"$work/servers"

cat >"$work/cases" <<'CASES'
4K-randread-qd32        --mode randread --block 4K --depth 32
4K-randread-qd32-4conn  --mode randread --block 4K --depth 32 --connections 4
4K-randread-qd1         --mode randread --block 4K --depth 1
128K-randread-qd8       --mode randread --block 128K --depth 8
1M-read-qd4             --mode read --block 1M --depth 4
4K-randwrite-qd32       --mode randwrite --block 4K --depth 32
4K-randrw-qd32          --mode randrw --block 4K --depth 32
CASES
for round in $(seq "$rounds"); do
  while read -r case arguments; do
    while read -r name uri pid forks <&3; do
      [ -n "${forks:-}" ] && pid_argument= || pid_argument="--pid $pid"
      # shellcheck disable=SC2086
      line=$("$work/nbdload" --uri "$uri" $arguments --range $range --seconds "$seconds" --warmup 0.3 --seed "$round" $pid_argument) || die "$case on $name: $line"
      echo "$name $case $line" >>"$work/results"
    done 3<"$work/servers"
  done <"$work/cases"
done

python3 - "$work/results" "$work/cases" "$json" <<'PYTHON'
import collections, json, statistics, sys
runs = collections.defaultdict(list)
servers, cases = [], [l.split()[0] for l in open(sys.argv[2])]
for line in open(sys.argv[1]):
    name, case, text = line.split(' ', 2)
    if name not in servers: servers.append(name)
    runs[name, case].append(json.loads(text))
def median(name, case, key): return statistics.median(r[key] for r in runs[name, case])
def p99(name, case): return statistics.median(r['latency_us']['p99'] for r in runs[name, case])
base = 'nbdkit-memory'
print(f'\nRatios to {base} in this run (medians; more is better), and its own figures:\n')
print(f'{"":24}' + ''.join(f'{s:>15}' for s in servers if s != base) + f'{base + ": req/s":>24}{"p99 us":>9}')
for c in cases:
    print(f'{c:24}' + ''.join(f'{median(s, c, "iops") / median(base, c, "iops"):15.2f}' for s in servers if s != base)
          + f'{median(base, c, "iops"):24.0f}{p99(base, c):9.0f}')
print('\nServer CPU for a request: times less than nbdkit memory (more is better), and its own us:\n')
print(f'{"":24}' + ''.join(f'{s:>15}' for s in servers if s != base) + f'{base + ": us":>24}')
for c in cases:
    b, cells = median(base, c, 'server_cpu_us_per_request'), ''
    for s in servers:
        if s == base: continue
        v = median(s, c, 'server_cpu_us_per_request')
        cells += f'{b / v:15.2f}' if v else f'{"-":>15}'
    print(f'{c:24}{cells}{b:24.2f}')
print('\nmargined itself:' + ''.join(f'\n{c:24}{median("margined", c, "iops"):10.0f} req/s {median("margined", c, "mb_per_s"):8.0f} MB/s'
      f'{median("margined", c, "server_cpu_us_per_request"):8.2f} us CPU a request, p99 {p99("margined", c):.0f} us, client {median("margined", c, "client_cpu_us_per_request"):.2f} us' for c in cases))
if sys.argv[3]:
    json.dump({f'{s} {c}': {k: median(s, c, k) for k in ('iops', 'mb_per_s', 'server_cpu_us_per_request')} for s in servers for c in cases}, open(sys.argv[3], 'w'), indent=1)
missed = []
def bar(what, case, key, least):
    m, b = median('margined', case, key), median(base, case, key)
    ratio = m / b if key != 'server_cpu_us_per_request' else b / m
    print(f'{"met   " if ratio >= least else "MISSED"} {what}: {ratio:.2f}, wanted {least:g}')
    if ratio < least: missed.append(what)
print()
for c in ('4K-randread-qd32', '4K-randread-qd32-4conn'):
    bar(f'{c} requests a second', c, 'iops', 2)
    bar(f'{c} server CPU a request', c, 'server_cpu_us_per_request', 2)
bar('128K-randread-qd8 requests a second', '128K-randread-qd8', 'iops', 1)
bar('4K-randwrite-qd32 requests a second', '4K-randwrite-qd32', 'iops', 1)
sys.exit(1 if missed else 0)
PYTHON
