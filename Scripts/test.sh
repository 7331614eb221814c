#!/bin/bash
# Everything that CI runs: Scripts/test.sh [STAGE...]     (--list names the stages)
# Needs Debian 12 and a Swift toolchain; installs the rest by apt. Each stage's output goes to var/test/STAGE.log; the end of
# it is shown when the stage fails. Exit status 1 if anything failed. A stage that this machine cannot run is skipped, and
# says why. LONG=1 runs the long forms of the system tests.
set -u
cd "$(dirname "$0")/.." || exit 1
root=$PWD
self=$root/Scripts/test.sh
. Scripts/toolchain.sh

# One configuration for everything, so that unit tests and the daemon share one build.
flags=(-c release -Xswiftc -enable-testing)
export MARGINED=$root/.build/release/margined
form=(--quick)
[ -z "${LONG:-}" ] || form=()

stage_deps() { Scripts/install-deps.sh build test; }
stage_build() { swift build "${flags[@]}" --build-tests 2>&1 && swift build "${flags[@]}" --product margined 2>&1 && swift build "${flags[@]}" --product simulate 2>&1; }
stage_format() { swift format lint --strict --recursive Sources Tests Package.swift; }
# Eight at a time: all together they starve each other, and what waits for something waits too long.
stage_unit() { .build/release/margarinePackageTests.xctest --testing-library swift-testing --experimental-maximum-parallelization-width 8 2>&1; }
stage_fuzz() {
  find "$(dirname "$(readlink -f "$(command -v swiftc)")")/../lib" -name 'libclang_rt.fuzzer-*' | grep -q . || { echo "this toolchain has no libFuzzer"; return 77; }
  Scripts/fuzz.sh --seconds "${FUZZ_SECONDS:-10}"
}
# Some five minutes each with their builds: one of them in CI, the other for those who ask for it.
stage_address() { Scripts/sanitize.sh address; }
stage_thread() { Scripts/sanitize.sh thread; }
# What once failed, some seeds that must go the same way twice, and some worlds of every kind. Fresh seeds are for those who look
# for faults: Scripts/simulate.sh.
stage_simulate() { Scripts/simulate.sh --corpus && Scripts/simulate.sh --seed 7300000 --runs 6 --twice && Scripts/simulate.sh --seed 7300000 --runs 60; }
stage_cli() { Tests/cli/run.sh; }
stage_nbd() { run_if_there Tests/nbd/run.py /usr/bin/python3; }
stage_servers() { run_if_there Tests/servers/run.sh bash; }
stage_clients() { bed clients file; }
stage_deadwrite() { bed deadwrite file; }
stage_ownership() { bed ownership file; }
stage_crash() { bed crash file; }
stage_btrfs() { bed btrfs file; }
stage_outage() { bed outage s3check; }
stage_scale() { bed scale file; }
stage_manifests() { bed manifests file; }
stage_collect() { bed collect file; }
stage_locations() { bed locations s3check; }
stage_forks() { bed forks file; }
stage_members() { bed members file; }
stage_history() { bed history file; }
stage_life() { bed life file; }
stage_chaos() {
  Scripts/chaos-tcpkill.sh --host ${form[@]+"${form[@]}"} || return
  local status=0
  Scripts/chaos-tcpkill.sh --guest ${form[@]+"${form[@]}"} || status=$?
  # The host's half has been tested where no guest can be had.
  [ $status = 77 ] || return $status
}
stage_crash-s3() { bed crash s3check; }
stage_btrfs-s3() { bed btrfs s3check; }
stage_btrfs-ceph() { Scripts/install-deps.sh ceph && bed btrfs ceph; }
stage_crash-ceph() { Scripts/install-deps.sh ceph && bed crash ceph; }
all=(deps build format unit simulate cli nbd servers clients deadwrite ownership crash btrfs outage forks members history life locations scale collect manifests chaos address crash-s3 btrfs-s3 btrfs-ceph crash-ceph)

# 77 is what a test that cannot run here ends with.
run_if_there() { [ -e "$1" ] || { echo "no $1 in this tree"; return 77; }; "$2" "$1"; }
bed() {
  [ -e "Tests/system/$1.sh" ] || { echo "no Tests/system/$1.sh in this tree"; return 77; }
  STORE_KIND=$2 "Tests/system/$1.sh" ${form[@]+"${form[@]}"}
}

# For itself: one stage, with its output as it comes.
if [ "${1:-}" = --in-this-process ]; then
  find_swift
  "stage_$2"
  exit
fi
# These take long: for those who ask for them.
known=("${all[@]}" fuzz thread)
if [ "${1:-}" = --list ]; then printf '%s\n' "${known[@]}"; exit 0; fi
stages=("$@")
if [ $# = 0 ]; then
  for stage in "${all[@]}"; do
    # Ceph takes some hundred megabytes of packages: in CI, and when asked for by name.
    [[ $stage == *-ceph && -z ${CI:-} ]] || stages+=("$stage")
  done
elif [[ " $* " != *" build "* ]] && [ "$*" != deps ] && [ "$*" != format ]; then
  stages=(build "$@")
fi
for stage in "${stages[@]}"; do
  [[ " ${known[*]} " == *" $stage "* ]] || { echo "test.sh: unknown stage '$stage'; known are ${known[*]}" >&2; exit 64; }
done
find_swift

logs=$root/var/test
mkdir -p "$logs"
passed=0 failed=0 skipped=0 failures=()
began=$SECONDS
for stage in "${stages[@]}"; do
  start=$SECONDS
  # A stage that hangs must not take the run with it: `timeout` ends its whole process group.
  status=0
  timeout -k 20 "${STAGE_LIMIT_SECONDS:-1500}" "$self" --in-this-process "$stage" >"$logs/$stage.log" 2>&1 </dev/null || status=$?
  [ "$status" != 124 ] || echo "test.sh: over the limit of a stage, ended" >>"$logs/$stage.log"
  took=$((SECONDS - start))
  case $status in
    0) passed=$((passed + 1)); printf '%-12s passed   %4d s  %s\n' "$stage" "$took" "$(grep -E ' (tests?|checks?|runs?) |passed' "$logs/$stage.log" | tail -n 1 | cut -c 1-120)" ;;
    77) skipped=$((skipped + 1)); printf '%-12s skipped  %4d s  %s\n' "$stage" "$took" "$(tail -n 1 "$logs/$stage.log" | cut -c 1-160)" ;;
    *)
      failed=$((failed + 1)) failures+=("$stage")
      printf '%-12s FAILED   %4d s  status %d, see var/test/%s.log\n' "$stage" "$took" "$status" "$stage"
      # What failed may stand far above the end.
      grep -E '✘|recorded an issue|error:|FAILED' "$logs/$stage.log" | head -n 40 | cut -c 1-300 | sed 's/^/    /'
      echo "    ..."
      tail -n 25 "$logs/$stage.log" | cut -c 1-300 | sed 's/^/    /'
      # Without these, nothing that follows means anything.
      case $stage in deps | build) break ;; esac
      ;;
  esac
done
[ "$failed" = 0 ] || printf 'failed: %s\n' "${failures[*]}"
printf 'took %d s\n' "$((SECONDS - began))"
printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" = 0 ]
