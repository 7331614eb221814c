#!/usr/bin/env bash
# The test servers themselves, and the S3 suite against a real store.
#   1. s3check.py, asked by another client (curl, with its own signatures): what it must take and what it must refuse.
#   2. Ceph, where its programs are installed or in CI (which installs them).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d "${TMPDIR:-/tmp}/margarine-servers-XXXXXX")
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$dir"' EXIT

python3 "$here/s3check.py" --state "$dir" >"$dir/out" &
server=$!
for _ in $(seq 100); do [ -f "$dir/env" ] && break; sleep 0.1; done
. "$dir/env"
failed=0
# expect STATUS WHAT curl-arguments...
expect() {
    local want=$1 what=$2 got; shift 2
    got=$(curl -s -o "$dir/answer" -w '%{http_code}' --noproxy '*' --max-time 10 --aws-sigv4 "aws:amz:$AWS_REGION:s3" "$@" || true)
    if [ "$got" = "$want" ]; then echo "ok    $what"; else echo "FAIL  $what: HTTP $got, not $want: $(head -c 300 "$dir/answer")"; failed=1; fi
}
sha() { printf %s "$1" | sha256sum | cut -d' ' -f1; }
md5() { printf %s "$1" | openssl md5 -binary | base64; }
user="$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY" object=$S3_ENDPOINT/$S3_BUCKET/a/key
put=(-X PUT --data-binary hello -H "content-type: text/plain" -H "x-amz-content-sha256: $(sha hello)")
get=(-H "x-amz-content-sha256: $(sha '')")
expect 200 "put" --user "$user" "${put[@]}" -H "content-md5: $(md5 hello)" "$object"
expect 200 "get" --user "$user" "${get[@]}" "$object"
[ "$(cat "$dir/answer")" = hello ] || { echo "FAIL  other bytes came back"; failed=1; }
expect 206 "ranged get" --user "$user" "${get[@]}" -H "range: bytes=1-3" "$object"
[ "$(cat "$dir/answer")" = ell ] || { echo "FAIL  another range came back"; failed=1; }
expect 416 "get behind the end" --user "$user" "${get[@]}" -H "range: bytes=5-9" "$object"
expect 404 "get of nothing" --user "$user" "${get[@]}" "$object-none"
expect 412 "put that must not replace" --user "$user" "${put[@]}" -H "if-none-match: *" "$object"
expect 412 "put onto another tag" --user "$user" "${put[@]}" -H 'if-match: "0"' "$object"
expect 404 "put onto nothing" --user "$user" "${put[@]}" -H 'if-match: "0"' "$object-none"
expect 200 "put onto the tag" --user "$user" "${put[@]}" -H "if-match: \"$(printf hello | md5sum | cut -d' ' -f1)\"" "$object"
expect 200 "list" --user "$user" "${get[@]}" "$S3_ENDPOINT/$S3_BUCKET?delimiter=%2F&list-type=2&prefix="
grep -q '<CommonPrefixes><Prefix>a/</Prefix>' "$dir/answer" || { echo "FAIL  no folder in $(cat "$dir/answer")"; failed=1; }
expect 403 "a wrong secret" --user "$AWS_ACCESS_KEY_ID:wrong" "${get[@]}" "$object"
expect 403 "an unknown key" --user "x:$AWS_SECRET_ACCESS_KEY" "${get[@]}" "$object"
expect 400 "a wrong hash" --user "$user" -X PUT --data-binary other -H "content-type: text/plain" -H "x-amz-content-sha256: $(sha hello)" "$object"
expect 400 "a wrong MD5" --user "$user" "${put[@]}" -H "content-md5: $(md5 other)" "$object"
expect 404 "another bucket" --user "$user" "${get[@]}" "$S3_ENDPOINT/other/key"
expect 400 "a loosely encoded query" --user "$user" "${get[@]}" "$S3_ENDPOINT/$S3_BUCKET?list-type=2&prefix=a/"
got=$(curl -s -o "$dir/answer" -w '%{http_code}' --noproxy '*' "$object")
[ "$got" = 403 ] && echo "ok    unsigned" || { echo "FAIL  unsigned: HTTP $got"; failed=1; }
expect 204 "delete" --user "$user" "${get[@]}" -X DELETE "$object"
[ $failed = 0 ] || exit 1

if command -v radosgw >/dev/null && command -v ceph-osd >/dev/null || [ -n "${CI:-}" ]; then
    "$here/ceph-test.sh" "$@"
else
    echo "no Ceph here: the S3 suite ran against s3check.py only (Tests/servers/ceph-test.sh installs and uses it)"
fi
