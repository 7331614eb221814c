#!/bin/bash
# Tests of the command line itself: Tests/cli/run.sh [NAME...]
# Each test is a function `t_NAME` that names one behaviour; it fails with a line that says what was seen. MARGINED is the
# binary (default: the release build). Needs bash, python3, and nothing of the network but loopback.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
margined=${MARGINED:-$root/.build/release/margined}
[ -x "$margined" ] || { echo "cli: no margined at $margined: build it first" >&2; exit 1; }
python=/usr/bin/python3
work=$(mktemp -d "${TMPDIR:-/tmp}/margarine-cli.XXXXXX")
unset MARGARINE_STORE STATE_DIRECTORY NOTIFY_SOCKET JOURNAL_STREAM
daemons=()
cleanup() {
  for pid in ${daemons[@]+"${daemons[@]}"}; do kill -9 "$pid" 2>/dev/null; done
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# ---- what tests are made of

die() { echo "    $*" >&2; exit 1; }
# run STATUS COMMAND...: out and err get what it printed.
run() {
  local want=$1 got=0
  shift
  "$@" >"$dir/out" 2>"$dir/err" </dev/null || got=$?
  out=$(cat "$dir/out") err=$(cat "$dir/err")
  [ "$got" = "$want" ] || die "'${*##*/}' ended with $got instead of $want; it said: $out $err"
}
m() { local want=$1; shift; run "$want" "$margined" "$@"; }
has() { [[ $1 == *"$2"* ]] || die "'$2' is not in: $1"; }
lacks() { [[ $1 != *"$2"* ]] || die "'$2' is in: $1"; }
same() { [ "$1" = "$2" ] || die "'$1' is not '$2'"; }
one_line() { [ "$(printf '%s\n' "$err" | wc -l)" = 1 ] && [[ $err == "margined: "* ]] || die "not one line of error: $err"; }
json() { printf '%s' "$out" | $python -c "import json, sys; d = json.load(sys.stdin); print(($1))" || die "not such JSON: $out"; }
# serve ARGS...: starts a daemon on its own scratch, waits until it is ready; sets pid and ready.
serve() {
  "$margined" serve --scratch "$dir/scratch" "$@" >"$dir/ready" 2>"$dir/log" &
  pid=$!
  local n
  for n in $(seq 400); do
    ready=$(head -n 1 "$dir/ready")
    [[ $ready == ready* ]] && return 0
    kill -0 "$pid" 2>/dev/null || die "the daemon ended before it was ready: $(cat "$dir/log")"
    sleep 0.05
  done
  die "the daemon was not ready in 20 s: $(cat "$dir/log")"
}
# stop SIGNAL STATUS
stop() {
  local n got=0
  kill "-$1" "$pid"
  for n in $(seq 400); do kill -0 "$pid" 2>/dev/null || break; sleep 0.05; done
  kill -0 "$pid" 2>/dev/null && { kill -9 "$pid"; die "the daemon did not end in 20 s of SIG$1: $(cat "$dir/log")"; }
  wait "$pid" || got=$?
  [ "$got" = "$2" ] || die "the daemon ended with $got instead of $2: $(cat "$dir/log")"
}
until_logged() {
  local n
  for n in $(seq 100); do grep -q -- "$1" "$dir/log" && return 0; sleep 0.05; done
  die "'$1' was not logged: $(cat "$dir/log")"
}

# ---- help and usage

commands=("" serve disk gc check status "disk create" "disk set" "disk list" "disk show" "disk resize" "disk delete" "disk export" "disk import" "disk release" "disk localize" location "location add" "location list")

t_help_explains_every_command() {
  local command
  for command in "${commands[@]}"; do
    m 0 $command --help
    has "$out" OVERVIEW:
    has "$out" USAGE:
    [[ $command == disk || $out == *xample* ]] || die "no example in the help of '$command'"
    same "$err" ""
  done
  m 0 --version
  [[ $out =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || die "a strange version: $out"
}

t_bad_usage_exits_64_in_one_line() {
  local -a bad=(
    "--bogus" "bogus" "serve --bogus" "serve --listen" "serve stray" "disk bogus" "disk create" "disk create a"
    "disk create a --size" "disk create a --size 10X" "disk create a --size 0" "disk create a --size 100" "disk create a --size 8E" "disk create a --size 16E" "disk create a --size 9223372036837999104"
    "disk create a --size -1" "disk create -a --size 1G" "disk create a/b --size 1G" "disk create .a --size 1G"
    "disk create a --size 1G --durability none" "disk create a --size 1G --safe-points ext4" "disk create a --size 1G --resume-window 5"
    "disk create a --size 1G --resume-window 8d" "disk set a" "disk show" "disk resize a" "disk export a" "disk import x"
    "disk import /nonexistent a/b" "disk export a@x /tmp/x" "disk export a@0 /tmp/x" "status stray"
    "location add us" "location add a/b file:///x" "location add us nowhere" "disk localize" "disk list --near us"
    "serve --takeover never" "serve --log-level loud" "serve --set x" "serve --set comit-interval=1s" "serve --set uploads=0"
    "serve --listen nowhere" "serve --listen :1" "serve --listen 127.0.0.1:65536"
  )
  local arguments
  for arguments in "${bad[@]}"; do
    m 64 $arguments ${arguments:+}
    one_line
    has "$err" "--help'"
    same "$out" ""
  done
  m 64 disk create a --size 10X --store "file://$dir/s"
  has "$err" "'10X' is no size"
  m 64 serve --set comit-interval=1s
  has "$err" "did you mean 'commit-interval'?"
}

t_a_command_without_a_store_says_how_to_give_one() {
  local command
  for command in serve "disk list" "disk show a" "disk create a --size 1G" "disk delete a"; do
    m 64 $command
    one_line
    has "$err" "--store URL"
    has "$err" MARGARINE_STORE
  done
}

t_bad_store_urls_are_told() {
  local url
  for url in nowhere http://x file://relative s3:// "s3://b/p?endpoint=ftp://x" "s3://bucket/p?what=1"; do
    m 1 disk list --store "$url"
    one_line
    has "$err" "$url"
  done
  m 1 disk list --store "file://$dir/missing"
  one_line
  has "$err" "$dir/missing"
}

# ---- configuration

t_configuration_errors_name_file_and_line() {
  local file=$dir/m.toml
  check() { printf '%b' "$2" >"$file"; m 1 disk list --config "$file"; one_line; has "$err" "$file:$1: "; has "$err" "$3"; }
  check 3 '# comment\n[serve]\nlisten-on = []\n' "unknown key 'listen-on' in [serve]"
  check 4 '[commit]\nuploads = 4\n\ncommit-intervall = "5s"\n' "did you mean 'commit-interval'?"
  check 2 '[serve]\nmemory-cache = "1G"\n' "it belongs in [limits]"
  check 1 'scratch = "/x"\n' "it belongs in [serve]"
  check 1 '[srve]\nx = 1\n' "did you mean [serve]?"
  check 2 '\n"what ever" = 1\n' "unknown key 'what ever' at the top"
  check 6 '[serve]\nlisten = [\n "127.0.0.1:1", # [a]\n "[::1]:2",\n]\nscratch = 5\n' "'scratch' in [serve] needs a string"
  check 2 '[commit]\nuploads = 1000\n' "'uploads' in [commit] is out of bounds: it is a number, 0 to 256"
  check 2 '[commit]\ncommit-interval = 5\n' 'with its unit, as in "5s"'
  check 2 '[limits]\njournal = true\n' "'journal' in [limits] takes a size"
  check 4 'store = """\\\n   file:///a"""\n[serve]\nbogus = 1\n' "unknown key 'bogus' in [serve]"
  check 1 'store = """\na\nb"""\n' "'store' at the top needs a value"
  check 2 '[serve]\nscratch = \n' ""
  check 2 'store = "file:///a"\nstore = "file:///b"\n' ""
  check 1 'serve = 1\n' "'serve' is a table, [serve]; this is of type integer"
  check 2 '[serve]\ntakeover = "never"\n' 'one of "dead", "force"'
  check 1 'serve = { bogus = 1 }\n' "unknown key 'bogus' in [serve]"
  check 1 'serve.bogus = 1\n' "unknown key 'bogus' in [serve]"
} 2>&1

t_a_configuration_that_cannot_be_read_is_told() {
  m 1 disk list --config "$dir/none.toml"
  one_line
  has "$err" "none.toml"
  has "$err" "No such file"
  m 1 disk list --config "$dir"
  one_line
  head -c 100 /dev/urandom | tr '\0-\177' '\200-\377' >"$dir/binary.toml"
  m 1 disk list --config "$dir/binary.toml"
  one_line
  has "$err" "not UTF-8"
}

t_limits_must_fit_each_other() {
  printf '[limits]\njournal = "1G"\njournal-per-disk = "2G"\n' >"$dir/m.toml"
  m 1 disk list --config "$dir/m.toml"
  one_line
  has "$err" "journal-per-disk (2G) must not exceed journal (1G)"
}

t_flags_come_before_the_file_and_the_file_before_the_environment() {
  printf 'store = "file://%s/from-file"\n' "$dir" >"$dir/m.toml"
  export MARGARINE_STORE=file://$dir/from-environment
  mkdir "$dir/from-environment" "$dir/from-file" "$dir/from-flag"
  m 0 disk create e --size 1G
  m 0 disk create f --size 1G --config "$dir/m.toml"
  m 0 disk create g --size 1G --config "$dir/m.toml" --store "file://$dir/from-flag"
  local pair
  for pair in environment:e file:f flag:g; do
    m 0 disk list --json --store "file://$dir/from-${pair%:*}"
    same "$(json '[x["name"] for x in d]')" "['${pair#*:}']"
  done
}

t_every_key_has_its_place_in_the_manual_page() {
  # The program names all known keys of a table when it meets one that is like none of them.
  local table keys= page
  for table in "" serve limits commit collection new-disk; do
    { [ -z "$table" ] || echo "[$table]"; echo 'xyzzyxyzzyxyzzyxyzzy = 1'; } >"$dir/m.toml"
    m 1 disk list --config "$dir/m.toml"
    keys="$keys $(printf '%s' "${err##*known are }" | tr -d ,)"
  done
  page=$(sed -n '/^\.SS At the top/,/^\.SH EXAMPLES/p' "$root/Docs/man/margined.toml.5" | grep -A1 '^\.TP' | sed -n 's/^\.B //p' | sed 's/\\-/-/g' | sort)
  same "$(printf '%s\n' $keys | sort)" "$page"
}

t_gc_deletes_what_nothing_needs() {
  local store=file://$dir/s before
  m 0 disk create d --size 1G --store "$store"
  head -c 3000000 /dev/urandom >"$dir/image"
  m 0 disk import "$dir/image" i --store "$store"
  mkdir -p "$dir/s/blocks"
  printf x >"$dir/s/blocks/00000000000000000000000000000001"
  printf x >"$dir/s/blocks/00000000000000000000000000000002"
  touch -d '3 days ago' "$dir/s/blocks/00000000000000000000000000000001" "$dir"/s/manifests/*
  before=$(ls -laR --time-style=full-iso "$dir/s")
  m 0 gc --dry-run --json --store "$store"
  same "$(json 'd["isDryRun"], d["disks"], d["blocks"]["scanned"], d["blocks"]["deleted"], d["blocks"]["young"]')" "(True, 2, 3, 1, 2)"
  same "$(ls -laR --time-style=full-iso "$dir/s")" "$before"
  m 0 gc --store "$store"
  has "$out" "1 deleted (1 B)"
  [ ! -e "$dir/s/blocks/00000000000000000000000000000001" ] || die "the garbage is there"
  [ -e "$dir/s/blocks/00000000000000000000000000000002" ] || die "what is young is gone"
  m 0 disk export i "$dir/back" --store "$store"
  cmp -n 3000000 "$dir/image" "$dir/back" || die "the disk is another one"
  # A grace period is the store's, and a shorter one takes its time.
  m 0 gc --grace 15m --json --store "$store"
  same "$(json 'd["graceMs"]')" 86400000
  m 0 gc --grace 3d --json --store "$store"
  same "$(json 'd["graceMs"]')" 259200000
  for bad in "--grace 899s" "--grace 10s" "--grace 0 --allow-short-grace" "--grace 367d" "--grace soon" "--rate -1" "--rate x" "--dry-run --scratch $dir/gc"; do
    m 64 gc $bad --store "$store"
    one_line
  done
  m 1 gc --dry-run --store "file://$dir/none"
  one_line
  # What it finds in a directory of the user's choice, which is nobody else's meanwhile.
  m 0 gc --scratch "$dir/gc" --json --store "$store"
  same "$(ls "$dir/gc/gc")" ""
  (flock 9; run 1 "$margined" gc --scratch "$dir/gc" --store "$store"; one_line; has "$err" "'$dir/gc' is in use") 9>"$dir/gc/lock" || exit 1
  same "$(find "${TMPDIR:-/tmp}" -maxdepth 1 -name 'margined-gc.*' -newer "$dir/image" 2>/dev/null)" ""
}

t_check_lists_what_is_wrong() {
  local store=file://$dir/s block
  head -c 3000000 /dev/urandom >"$dir/image"
  m 0 disk import "$dir/image" i --store "$store"
  m 0 check --data --store "$store"
  has "$out" "nothing is wrong"
  block=$(ls "$dir/s/blocks")
  mkdir -p "$dir/scratch/blocks"
  cp "$dir/s/blocks/$block" "$dir/scratch/blocks/$block"
  printf '\0' | dd of="$dir/s/blocks/$block" bs=1 seek=100000 conv=notrunc status=none
  printf '\1' | dd of="$dir/s/blocks/$block" bs=1 seek=100001 conv=notrunc status=none
  m 0 check --store "$store"
  m 1 check i --data --store "$store"
  one_line
  has "$out" "corrupt     blocks/$block at location 0"
  has "$out" "needed by i@1 (head)"
  rm "$dir/s/blocks/$block"
  m 1 check --json --store "$store"
  same "$(json 'd["counts"], d["problems"][0]["kind"], d["problems"][0]["generations"]')" "({'missing': 1}, 'missing', ['i@1 (head)'])"
  m 64 check --scratch "$dir/scratch" --store "$store"
  m 1 check --repair --scratch "$dir" --store "$store"
  has "$err" "no block files"
  m 0 check --repair --scratch "$dir/scratch" --json --store "$store"
  same "$(json 'd["repaired"], d["problems"][0]["isRepaired"]')" "(1, True)"
  m 0 check --data --store "$store"
  m 1 check nobody --store "$store"
  has "$err" "there is no disk 'nobody'"
}

t_manual_pages_are_well_formed() {
  command -v groff >/dev/null || die "no groff"
  local page
  for page in margined.8 margined.toml.5; do
    same "$(groff -man -Tutf8 -ww -z "$root/Docs/man/$page" 2>&1)" ""
  done
}

# ---- disks

t_a_disk_is_made_shown_listed_changed_and_deleted() {
  export MARGARINE_STORE=file://$dir/store
  m 0 disk create work --size 10G
  same "$out$err" ""
  m 0 disk create big --size 9223372036837998592 --safe-points flush --durability store --resume-window 0 --json
  same "$(json 'd["safePoints"], d["durability"], d["resumeWindowMs"]')" "('flush', 'store', 0)"
  m 0 disk show work --json
  same "$(json 'sorted(set(["name","size","generation","epoch","owner","safePoints","durability","blocks","storedBytes","committedAt"]) - set(d))')" "[]"
  same "$(json 'd["name"], d["size"], d["generation"], d["owner"], d["safePoints"], d["durability"], d["blocks"], d["storedBytes"], d["committedAt"], d["resumeWindowMs"]')" \
    "('work', 10737418240, 0, None, 'auto', 'scratch', 0, 0, None, 60000)"
  m 0 disk show work
  has "$out" "10 GiB (10737418240 bytes)"
  m 0 disk list
  same "$(printf '%s\n' "$out" | awk '{print $1}' | tr '\n' ' ')" "NAME big work "
  m 0 disk list --json
  same "$(json '[x["name"] for x in d]')" "['big', 'work']"
  m 0 disk set work --durability memory --resume-window 5m --json
  same "$(json 'd["durability"], d["resumeWindowMs"], d["safePoints"]')" "('memory', 300000, 'auto')"
  m 0 disk history work --json
  same "$(json 'd')" "[]"
  m 0 disk delete work
  m 1 disk show work
  one_line
  has "$err" "'work'"
  m 0 disk create work --size 1M
}

t_what_cannot_be_done_to_a_disk_is_told() {
  export MARGARINE_STORE=file://$dir/store
  m 0 disk create a --size 1G
  m 1 disk create a --size 1G
  one_line
  has "$err" "'a'"
  local command
  for command in "show b" "set b --durability store" "delete b" "release b" "resize b --size 1G" "export b $dir/x" "show a --store file://$dir/none"; do
    m 1 disk $command
    one_line
  done
  [ ! -e "$dir/x" ] || die "a failed export left a file"
}

t_an_image_becomes_a_disk_and_an_image_again() {
  export MARGARINE_STORE=file://$dir/store
  $python - "$dir/in.img" <<'PYTHON'
import random, sys
rng = random.Random(1)
with open(sys.argv[1], "wb") as f:
    for at in (0, 5 << 20, 40 << 20):
        f.seek(at)
        f.write(rng.randbytes(300_000))
    f.truncate((64 << 20) + 1000)
PYTHON
  m 0 disk import "$dir/in.img" a --durability store --json
  same "$(json 'd["size"], d["generation"], d["blocks"], d["durability"]')" "($(((64 << 20) + 1024)), 1, 2, 'store')"
  truncate -s $(((64 << 20) + 1024)) "$dir/in.img"
  m 0 disk export a "$dir/out.img"
  same "$out$err" ""
  cmp "$dir/in.img" "$dir/out.img" || die "another image came out"
  [ "$(du -k "$dir/out.img" | cut -f1)" -lt 4096 ] || die "the image is not sparse: $(du -k "$dir/out.img")"
  # Over a file that is longer, to standard output, and by generation.
  truncate -s 1G "$dir/out.img"
  m 0 disk export a@1 "$dir/out.img"
  cmp "$dir/in.img" "$dir/out.img" || die "another image came out over an old file"
  "$margined" disk export a - | cmp - "$dir/in.img" || die "another image came out of standard output"
  m 1 disk export a@2 "$dir/no.img"
  one_line
  [ ! -e "$dir/no.img" ] || die "a failed export left a file"
  m 1 disk import "$dir/in.img" a
  one_line
  has "$err" "'a'"
  m 1 disk import "$dir/none.img" b
  one_line
  has "$err" "none.img"
  m 0 disk history a --json
  same "$(json '[(x["generation"], x["size"], x["blocks"]) for x in d]')" "[(1, $(((64 << 20) + 1024)), 2)]"
  run 1 bash -c "'$margined' disk export a - >/dev/full"
  one_line
}

t_a_disk_grows_and_shrinks() {
  export MARGARINE_STORE=file://$dir/store
  head -c 3000000 /dev/urandom >"$dir/in.img"
  truncate -s 3M "$dir/in.img"
  m 0 disk import "$dir/in.img" a
  m 0 disk resize a --size 1G --json
  same "$(json 'd["size"], d["blocks"]')" "(1073741824, 1)"
  m 1 disk resize a --size 1M
  one_line
  has "$err" "--shrink"
  m 0 disk resize a --size 1M --shrink --json
  same "$(json 'd["size"]')" 1048576
  m 0 disk resize a --size 3M
  m 0 disk export a "$dir/out.img"
  truncate -s 1M "$dir/in.img"; truncate -s 3M "$dir/in.img"
  cmp "$dir/in.img" "$dir/out.img" || die "what was cut off came back"
}

t_new_disks_follow_the_configuration() {
  printf 'store = "file://%s/store"\n[new-disk]\ndurability = "store"\nresume-window = 0\n' "$dir" >"$dir/m.toml"
  m 0 disk create a --size 1G --config "$dir/m.toml" --resume-window 1s --json
  same "$(json 'd["durability"], d["resumeWindowMs"]')" "('store', 1000)"
}

t_a_reader_that_goes_away_is_no_crash() {
  export MARGARINE_STORE=file://$dir/store
  m 0 disk create a --size 1G
  local status
  ( "$margined" disk list; echo $? >"$dir/status" ) 2>"$dir/err" | true
  status=$(cat "$dir/status")
  [ "$status" = 0 ] || [ "$status" = 1 ] || die "ended with $status"
  run 1 bash -c "'$margined' disk list >/dev/full"
  one_line
  has "$err" "standard output"
}

# ---- the daemon

t_serve_prints_ready_and_answers_status_and_drains_on_sigterm() {
  serve --store "file://$dir/store" --listen 127.0.0.1:0 --unix "$dir/nbd.sock"
  [[ $ready =~ ^ready\ tcp://127\.0\.0\.1:[0-9]+\ unix:$dir/nbd.sock$ ]] || die "a strange ready line: $ready"
  m 0 status --scratch "$dir/scratch"
  has "$out" "pid $pid"
  m 0 status --scratch "$dir/scratch" --json
  same "$(json 'd["daemon"]["pid"], d["sessions"], d["disks"], sorted(d)')" \
    "($pid, [], [], ['collection', 'daemon', 'disks', 'memoryCache', 'scratchCache', 'sessions', 'store'])"
  m 0 status --control "$dir/scratch/control.sock"
  same "$(stat -c %a "$dir/scratch/control.sock")" 600
  stop TERM 0
  m 1 status --scratch "$dir/scratch"
  one_line
  has "$err" "no daemon listens"
  [ ! -e "$dir/scratch/control.sock" ] || die "the control socket is still there"
  [ ! -e "$dir/nbd.sock" ] || die "the unix socket is still there"
}

t_sigint_drains_also_when_it_was_ignored() {
  trap '' INT
  serve --store "file://$dir/store" --unix "$dir/nbd.sock"
  stop INT 0
}

t_two_daemons_on_one_scratch_directory_are_refused() {
  serve --store "file://$dir/store" --unix "$dir/nbd.sock"
  m 1 serve --scratch "$dir/scratch" --store "file://$dir/store" --unix "$dir/other.sock"
  printf '%s\n' "$err" | tail -n 1 | grep -q "in use by another daemon (pid $pid)" || die "it said: $err"
  m 0 status --scratch "$dir/scratch"
  # The lock goes with the process, whichever way that ends.
  kill -9 "$pid"
  wait "$pid" 2>/dev/null
  serve --store "file://$dir/store" --unix "$dir/nbd.sock"
  stop TERM 0
}

t_an_address_in_use_is_told() {
  serve --store "file://$dir/store" --unix "$dir/nbd.sock" --listen 127.0.0.1:0
  local port=${ready##*127.0.0.1:}
  port=${port%% *}
  m 1 serve --scratch "$dir/scratch2" --store "file://$dir/store" --listen "127.0.0.1:$port"
  has "$(printf '%s\n' "$err" | tail -n 1)" "$port"
  stop TERM 0
}

t_sighup_takes_over_what_can_change_and_names_the_rest() {
  printf 'store = "file://%s/store"\n[serve]\nunix = ["%s/nbd.sock"]\n[commit]\ncommit-interval = "5s"\n' "$dir" "$dir" >"$dir/m.toml"
  serve --config "$dir/m.toml"
  sed -i 's/"5s"/"1s"/; s/^\[serve\]/[serve]\nloops = 3\nlog-level = "debug"/' "$dir/m.toml"
  kill -HUP "$pid"
  until_logged "configuration read again"
  grep -q 'key=commit-interval value=1s' "$dir/log" || die "$(cat "$dir/log")"
  grep -q 'needs a restart to change key=loops' "$dir/log" || die "$(cat "$dir/log")"
  echo '[nonsense]' >>"$dir/m.toml"
  kill -HUP "$pid"
  until_logged "configuration not taken over"
  grep -q 'm.toml:[0-9]*: unknown table' "$dir/log" || die "$(cat "$dir/log")"
  stop TERM 0
}

t_systemd_is_told_of_readiness_and_of_the_end() {
  $python - "$dir/notify.sock" "$dir/notify.out" <<'PYTHON' &
import socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind(sys.argv[1])
s.settimeout(30)
with open(sys.argv[2], "w") as out:
    while True:
        text = s.recv(4096).decode()
        print(text, file=out, flush=True)
        if "STOPPING=1" in text:
            break
PYTHON
  local listener=$! n
  for n in $(seq 100); do [ -S "$dir/notify.sock" ] && break; sleep 0.05; done
  NOTIFY_SOCKET=$dir/notify.sock JOURNAL_STREAM=8:1 serve --store "file://$dir/store" --unix "$dir/nbd.sock"
  stop TERM 0
  wait "$listener"
  grep -q '^READY=1' "$dir/notify.out" && grep -q '^STOPPING=1' "$dir/notify.out" || die "it was told: $(cat "$dir/notify.out")"
  grep -q '^<5>draining' "$dir/log" || die "no priorities in the log: $(cat "$dir/log")"
}

t_log_lines_have_time_level_and_pairs() {
  serve --store "file://$dir/store" --unix "$dir/nbd.sock"
  stop TERM 0
  grep -Eq '^20[0-9]{2}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\.[0-9]{3}Z notice draining limit=1m$' "$dir/log" || die "$(cat "$dir/log")"
}

t_the_control_socket_stands_rubbish_floods_and_silence() {
  serve --store "file://$dir/store" --unix "$dir/nbd.sock"
  $python - "$dir/scratch/control.sock" <<'PYTHON' || die "the control socket"
import json, socket, sys
def connect():
    s = socket.socket(socket.AF_UNIX)
    s.connect(sys.argv[1])
    s.settimeout(20)
    return s
def ask(s, line):
    s.sendall(line + b"\n")
    answer = b""
    while not answer.endswith(b"\n"):
        part = s.recv(65536)
        assert part, "closed without an answer"
        answer += part
    return json.loads(answer)
s = connect()
assert "error" in ask(s, b"rubbish")
assert "error" in ask(s, b"[1]")
assert "unknown command" in ask(s, b'{"command":"dance"}')["error"]
assert ask(s, b'{"command":"status"}')["status"]["daemon"]["pid"] > 0
# More than it admits, all silent: those beyond are closed, and when the others go, it answers again.
crowd = [connect() for _ in range(40)]
closed = 0
for c in crowd:
    c.settimeout(0.2)
    try:
        closed += c.recv(1) == b""
    except TimeoutError:
        pass
assert closed >= 20, closed
for c in crowd:
    c.close()
s.close()
for attempt in range(50):
    try:
        assert ask(connect(), b'{"command":"status"}')["status"]
        break
    except (AssertionError, ConnectionError):
        import time; time.sleep(0.1)
else:
    raise SystemExit("no answer after the crowd")
try:
    s = connect()
    s.sendall(b"x" * (1 << 20))
    assert s.recv(1) == b""
except (BrokenPipeError, ConnectionResetError):
    pass
PYTHON
  stop TERM 0
}

. "$root/Tests/cli/history.sh"
. "$root/Tests/cli/locations.sh"
. "$root/Tests/cli/process.sh"

# ---- all of them

names=("$@")
[ $# -gt 0 ] || names=($(declare -F | sed -n 's/^declare -f t_//p'))
passed=0 failed=()
for name in "${names[@]}"; do
  declare -F "t_$name" >/dev/null || { echo "cli: no test '$name'" >&2; exit 64; }
  dir=$work/$name
  mkdir "$dir"
  # Each in a shell of its own; its daemons go with it.
  if (trap 'for p in $(jobs -p); do kill -9 "$p" 2>/dev/null; done' EXIT; "t_$name") 2>"$work/why"; then
    passed=$((passed + 1))
  else
    failed+=("$name")
    echo "FAILED $name"
    cat "$work/why"
  fi
  rm -rf "$dir"
done
echo "cli tests: $passed passed, ${#failed[@]} failed"
[ ${#failed[@]} = 0 ]
