# Tests of the daemon as a process: memory, threads, standard error, sockets, starts that wait. Sourced by run.sh.

# into_cgroup memory|pids NAME: makes a cgroup of either version and sets group; nonzero where this machine does not allow it.
into_cgroup() {
  if [ -d "/sys/fs/cgroup/$1" ]; then group=/sys/fs/cgroup/$1/$2; else group=/sys/fs/cgroup/$2; fi
  mkdir "$group" 2>/dev/null || return 1
  [ -e "$group/memory.max" ] || [ -e "$group/memory.limit_in_bytes" ] || [ -e "$group/pids.max" ] || { rmdir "$group"; return 1; }
}
leave_cgroup() {
  local n
  kill -9 "$pid" 2>/dev/null
  for n in $(seq 100); do rmdir "$group" 2>/dev/null && return; sleep 0.05; done
}
skip() { echo "cli: SKIP $1" >&2; }

t_row_22_a_daemon_lives_in_a_container_of_256_MiB() {
  into_cgroup memory "margarine-cli-$$" || { skip "row 22: no memory cgroup can be made here"; return 0; }
  trap leave_cgroup EXIT
  { echo $((256 << 20)) >"$group/memory.max" || echo $((256 << 20)) >"$group/memory.limit_in_bytes"; } 2>/dev/null || die "no limit"
  m 0 disk create d --size 2G --safe-points flush --store "file://$dir/store"
  sh -c 'echo $$ >"$1/cgroup.procs" && shift && exec "$@"' - "$group" "$margined" serve --scratch "$dir/scratch" --unix "$dir/s" \
    --store "file://$dir/store" --set journal=1G --set journal-per-disk=1G >"$dir/ready" 2>"$dir/log" &
  pid=$!
  for n in $(seq 400); do [ -s "$dir/ready" ] && break; sleep 0.05; done
  $python - <<PYTHON || die "the write: $(tail -3 "$dir/log")"
import nbd, random
h = nbd.NBD()
h.connect_uri("nbd+unix:///d?socket=$dir/s")
piece = random.Random(1).randbytes(4 << 20)
for at in range(0, 600 << 20, 4 << 20):
    h.pwrite(at.to_bytes(8, "little") + piece[8:], at)
h.flush()
for line in open("/proc/$pid/status"):
    # Not every kernel ends who goes beyond.
    if line.startswith(("VmHWM", "VmRSS")): assert int(line.split()[1]) < 256 << 10, line
for at in range(0, 600 << 20, 100 << 20):
    assert h.pread(4 << 20, at) == at.to_bytes(8, "little") + piece[8:], at
h.shutdown()
PYTHON
  kill -0 "$pid" || die "the daemon was killed: $(tail -3 "$dir/log")"
  until_logged "of=\"cgroup "
  has "$(cat "$dir/log")" 'limit="256 MiB"'
  lacks "$(cat "$dir/log")" "the kernel may end margined"
  leave_cgroup
}

t_row_23_a_start_that_waits_says_for_what() {
  $python -c 'import socket, time
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(); print(s.getsockname()[1], flush=True); time.sleep(60)' >"$dir/port" &
  local silent=$! n
  for n in $(seq 100); do [ -s "$dir/port" ] && break; sleep 0.05; done
  AWS_ACCESS_KEY_ID=a AWS_SECRET_ACCESS_KEY=b "$margined" serve --scratch "$dir/scratch" --unix "$dir/s" \
    --store "s3://bkt/p?endpoint=http://127.0.0.1:$(cat "$dir/port")" >"$dir/ready" 2>"$dir/log" &
  pid=$!
  for n in $(seq 50); do grep -q "not ready yet" "$dir/log" && break; sleep 0.1; done
  has "$(cat "$dir/log")" "not ready yet: waiting for the store s3://bkt/p"
  has "$(cat "$dir/log")" "check that it can be reached"
  kill -9 "$pid" "$silent"
}

t_row_34_nobody_reads_standard_error() {
  m 0 disk create d --size 1G --store "file://$dir/store"
  mkfifo "$dir/pipe"
  sleep 60 <"$dir/pipe" &
  local reader=$!
  "$margined" serve --scratch "$dir/scratch" --unix "$dir/s" --store "file://$dir/store" --log-level trace \
    >"$dir/ready" 2>"$dir/pipe" &
  pid=$!
  for n in $(seq 400); do [ -s "$dir/ready" ] && break; sleep 0.05; done
  # Each is a line or two of the log; a pipe holds 64 KiB.
  $python - "$dir/s" <<'PYTHON' || die "the daemon does not answer"
import socket, struct, sys
for n in range(3000):
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(5)
    s.connect(sys.argv[1])
    assert s.recv(18, socket.MSG_WAITALL)[:8] == b"NBDMAGIC"
    name = b"x" * 200
    s.sendall(struct.pack(">I", 1) + b"IHAVEOPT" + struct.pack(">II", 1, len(name)) + name)
    s.recv(1)
    s.close()
PYTHON
  run 0 nbdinfo --size "nbd+unix:///d?socket=$dir/s"
  m 0 status --scratch "$dir/scratch"
  kill -TERM "$pid"
  for n in $(seq 200); do kill -0 "$pid" 2>/dev/null || break; sleep 0.05; done
  kill -0 "$pid" 2>/dev/null && die "it does not end while nobody reads"
  kill "$reader"
}

# Standard output and the service manager's socket, full before the daemon is ready.
t_row_34_nobody_reads_standard_output() {
  $python - "$margined" "$dir" <<'PYTHON' || die "the daemon: $(tail -3 "$dir/log")"
import os, socket, subprocess, sys, time
margined, dir = sys.argv[1:]
os.mkdir(dir + "/store")
reader, writer = os.pipe()
os.set_blocking(writer, False)
try:
    while True: os.write(writer, bytes(4096))
except BlockingIOError: pass
os.set_blocking(writer, True)
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.bind(dir + "/notify")
filler = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
filler.setblocking(False)
try:
    while True: filler.sendto(b"x", dir + "/notify")
except BlockingIOError: pass
daemon = subprocess.Popen([margined, "serve", "--scratch", dir + "/scratch", "--unix", dir + "/s", "--store", "file://" + dir + "/store"],
    stdout=writer, stderr=open(dir + "/log", "w"), env=dict(os.environ, NOTIFY_SOCKET=dir + "/notify"))
try:
    for _ in range(200):
        if os.path.exists(dir + "/s"): break
        time.sleep(0.05)
    time.sleep(0.5)
    daemon.terminate()
    assert daemon.wait(15) == 0
finally:
    daemon.kill()
PYTHON
}

t_row_34_names_make_no_lines_of_their_own() {
  m 0 disk create d --size 1G --store "file://$dir/store"
  serve --store "file://$dir/store" --unix "$dir/s" --log-level trace
  $python - "$dir/s" <<'PYTHON'
import socket, struct, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
s.recv(18, socket.MSG_WAITALL)
name = "d?session=a\r\n2026-01-01T00:00:00.000Z critical forged\x1b[2J\u202e\u2028".encode()
s.sendall(struct.pack(">I", 1) + b"IHAVEOPT" + struct.pack(">II", 7, 6 + len(name)) + struct.pack(">I", len(name)) + name + b"\0\0")
s.settimeout(5)
s.recv(20)
s.close()
PYTHON
  sleep 0.5
  stop TERM 0
  grep -q '^2026-01-01' "$dir/log" && die "a forged line: $(cat "$dir/log")"
  grep -q $'[\r\e]' "$dir/log" && die "a control character in the log"
  m 64 disk show $'d\e[2J\r\nforged' --store "file://$dir/store"
  one_line
  grep -q $'[\r\e]' "$dir/err" && die "a control character in the error: $err"
  return 0
}

t_a_daemon_that_stands_still_is_not_waited_for_long() {
  serve --store "file://$dir/store" --unix "$dir/s"
  kill -STOP "$pid"
  $python - "$margined" "$dir" <<'PYTHON' || die "status does not end"
import socket, subprocess, sys, time
margined, dir = sys.argv[1:]
waiting = []
try:
    while len(waiting) < 1000:
        s = socket.socket(socket.AF_UNIX)
        s.setblocking(False)
        s.connect(dir + "/scratch/control.sock")
        waiting.append(s)
except BlockingIOError: pass
asked = subprocess.run([margined, "status", "--scratch", dir + "/scratch"], capture_output=True, text=True, timeout=20)
assert asked.returncode == 1 and "does not answer" in asked.stderr, asked
PYTHON
  kill -CONT "$pid"
  stop TERM 0
}

t_row_36_a_daemon_that_ends_leaves_anothers_socket() {
  local first n
  serve --store "file://$dir/store" --unix "$dir/s" --control "$dir/c"
  m 0 disk create d --size 1G --store "file://$dir/store"
  first=$pid
  # A client in the middle of its handshake holds up the drain.
  $python -c 'import socket, sys, time
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); time.sleep(30)' "$dir/s" &
  local client=$!
  sleep 0.3
  kill -TERM "$first"
  for n in $(seq 100); do grep -q draining "$dir/log" && break; sleep 0.02; done
  "$margined" serve --scratch "$dir/other" --store "file://$dir/store" --unix "$dir/s" --control "$dir/c2" >"$dir/ready2" 2>"$dir/log2" &
  pid=$!
  for n in $(seq 400); do [ -s "$dir/ready2" ] && break; sleep 0.05; done
  [ -s "$dir/ready2" ] || die "the second does not start: $(cat "$dir/log2")"
  for n in $(seq 400); do kill -0 "$first" 2>/dev/null || break; sleep 0.05; done
  kill -0 "$first" 2>/dev/null && die "the first does not end"
  kill "$client"
  run 0 nbdinfo --list "nbd+unix://?socket=$dir/s"
  stop TERM 0
  [ ! -e "$dir/s" ] || die "its own socket is left"
}

t_row_37_no_thread_for_another_disk() {
  into_cgroup pids "margarine-cli-$$" || { skip "row 37: no pids cgroup can be made here"; return 0; }
  trap leave_cgroup EXIT
  local n
  for n in $(seq 12); do m 0 disk create "d$n" --size 1G --store "file://$dir/store"; done
  sh -c 'echo $$ >"$1/cgroup.procs" && shift && exec "$@"' - "$group" "$margined" serve --scratch "$dir/scratch" --unix "$dir/s" \
    --store "file://$dir/store" >"$dir/ready" 2>"$dir/log" &
  pid=$!
  for n in $(seq 400); do [ -s "$dir/ready" ] && break; sleep 0.05; done
  # No further thread, from now on.
  cat "$group/pids.current" >"$group/pids.max" || die "no limit"
  for n in $(seq 12); do
    timeout 20 nbdinfo --size "nbd+unix:///d$n?socket=$dir/s" >"$dir/out" 2>"$dir/err"
    kill -0 "$pid" 2>/dev/null || die "the daemon ended: $(tail -3 "$dir/log")"
  done
  echo max >"$group/pids.max"
  for n in $(seq 12); do run 0 timeout 20 nbdinfo --size "nbd+unix:///d$n?socket=$dir/s"; done
  leave_cgroup
}

t_row_5_expired_keys_are_an_outage() {
  local store n admin
  mkfifo "$dir/stdin"
  $python "$root/Tests/servers/s3check.py" --until-stdin-closes <"$dir/stdin" >"$dir/s3" 2>"$dir/s3log" &
  exec 7>"$dir/stdin"
  for n in $(seq 100); do [ -s "$dir/s3" ] && break; sleep 0.05; done
  export AWS_ACCESS_KEY_ID=margarinetest AWS_SECRET_ACCESS_KEY=margarinesecret0123456789
  store="s3://margarine/p?endpoint=$(sed 's/^ready \([^ ]*\).*/\1/' "$dir/s3")&region=us-east-1"
  admin=$(sed 's/.*admin //' "$dir/s3")
  # The second block is nobody's before the first read of it.
  truncate -s 32M "$dir/image"
  head -c 3000000 /dev/urandom | dd of="$dir/image" bs=1M seek=16 conv=notrunc status=none
  m 0 disk import "$dir/image" d --store "$store"
  serve --store "$store" --unix "$dir/s" --set commit-interval=200ms
  $python - "$dir/s" "$dir/image" "$admin" <<'PYTHON' || die "$(cat "$dir/log")"
import nbd, sys, threading, time, urllib.request
h = nbd.NBD()
h.connect_uri("nbd+unix:///d?socket=" + sys.argv[1])
image = open(sys.argv[2], "rb").read()
def faults(method, body=None):
    urllib.request.urlopen(urllib.request.Request(sys.argv[3] + "/faults", body, method=method)).read()
faults("POST", b'{"do": "status", "code": 400, "error": "ExpiredToken"}')
threading.Timer(4, lambda: faults("DELETE")).start()
began = time.monotonic()
# A part of a page that is not here, then a read of one: neither fails.
base = 16 << 20
h.pwrite(b"x" * 100, base + 1000)
assert time.monotonic() - began > 3.5
assert h.pread(4096, base + (1 << 20)) == image[base + (1 << 20):base + (1 << 20) + 4096]
assert h.pread(4096, base) == image[base:base + 1000] + b"x" * 100 + image[base + 1100:base + 4096]
h.flush()
h.shutdown()
PYTHON
  for n in $(seq 200); do grep -q "the store answers again (get)" "$dir/log" && break; sleep 0.1; done
  same "$(grep -c 'the store refuses (get)' "$dir/log")" 1
  has "$(cat "$dir/log")" "the session token is no longer valid"
  has "$(cat "$dir/log")" "the store answers again (get)"
  stop TERM 0
  exec 7>&-
}
