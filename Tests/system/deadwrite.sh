#!/bin/bash
# A write that was held up on a connection that is dead never lands after the next session's first request was served:
# held up inside the daemon (it waits for a block that the store is slow to give), and held up on the way in a proxy.
# Needs an S3 store, whose answers can be held: STORE_KIND=file is taken as s3check.
[ "${STORE_KIND:-file}" != file ] || export STORE_KIND=s3check
. "$(dirname "$0")/lib.sh"
bed "$@"
$PYTHON "$(dirname "$0")/deadwrite.py"
