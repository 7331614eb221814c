#!/bin/bash
# Runs the tests under a sanitizer: Scripts/sanitize.sh [address|thread]... [--filter FILTER]
#   address   reads and writes outside of memory, use after free
#   thread    data races
# The unit tests (those that FILTER, a regular expression, names), then the suite of the NBD server against nbdbench-server and
# margined, all built with it in .build-address or .build-thread. Both sanitizers where none is named. Logs are in
# var/sanitize. Exit status 1 if anything failed or was found.
set -u
cd "$(dirname "$0")/.." || exit 1
root=$PWD
. Scripts/toolchain.sh

filter=() kinds=()
while [ $# -gt 0 ]; do
  case $1 in
    address | thread) kinds+=("$1") ;;
    --filter) filter=(--filter "${2:?}"); shift ;;
    -*) sed -n '2,7s/^# //p' "$0" >&2; exit 64 ;;
    *) filter=(--filter "$1") ;;
  esac
  shift
done
[ ${#kinds[@]} -gt 0 ] || kinds=(address thread)
find_swift

logs=$root/var/sanitize
mkdir -p "$logs"
# Swift's own report of a crash would come instead of the sanitizer's.
export SWIFT_BACKTRACE=enable=no
failed=0

# step NAME COMMAND...: its output to a log, one line here.
step() {
  local name=$1 began=$SECONDS status=0
  shift
  rm -f "$logs/$name".report.*
  "$@" >"$logs/$name.log" 2>&1 || status=$?
  # What a server under a test found comes in files; so does what was found in the tests.
  local reports
  reports=$(find "$logs" -name "$name.report.*" | wc -l)
  if [ $status = 0 ] && [ "$reports" = 0 ]; then
    printf '%-16s passed  %4d s  %s\n' "$name" $((SECONDS - began)) \
      "$(grep -a -E ' tests? in |[0-9]+ passed' "$logs/$name.log" | tail -n 1 | cut -c 1-100)"
  else
    failed=1
    printf '%-16s FAILED  %4d s  status %d, %d reports, see var/sanitize/%s.*\n' "$name" $((SECONDS - began)) $status "$reports" "$name"
    grep -a -h -E 'SUMMARY:' "$logs/$name".report.* "$logs/$name.log" 2>/dev/null | sort | uniq -c | sort -rn | head -n 12 | cut -c 1-200
    grep -a -E '✘|error:|FAILED' "$logs/$name.log" | head -n 12 | cut -c 1-200 | sed 's/^/    /'
    return 1
  fi
}

for kind in "${kinds[@]}"; do
  path=.build-$kind
  # gold, the linker by default, stumbles over the debug information of a sanitized build. Overlapping accesses are looked for here.
  flags=(-c release -Xswiftc -enable-testing -Xswiftc -enforce-exclusivity=checked -Xswiftc -use-ld=lld --sanitize="$kind" --build-path "$path")
  build() { swift build "${flags[@]}" --build-tests && swift build "${flags[@]}" --product margined && swift build "${flags[@]}" --product nbdbench-server; }
  step "$kind-build" build || continue
  # What Thread Sanitizer cannot see by itself.
  preload=
  if [ "$kind" = thread ]; then
    preload=$logs/thread.so
    "$(dirname "$(readlink -f "$(command -v swift)")")/clang" -Wall -Werror -O1 -fPIC -shared -o "$preload" Tests/sanitizers/thread.c || exit 1
  fi
  for part in unit nbd; do
    name=$kind-$part
    common=log_path=$logs/$name.report:exitcode=66
    # Leaks are not looked for: an object with weak references is found by way of bits in its header that are no pointer to
    # the sanitizer. The fuzzer does look, where all that an input made is gone with it.
    export ASAN_OPTIONS=$common:detect_leaks=0
    export TSAN_OPTIONS=$common:suppressions=$root/Tests/sanitizers/thread.supp:history_size=4
    # What is slow under a sanitizer is not broken: tests that wait for something wait longer, and fewer run at once (all of them
    # together starve each other for half a minute). And its memory is its own.
    export MARGARINE_PATIENCE=6 SANITIZED=$kind
    case $part in
      unit) LD_PRELOAD=$preload step "$name" "$root/$path/release/margarinePackageTests.xctest" --testing-library swift-testing \
        --experimental-maximum-parallelization-width 4 ${filter[@]+"${filter[@]}"} ;;
      nbd) [ ${#filter[@]} != 0 ] || LD_PRELOAD=$preload MARGINED=$root/$path/release/margined NBD_BUILD=$root/$path/release step "$name" /usr/bin/python3 Tests/nbd/run.py ;;
    esac
  done
done
exit $failed
