#!/bin/bash
# Kills the daemon (kill -9) at random instants under load, and holds the disk against a model.
#
# 1. durability memory and scratch, resume window open: every acknowledged write is there after the restart, and the client
#    goes on where it was; in between the connections alone are cut.
# 2. resume window 0: after a kill, a cut or a clean end the disk is its last safe point, to the byte.
# 3. scratch lost as well: the disk is one of its safe points, with durability store the last one that was acknowledged;
#    a named session is refused after it.
# The load: writes of any offset and length, trims, zeroes, flushes, on several connections, across block borders.
. "$(dirname "$0")/lib.sh"
bed "$@"
$PYTHON "$(dirname "$0")/crash.py"
