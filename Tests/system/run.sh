#!/bin/bash
# Runs all test beds, or those named: Tests/system/run.sh [--quick] [NAME...]. STORE_KIND as in lib.sh.
# Exit status 1 if one failed; those that this machine cannot run are named at the end.
cd "$(dirname "$0")" || exit 1
form=() names=() skipped=() failed=()
for a in "$@"; do case $a in --quick) form=(--quick) ;; -*) echo "usage: $0 [--quick] [NAME...]" >&2; exit 64 ;; *) names+=("$a") ;; esac; done
[ ${#names[@]} -gt 0 ] || names=(clients deadwrite ownership crash btrfs outage scale locations)
for n in "${names[@]}"; do
  "./$n.sh" ${form[@]+"${form[@]}"}
  case $? in 0) ;; 77) skipped+=("$n") ;; *) failed+=("$n") ;; esac
done
echo "system tests: $((${#names[@]} - ${#skipped[@]} - ${#failed[@]})) passed; skipped: ${skipped[*]:-none}; failed: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]
