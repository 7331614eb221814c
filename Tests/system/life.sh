#!/bin/bash
# Collections, two at a time, beside disks that are written, forked, rolled back, pinned and deleted: nothing that is named goes,
# and in the end exactly the garbage has gone. The long form takes an hour (or LIFE_SECONDS).
. "$(dirname "$0")/lib.sh"
bed "$@"
$PYTHON "$ROOT/Tests/system/life.py"
