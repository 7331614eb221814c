#!/bin/bash
# A collection of a store with 1,000,000 block objects (quick: 100,000), most of them named by real manifests: under 5 minutes
# and under 200 MiB, and exactly the garbage is gone. The same for a check.
. "$(dirname "$0")/lib.sh"
bed "$@"
[ "$STORE_KIND" = file ] || skip "the store is filled as a directory"
$PYTHON "$(dirname "$0")/collect.py"
