#!/usr/bin/env bash
# A Ceph cluster for tests, on loopback only: one monitor, one OSD, two S3 gateways on one zone.
#
#   ceph.sh start DIR     everything lies in DIR; leaves DIR/env to be sourced. On a hurt cluster it brings back what died.
#   ceph.sh stop DIR      ends the daemons it started, by their ids; the data stays for the next start
#   ceph.sh kill DIR NAME ends one at once (mon, osd, rgw1, rgw2): the way to hurt it
#   ceph.sh status DIR
#
# OBJECTSTORE=bluestore (default: a sparse file of 20 GiB in DIR) or memstore (in memory, lost at stop).
# What is missing of Ceph it has installed (Scripts/install-deps.sh).
set -euo pipefail

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 64; }
verb=${1:-}; dir=${2:-}
[ -n "$verb" ] && [ -n "$dir" ] || usage
access=margarinetest secret=margarinesecret0123456789 region=us-east-1 bucket=margarine

free_ports() { python3 -c '
import socket
held = [socket.socket() for _ in range(3)]
for s in held: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in held))'; }

# A daemon is ours when its id still has the start time it was noted with.
start_time() { awk '{ sub(/^.*\) /, ""); if ($1 != "Z") print $20 }' "/proc/$1/stat" 2>/dev/null || true; }
running() {
    local pid ticks
    [ -f "$dir/pids/$1" ] && read -r pid ticks <"$dir/pids/$1" && [ -n "$ticks" ] && [ "$(start_time "$pid")" = "$ticks" ]
}
launch() {
    local name=$1; shift
    running "$name" && return
    setsid "$@" </dev/null >>"$dir/log/$name.out" 2>&1 &
    echo "$! $(start_time $!)" >"$dir/pids/$name"
}
end() {  # NAME SIGNAL
    local pid ticks tenth
    running "$1" || { rm -f "$dir/pids/$1"; return 0; }
    read -r pid ticks <"$dir/pids/$1"
    kill "-$2" "$pid"
    for tenth in $(seq 200); do running "$1" || break; sleep 0.1; done
    running "$1" && kill -KILL "$pid"
    rm -f "$dir/pids/$1"
}
await() {  # SECONDS COMMAND...
    local until=$((SECONDS + $1)) name; shift
    until "$@" >/dev/null 2>&1; do
        for name in "$dir"/pids/*; do
            running "${name##*/}" || { echo "ceph.sh: ${name##*/} has ended, see $dir/log/${name##*/}.out" >&2; return 1; }
        done
        [ $SECONDS -lt $until ] || { echo "ceph.sh: in vain: $*" >&2; return 1; }
        sleep 0.1
    done
}

configure() {
    local mon rgw1 rgw2
    read -r mon rgw1 rgw2 < <(free_ports)
    mkdir -p "$dir/mon" "$dir/osd" "$dir/rgw"
    printf '%s\n' "rgw1=$rgw1 rgw2=$rgw2" >"$dir/ports"
    cat >"$dir/ceph.conf" <<CONF
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon host = v2:127.0.0.1:$mon/0
mon initial members = a
public network = 127.0.0.0/8
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
ms mon client mode = crc secure
auth cluster required = none
auth service required = none
auth client required = none
keyring = $dir/keyring
admin socket =
run dir = $dir
crash dir = $dir/log
log file = $dir/log/\$name.log
log to stderr = false
mon cluster log file = $dir/log/cluster.log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
[mon]
mon data = $dir/mon
mon data avail warn = 2
mon data avail crit = 1
paxos propose interval = 0.05
paxos min wait = 0.01
[osd]
osd data = $dir/osd
osd journal =
osd objectstore = ${OBJECTSTORE:-bluestore}
osd memory target = 939524096
osd class update on start = false
bluestore block size = 21474836480
bluestore fsck on mount = false
memstore device bytes = 8589934592
[client]
rgw data = $dir/rgw
rgw dns name = localhost
rgw thread pool size = 64
rgw enable usage log = false
rgw enable ops log = false
rgw gc obj min wait = 60
rgw gc processor period = 60
# Without tcp_nodelay every small answer on a kept connection takes 40 ms.
[client.rgw1]
rgw frontends = beast endpoint=127.0.0.1:$rgw1 tcp_nodelay=1
[client.rgw2]
rgw frontends = beast endpoint=127.0.0.1:$rgw2 tcp_nodelay=1
CONF
    : >"$dir/keyring"
    {
        ceph-authtool --create-keyring "$dir/keyring" --gen-key -n mon. --cap mon 'allow *'
        monmaptool --create --clobber --addv a "[v2:127.0.0.1:$mon]" --fsid "$(awk '/^fsid/ { print $3 }' "$dir/ceph.conf")" "$dir/monmap"
        ceph-mon -c "$dir/ceph.conf" --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring"
    } >>"$dir/log/setup.out" 2>&1
}

ceph_says() { timeout 5 ceph -c "$dir/ceph.conf" --connect-timeout 3 "$@"; }
osd_is_up() { ceph_says osd stat -f json | grep -q '"num_up_osds":1[,}]'; }
answers() { curl -s -o "$dir/log/answer" --noproxy '*' --max-time 5 "http://127.0.0.1:$1/"; }

start() {
    command -v radosgw >/dev/null && command -v ceph-osd >/dev/null && command -v ceph-mon >/dev/null ||
        "$(dirname "$0")/../../Scripts/install-deps.sh" ceph
    mkdir -p "$dir/pids" "$dir/log"
    dir=$(cd "$dir" && pwd)
    local fresh=0 rgw1 rgw2 conf=$dir/ceph.conf
    [ -f "$conf" ] || { fresh=1; configure; }
    . "$dir/ports"
    rm -f "$dir/env"
    launch mon ceph-mon -c "$conf" -i a -f
    await 30 ceph_says mon stat
    if [ ! -s "$dir/osd/whoami" ]; then
        local id; id=$(cat /proc/sys/kernel/random/uuid)
        { ceph_says osd new "$id"; ceph-osd -c "$conf" -i 0 --mkfs --osd-uuid "$id"; } >>"$dir/log/setup.out" 2>&1
    fi
    launch osd ceph-osd -c "$conf" -i 0 -f
    await 30 osd_is_up
    # The first one that starts makes the pools; two at once would both try.
    [ $fresh = 0 ] || radosgw-admin -c "$conf" user create --uid=test --display-name=test --access-key="$access" --secret-key="$secret" >>"$dir/log/setup.out" 2>&1
    launch rgw1 radosgw -c "$conf" -n client.rgw1 -f
    await 60 answers "$rgw1"
    launch rgw2 radosgw -c "$conf" -n client.rgw2 -f
    await 60 answers "$rgw2"
    local code
    code=$(curl -s -o "$dir/log/bucket.out" -w '%{http_code}' --noproxy '*' --max-time 30 -X PUT --user "$access:$secret" --aws-sigv4 "aws:amz:$region:s3" \
        -H 'x-amz-content-sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855' "http://127.0.0.1:$rgw1/$bucket")
    case $code in 200 | 409) ;; *) echo "ceph.sh: the bucket cannot be made: HTTP $code" >&2; return 1 ;; esac
    cat >"$dir/env.new" <<ENV
S3_ENDPOINT=http://127.0.0.1:$rgw1
S3_ENDPOINT2=http://127.0.0.1:$rgw2
S3_BUCKET=$bucket
AWS_ACCESS_KEY_ID=$access
AWS_SECRET_ACCESS_KEY=$secret
AWS_REGION=$region
STORE_URL='s3://$bucket/store?endpoint=http://127.0.0.1:$rgw1&region=$region'
STORE_URL2='s3://$bucket/store?endpoint=http://127.0.0.1:$rgw2&region=$region'
ENV
    mv "$dir/env.new" "$dir/env"
    echo "ready http://127.0.0.1:$rgw1 http://127.0.0.1:$rgw2"
}

stop() {
    local name
    for name in rgw2 rgw1 osd mon; do end $name TERM; done
    # What memstore held is gone; the next start begins anew.
    grep -q 'objectstore = memstore' "$dir/ceph.conf" 2>/dev/null && rm -rf "$dir/ceph.conf" "$dir/mon" "$dir/osd" "$dir/rgw"
    rm -f "$dir/env"
    echo stopped
}

case $verb in
start) start || { stop >&2; exit 1; } ;;
stop) stop ;;
kill) end "${3:?which one}" KILL ;;
status) for name in mon osd rgw1 rgw2; do running $name && echo "$name runs" || echo "$name is down"; done ;;
*) usage ;;
esac
