#!/bin/bash
# Many commits: what history keeps, going back to each kept generation, collecting the rest, and streams into another store.
. "$(dirname "$0")/lib.sh"
bed "$@"
[ "$STORE_KIND" = file ] || skip "the ages of objects can be changed in a directory store only"
$PYTHON "$ROOT/Tests/system/history.py"
