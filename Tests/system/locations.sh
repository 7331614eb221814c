#!/bin/bash
# A store in two regions: two S3 servers, the far one 150 ms away. A disk made far is forked near, at once; read, written and
# brought near under its writer. Then the far region is lost: what was localized goes on (reads, writes, commits, a restart on
# an empty scratch directory), what was not says which location it needs; when the region is back, that is read again.
export STORE_KIND=s3check
. "$(dirname "$0")/lib.sh"
bed "$@"
$PYTHON "$(dirname "$0")/locations.py"
