#!/bin/bash
# Two daemons, one disk: refused while the owner lives; taken by force the first loses it at once; taken over when the owner
# is dead. Under write load on both sides no generation has two writers, and every one is a whole safe point of one of them.
. "$(dirname "$0")/lib.sh"
bed "$@"
$PYTHON "$(dirname "$0")/ownership.py"
