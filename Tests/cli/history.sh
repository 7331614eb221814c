# Tests of the command line: what is done with generations. To be sourced by run.sh, which has the words that they are made of.

commands+=("disk diff" "disk send" "disk receive")

# changed_disk: a disk 'a' with two generations, of images in1 and in2.
changed_disk() {
  $python - "$dir" <<'PYTHON'
import random, sys
rng = random.Random(2)
with open(sys.argv[1] + "/in1", "wb") as f:
    for at in (0, 5 << 20, 40 << 20):
        f.seek(at)
        f.write(rng.randbytes(300_000))
    f.truncate(64 << 20)
PYTHON
  m 0 disk import "$dir/in1" a
  m 0 disk resize a --size 41M --shrink
  cp "$dir/in1" "$dir/in2"
  truncate -s 41M "$dir/in2"
}

t_the_difference_of_two_generations_is_told() {
  export MARGARINE_STORE=file://$dir/store
  head -c 3000000 /dev/urandom >"$dir/in"
  m 0 disk import "$dir/in" a
  m 0 disk resize a --size 1M --shrink
  m 0 disk resize a --size 3000320
  m 0 disk diff a@1 a --json
  # Slices 0 and 1 are in a block that was written anew; the rest was cut off.
  same "$(json 'd["from"], d["to"]')" "({'disk': 'a', 'generation': 1, 'size': 3000320}, {'disk': 'a', 'generation': 2, 'size': 3000320})"
  same "$(json '[(r["offset"], r["length"], r["kind"]) for r in d["ranges"]]')" "[(0, 1048576, 'data'), (1048576, 1951744, 'zeroes')]"
  same "$(json 'd["dataBytes"], d["zeroesBytes"]')" "(1048576, 1951744)"
  m 0 disk diff a@2 a@1 --json
  same "$(json '[(r["offset"], r["length"], r["kind"]) for r in d["ranges"]]')" "[(0, 3000320, 'data')]"
  m 0 disk diff a a@2
  has "$out" "nothing changed; the size was 3000320 bytes and is 1048576"
  m 0 disk diff a@1 a
  same "$(printf '%s\n' "$out" | awk 'NR <= 3 {print $1, $2, $3}')" "OFFSET LENGTH KIND
0 1048576 data
1048576 1951744 zeroes"
  # Forks, and disks that have nothing to do with each other.
  m 0 disk fork a@1 b
  m 0 disk diff a@1 b --json
  same "$(json 'd["ranges"]')" "[]"
  m 0 disk create c --size 7E
  m 0 disk diff c b --json
  same "$(json 'd["from"]["generation"], sum(r["length"] for r in d["ranges"])')" "(0, 3145728)"
  m 1 disk diff a@1 a@9
  one_line
  m 1 disk diff a none
  one_line
  # One way to write each generation, as in the names of exports.
  m 64 disk diff a@01 a
  has "$err" "'01' is no generation"
  run 1 bash -c "'$margined' disk diff a@1 a >/dev/full"
  one_line
}

t_a_disk_is_sent_and_received() {
  export MARGARINE_STORE=file://$dir/store
  mkdir "$dir/spare"
  local spare="--store file://$dir/spare"
  changed_disk
  run 0 bash -c "'$margined' disk send a@1 | '$margined' disk receive b $spare --json --durability store"
  same "$(json 'd["name"], d["size"], d["generation"], d["origin"], d["durability"], d["pinned"]')" "('b', $((64 << 20)), 1, 'a@1', 'store', [1])"
  "$margined" disk send a --from 1 >"$dir/part" 2>"$dir/err" || die "$(cat "$dir/err")"
  [ "$(wc -c <"$dir/part")" -lt 700000 ] || die "a stream of what changed is as long as the whole"
  run 0 bash -c "'$margined' disk receive b $spare <'$dir/part'"
  same "$out$err" ""
  m 0 disk export b@1 "$dir/out1" $spare
  m 0 disk export b "$dir/out2" $spare
  cmp "$dir/in1" "$dir/out1" || die "the first generation has other bytes"
  cmp "$dir/in2" "$dir/out2" || die "the second generation has other bytes"
  m 0 disk history b --json $spare
  same "$(json '[(x["generation"], x["kind"], x["origin"], x["size"]) for x in d]')" "[(1, 'received', 'a@1', $((64 << 20))), (2, 'received', 'a@2', $((41 << 20)))]"
  # Once more: it is not at generation 1 any more, until it goes back.
  run 1 bash -c "'$margined' disk receive b $spare <'$dir/part'"
  one_line
  has "$err" "a@1"
  m 0 disk rollback b 1 $spare
  run 0 bash -c "'$margined' disk receive b $spare --json <'$dir/part'"
  same "$(json 'd["generation"], d["origin"]')" "(4, 'a@2')"
  run 1 bash -c "'$margined' disk receive none $spare <'$dir/part'"
  one_line
  has "$err" "receive that one first"
}

t_streams_that_are_not_whole_are_told() {
  export MARGARINE_STORE=file://$dir/store
  changed_disk
  "$margined" disk send a >"$dir/whole"
  head -c -1 "$dir/whole" >"$dir/cut"
  { cat "$dir/whole"; echo; } >"$dir/long"
  { head -c 100000 "$dir/whole"; echo x; tail -c +100003 "$dir/whole"; } >"$dir/damaged"
  local bad
  for bad in cut long damaged in1; do
    run 1 bash -c "'$margined' disk receive x <'$dir/$bad'"
    one_line
  done
  m 1 disk receive x
  one_line
  has "$err" "ends after 0 bytes"
  m 1 disk show x
  run 1 bash -c "'$margined' disk receive a <'$dir/whole'"
  one_line
  has "$err" "'a'"
  run 1 bash -c "'$margined' disk send a >/dev/full"
  one_line
  run 1 bash -c "'$margined' disk send none >'$dir/none'"
  one_line
  same "$(wc -c <"$dir/none")" 0
  m 1 disk send a --from 7
  one_line
  m 1 disk send a@7
  one_line
  m 0 disk create empty --size 1G
  m 1 disk send empty
  one_line
  has "$err" "no generation yet"
}

t_a_stream_reads_by_the_document() {
  export MARGARINE_STORE=file://$dir/store
  changed_disk
  "$margined" disk send a@1 | $python "$root/Tests/format/readstream.py" "$dir/image" >"$dir/out" 2>"$dir/err" || die "$(cat "$dir/err")"
  same "$(cat "$dir/out")" '{"generation": 1, "from": null, "blocks": 2}'
  cmp "$dir/in1" "$dir/image" || die "the stream holds another image"
  "$margined" disk send a --from 1 | $python "$root/Tests/format/readstream.py" "$dir/image" >"$dir/out" 2>"$dir/err" || die "$(cat "$dir/err")"
  same "$(cat "$dir/out")" '{"generation": 2, "from": 1, "blocks": 1}'
  cmp "$dir/in2" "$dir/image" || die "the stream changes the image otherwise"
}

t_row_19_a_fork_says_how_it_is_mounted() {
  PATH=$PATH:/sbin:/usr/sbin
  command -v mkfs.ext4 >/dev/null && command -v debugfs >/dev/null && command -v mkfs.btrfs >/dev/null || die "e2fsprogs and btrfs-progs are needed"
  export MARGARINE_STORE=file://$dir/store
  local name
  for name in dirty one two; do truncate -s 128M "$dir/$name.img"; done
  mkfs.ext4 -q "$dir/dirty.img" && debugfs -w -R 'feature needs_recovery' "$dir/dirty.img" >/dev/null 2>&1
  mkfs.btrfs -q "$dir/one.img" "$dir/two.img" >/dev/null 2>&1
  for name in dirty one two; do m 0 disk import "$dir/$name.img" "$name"; done
  m 0 disk fork dirty look --read-only
  has "$err" "'look'"; has "$err" "-o ro,noload"
  same "$out" ""
  m 0 disk fork dirty look2 --read-only --json
  same "$(json '[(n["kind"], n["mountOptions"]) for n in d["notes"]]')" "[('ext4', 'ro,noload')]"
  m 0 disk fork dirty work
  same "$err" ""
  m 0 disk fork one alone
  has "$err" "2 devices"; has "$err" "--into"
  m 0 disk fork one two --into one2 two2
  same "$err" ""
}
