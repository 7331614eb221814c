#!/usr/bin/env bash
# Runs the tests of S3 stores against a Ceph cluster of its own, in the configuration that Scripts/test.sh builds.
#   ceph-test.sh [arguments of swift test]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d "${TMPDIR:-/tmp}/margarine-ceph-XXXXXX")
trap '"$here/ceph.sh" stop "$dir" >/dev/null; rm -rf "$dir"' EXIT
"$here/ceph.sh" start "$dir"
cd "$here/../.."
MARGARINE_TEST_S3=$dir/env swift test -c release -Xswiftc -enable-testing --filter GivenStoreTests "$@"
