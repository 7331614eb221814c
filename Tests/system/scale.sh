#!/bin/bash
# What idle things cost, and what size does not cost: 500 idle connections and 500 idle disks under 64 KiB each; a disk of
# 8 EiB attaches as fast as one of 1 GiB; trimming and zeroing a terabyte is a matter of moments.
. "$(dirname "$0")/lib.sh"
bed "$@"
needs cc
cc -O2 -o "$WORK/nbdload" "$ROOT/Tests/load/nbdload.c" -pthread || fail "nbdload does not compile"
ulimit -n 4096
$PYTHON "$(dirname "$0")/scale.py"
