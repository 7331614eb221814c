#!/bin/bash
# Fuzzes the decoders of foreign bytes: Scripts/fuzz.sh [--seconds N] [--runs N] [TARGET...]
#   --seconds N   time for each target (60)
#   --runs N      instead, so many executions of each
#   --list        names the targets
#   --replay TARGET FILE   runs one input
#   --keep TARGET FILE     puts an input, made as small as may be, into the corpus of the tree
# Builds with libFuzzer and Address Sanitizer in .build-fuzz. What was found, the log and the grown corpus of each target are
# in var/fuzz/TARGET. Exit status 1 if anything was found. Docs/Testing.md tells what the targets hold on to.
set -u
cd "$(dirname "$0")/.." || exit 1
root=$PWD
. Scripts/toolchain.sh

usage() { sed -n '2,9s/^# //p' "$0" >&2; exit 64; }
seconds=60 runs=-1 verb=run targets=()
while [ $# -gt 0 ]; do
  case $1 in
    --seconds) seconds=${2:?}; shift ;;
    --runs) runs=${2:?} seconds=0; shift ;;
    --list | --replay | --keep) verb=${1#--} ;;
    -*) usage ;;
    *) targets+=("$1") ;;
  esac
  shift
done

find_swift
fuzzer=$root/.build-fuzz/release/margarine-fuzz
mkdir -p var/fuzz
if ! MARGARINE_FUZZ=1 swift build -c release -Xswiftc -enable-testing -Xswiftc -enforce-exclusivity=checked --sanitize=address --build-path .build-fuzz \
  --product margarine-fuzz >var/fuzz/build.log 2>&1; then
  grep -E 'error:' var/fuzz/build.log | head -n 20 >&2
  echo "fuzz.sh: the build failed, see var/fuzz/build.log" >&2
  exit 1
fi
# Swift's own report of a crash takes seconds, and hides that of the sanitizer.
export SWIFT_BACKTRACE=enable=no
# Most of the time would go into who allocated what; a replay tells.
[ $verb != run ] || export ASAN_OPTIONS=malloc_context_size=1:quarantine_size_mb=32
fuzz() { MARGARINE_FUZZ_TARGET=$1 "$fuzzer" "${@:2}"; }
known=$(fuzz list | cut -d ' ' -f 1)

for target in ${targets[0]+"${targets[0]}"}; do
  grep -qx -- "$target" <<<"$known" || { echo "fuzz.sh: no target '$target'; known are" $known >&2; exit 64; }
done
case $verb in
  list) echo "$known"; exit 0 ;;
  replay)
    [ ${#targets[@]} = 2 ] || usage
    fuzz "${targets[@]}"
    exit
    ;;
  keep)
    [ ${#targets[@]} = 2 ] || usage
    to=Tests/fuzz/corpus/${targets[0]}/found-$(sha256sum "${targets[1]}" | cut -c 1-12)
    # A finding is made smaller as long as it is one; an input that passes stays as it is.
    if fuzz "${targets[@]}" >/dev/null 2>&1; then
      cp "${targets[1]}" "$to"
    else
      fuzz "${targets[0]}" -minimize_crash=1 -max_total_time=20 -exact_artifact_path="$to" "${targets[1]}" >/dev/null 2>&1
      [ -e "$to" ] || cp "${targets[1]}" "$to"
    fi
    echo "$to, $(stat -c %s "$to") bytes"
    exit
    ;;
esac

[ ${#targets[@]} -gt 0 ] || mapfile -t targets <<<"$known"
found=0
printf '%-10s %12s %9s %7s %7s  %s\n' target executions exec/s edges corpus findings
for target in "${targets[@]}"; do
  grep -qx -- "$target" <<<"$known" || { echo "fuzz.sh: no target '$target'; known are" $known >&2; exit 64; }
  dir=var/fuzz/$target
  mkdir -p "$dir/corpus"
  before=$(find "$dir" -maxdepth 1 -type f ! -name log | sort)
  read -r _ longest finds_leaks < <(fuzz list | grep "^$target ")
  options=(-max_len="$longest" -detect_leaks="$finds_leaks" -artifact_prefix="$dir/" -print_final_stats=1 -timeout=10)
  [ ! -e "Tests/fuzz/dictionaries/$target.dict" ] || options+=(-dict="Tests/fuzz/dictionaries/$target.dict")
  began=$(date +%s%N) left=$runs executions=0 status=0
  # One that leaks is begun anew before memory runs out.
  most=-1
  [ "$finds_leaks" = 1 ] || most=150000
  while [ $status = 0 ]; do
    ms=$((($(date +%s%N) - began) / 1000000 + 1))
    [ "$seconds" = 0 ] || [ "$ms" -lt $((seconds * 1000)) ] || break
    [ "$left" != 0 ] || break
    now=$most
    [ "$left" = -1 ] || { [ "$most" != -1 ] && [ "$most" -lt "$left" ]; } || now=$left
    fuzz "$target" "${options[@]}" -runs="$now" -max_total_time="$((seconds == 0 ? 0 : seconds - ms / 1000))" \
      "$dir/corpus" "Tests/fuzz/corpus/$target" >"$dir/log" 2>&1
    status=$?
    done=$(sed -n 's/^stat::number_of_executed_units: *//p' "$dir/log" | tail -n 1)
    executions=$((executions + ${done:-0}))
    [ "$left" = -1 ] || left=$((left > ${done:-0} ? left - ${done:-0} : 0))
    [ "${done:-0}" -gt 0 ] || break
  done
  ms=$((($(date +%s%N) - began) / 1000000 + 1))
  edges=$(grep -a -o 'cov: [0-9]*' "$dir/log" | tail -n 1 | cut -d ' ' -f 2)
  new=$(comm -13 <(echo "$before") <(find "$dir" -maxdepth 1 -type f ! -name log | sort))
  printf '%-10s %12s %9s %7s %7s  %s\n' "$target" "$executions" "$((executions * 1000 / ms))" "${edges:-?}" \
    "$(find "$dir/corpus" -type f | wc -l)" "$([ $status = 0 ] && echo none || echo "status $status")"
  if [ $status != 0 ]; then
    found=1
    grep -a -m 1 -E 'Fatal error|ERROR: |precondition' "$dir/log" | cut -c 1-300 | sed 's/^/    /'
    if [ -n "$new" ]; then
      for input in $new; do echo "    Scripts/fuzz.sh --replay $target $input"; done
    else
      echo "    no input was kept, see $dir/log"
    fi
  fi
done
exit $found
