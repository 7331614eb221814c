#!/bin/bash
# The store goes away under write load (connections refused, or silence) and comes back: nothing is lost, no request fails
# while the outage is shorter than the limits, writers wait once the journal is full, cached data is read as ever, a cold read
# gives an error in time and never zeroes, commits resume by themselves. A kill in mid-outage loses nothing either.
# With STORE_KIND=ceph one of two gateways is ended as well. A store that ignores conditions is refused at open.
[ "${STORE_KIND:-file}" != file ] || export STORE_KIND=s3check
. "$(dirname "$0")/lib.sh"
bed "$@"
$PYTHON "$(dirname "$0")/outage.py"
