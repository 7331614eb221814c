#!/bin/bash
# What the size of a disk does not cost: attaching, committing, forking, comparing and sending a change of a disk of 16 TiB with
# a million used blocks takes no more requests (but for the depth of its manifest), time or memory than with ten of 1 GiB.
. "$(dirname "$0")/lib.sh"
[ "$STORE_KIND" = file ] || skip "makes its store as files"
bed "$@"
$PYTHON "$(dirname "$0")/manifests.py"
