#!/bin/bash
# Simulated worlds, as many at once as there are cores: Scripts/simulate.sh [--seed N] [--seconds S | --runs R] [option...]
#
#   --seed N      the first seed (default: the time); run i takes seed N + i
#   --seconds S   for so long (default 60); --runs R: so many runs
#   --corpus      the seeds of Tests/Simulation/corpus.txt, which once failed, and nothing else
#   --faults      breaks one rule after the other and sees that each is found: within 600 s, from SAMPLES=3 first seeds
#   --elsewhere   some seeds (--runs, default 6) here and in a virtual machine with another processor: the hashes must be the same
#   --trace --verbose --twice --go-on --without KINDS --operations N --fault RULE   as `simulate --help` says; one process then
#
# Exit status 1 at the first violation (or a rule whose breaking goes unseen); the command that repeats it is printed.
set -u
cd "$(dirname "$0")/.." || exit 1
. Scripts/toolchain.sh
find_swift
simulate=${SIMULATE:-$PWD/.build/release/simulate}
if [ -z "${SIMULATE:-}" ]; then
  out=$(swift build -c release -Xswiftc -enable-testing --product simulate 2>&1) || { echo "$out" | tail -n 20; exit 1; }
fi
seed=$(date +%s) seconds=60 runs= mode=many rest=()
while [ $# -gt 0 ]; do
  case $1 in
    --seed) seed=${2:?}; shift ;;
    --seconds) seconds=${2:?}; shift ;;
    --runs) runs=${2:?}; shift ;;
    --corpus) mode=corpus ;;
    --faults) mode=faults ;;
    --elsewhere) mode=elsewhere ;;
    -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exec "$simulate" --help ;;
    *) rest+=("$1") ;;
  esac
  shift
done
cores=$(nproc)
work=$(mktemp -d "${TMPDIR:-/tmp}/margarine-simulate.XXXXXX")
trap 'rm -rf "$work"' EXIT

case $mode in
  elsewhere) SIMULATE=$simulate Tests/Simulation/elsewhere.sh --seed "$seed" --runs "${runs:-6}"; exit ;;
  corpus)
    # SEED OPERATIONS [what it found]
    while read -r seed operations what; do
      case $seed in '' | '#'*) continue ;; esac
      "$simulate" --runs 1 --seed "$seed" --operations "$operations" >"$work/out" 2>&1 || { cat "$work/out"; echo "corpus: seed $seed fails again ($what)"; exit 1; }
      count=$((${count:-0} + 1))
    done <Tests/Simulation/corpus.txt
    echo "corpus: ${count:-0} seeds passed"
    exit
    ;;
  faults)
    samples=${SAMPLES:-3} missed=0
    printf '%-28s %6s %14s %12s  %s\n' "broken rule" found "median steps" "median runs" "first seen as"
    for fault in $("$simulate" --list-faults); do
      for i in $(seq "$samples"); do
        while [ "$(jobs -rp | wc -l)" -ge "$cores" ]; do wait -n; done
        timeout 660 "$simulate" --seed $((seed + i * 100000)) --seconds 600 --fault "$fault" >"$work/$fault.$i" 2>&1 &
      done
      wait
      # What crashes the engine's own checks is found too.
      steps=$(for i in $(seq "$samples"); do sed -n 's/^FOUND: steps \([0-9]*\) runs \([0-9]*\)$/\1 \2/p' "$work/$fault.$i"; done | sort -n)
      found=$(printf '%s' "$steps" | grep -c .)
      median=$(printf '%s\n' "$steps" | sed -n "$(((found + 1) / 2))p")
      how=$(sed -n 's/^VIOLATION: seed [0-9]*, step [0-9]*, run [0-9]*: //p' "$work/$fault.1" | head -n 1 | cut -c 1-70)
      printf '%-28s %3d/%-3d %13s %12s  %s\n' "$fault" "$found" "$samples" "${median% *}" "${median#* }" "${how:-a check of the engine itself ends it}"
      [ "$found" = "$samples" ] || missed=$((missed + 1))
    done
    [ "$missed" = 0 ] || { echo "$missed broken rules were not always found"; exit 1; }
    exit
    ;;
esac

if [ ${#rest[@]} -gt 0 ] || [ "$runs" = 1 ]; then
  exec "$simulate" --seed "$seed" ${runs:+--runs "$runs"} --seconds "$seconds" ${rest[@]+"${rest[@]}"}
fi
pids=()
for i in $(seq 0 $((cores - 1))); do
  # Each process has seeds of its own.
  "$simulate" --seed $((seed + i * 1000000)) ${runs:+--runs $(((runs + cores - 1 - i) / cores))} --seconds "$seconds" >"$work/$i" 2>&1 &
  pids+=($!)
done
status=0
for i in "${!pids[@]}"; do
  wait "${pids[$i]}" || status=1
  cat "$work/$i"
done
[ $status = 0 ] && cat "$work"/[0-9]* | awk '/ operations in / { for (i = 1; i <= NF; i++) { if ($i == "operations") o += $(i - 1); if ($i ~ /^runs/) r += $(i - 1) } } END { printf "%d operations in %d runs with seeds from %s on, no violation\n", o, r, from }' from="$(for i in $(seq 0 $((cores - 1))); do printf '%s%d' "${and:-}" $((seed + i * 1000000)); and=" and "; done)"
exit $status
