# Tests of the command line: stores with several locations. To be sourced by run.sh, which has the words that they are made of.

# two_locations: eu and us, and the configurations one.toml (eu alone), eu.toml and us.toml (both, and which is near).
two_locations() {
  printf 'locations = ["eu=file://%s/eu"]\n' "$dir" >"$dir/one.toml"
  for near in eu us; do printf 'locations = ["eu=file://%s/eu", "us=file://%s/us"]\nnear = "%s"\n' "$dir" "$dir" $near >"$dir/$near.toml"; done
  m 0 disk create first --size 1G --config "$dir/one.toml"
  m 0 location add us "file://$dir/us" --config "$dir/eu.toml"
  same "$err" ""
}

t_locations_are_added_and_listed() {
  two_locations
  m 0 location list --json --config "$dir/us.toml"
  same "$(json '[(l["number"], l["name"], l["near"], l["problem"]) for l in d]')" "[(0, 'eu', False, None), (1, 'us', True, None)]"
  m 0 location list --config "$dir/eu.toml"
  has "$out" "answers"
  # What does not belong together is told apart.
  # What is done may be done again.
  m 0 location add us "file://$dir/us" --config "$dir/one.toml"
  m 1 location add ap "file://$dir/us" --config "$dir/eu.toml"
  has "$err" "is location 'us' of this store, not 'ap'"
  m 1 location add us "file://$dir/other" --config "$dir/one.toml"
  has "$err" "--replace"
  printf 'locations = ["us=file://%s/eu", "eu=file://%s/us"]\n' "$dir" "$dir" >"$dir/swapped.toml"
  m 1 disk list --config "$dir/swapped.toml"
  one_line
  has "$err" "is location 'eu' of this store, not 'us'"
}

t_locations_are_configured_in_one_way() {
  local file=$dir/m.toml
  check() { printf '%b' "$2" >"$file"; m 1 disk list --config "$file"; one_line; has "$err" "$file"; has "$err" "$3"; }
  check 1 'store = "file:///a"\nlocations = ["eu=file:///b"]\n' "exclude each other"
  check 1 'locations = ["file:///b"]\n' "write NAME=URL"
  check 1 'locations = ["a=file:///b", "a=file:///c"]\n' "two locations of the name 'a'"
  check 1 'locations = ["a=file:///b"]\nnear = "b"\n' "near (b) is none of the locations: a"
  check 1 'near = "b"\n' "needs locations"
  check 1 'store = "file:///a"\nnear = "b"\n' "needs locations"
  two_locations
  # The file stands over the environment, a flag over both.
  MARGARINE_STORE=file:///nowhere m 0 disk list --config "$dir/eu.toml"
  m 1 disk list --config "$dir/eu.toml" --store "file://$dir/nowhere"
  has "$err" nowhere
}

t_disks_are_found_and_made_at_any_location() {
  two_locations
  m 0 disk create far --size 1G --location us --json --config "$dir/eu.toml"
  same "$(json 'd["location"]')" us
  m 0 disk create there --size 1G --json --config "$dir/us.toml"
  same "$(json 'd["location"]')" us
  m 0 disk create other --size 1G --json --config "$dir/us.toml" --near eu
  same "$(json 'd["location"]')" eu
  m 1 disk create far --size 1G --config "$dir/eu.toml"
  has "$err" "there is a disk 'far' already"
  m 1 disk create x --size 1G --location ap --config "$dir/eu.toml"
  has "$err" "there is no location 'ap'; this store has eu, us"
  m 0 disk list --json --config "$dir/eu.toml"
  same "$(json '[(x["name"], x["location"]) for x in d]')" "[('far', 'us'), ('first', 'eu'), ('other', 'eu'), ('there', 'us')]"
  m 0 disk list --config "$dir/eu.toml"
  has "$out" LOCATION
  m 0 disk show far --config "$dir/eu.toml"
  has "$out" "location      us"
  m 0 disk fork first copy --location us --json --config "$dir/eu.toml"
  same "$(json 'd["location"]')" us
  # Without the other location, the rest is shown, and what is missing is said.
  m 1 disk list --json --config "$dir/one.toml"
  same "$(json '[x["name"] for x in d]')" "['first', 'other']"
  has "$err" "location 'us' of this store is not configured here"
  m 1 disk show far --config "$dir/one.toml"
  has "$err" "location 'us'"
  m 1 gc --config "$dir/one.toml"
  has "$err" "'us'"
}

t_a_disk_is_localized() {
  two_locations
  $python -c "import random, sys; sys.stdout.buffer.write(random.Random(1).randbytes(40_000_000))" >"$dir/image"
  m 0 disk import "$dir/image" a --config "$dir/us.toml"
  m 0 disk fork a b --config "$dir/eu.toml"
  m 0 disk localize b --config "$dir/eu.toml"
  has "$out" "3 objects (38.1 MiB) copied to 'eu', 0 were there; generation 2"
  m 0 disk localize b --json --config "$dir/eu.toml"
  same "$(json '(d["copiedObjects"], d["copiedBytes"], d["presentObjects"], d["generations"], d["generation"])')" "(0, 0, 0, 0, 2)"
  mv "$dir/us" "$dir/gone"
  m 0 disk export b "$dir/out" --config "$dir/eu.toml"
  cmp -n 40000000 "$dir/image" "$dir/out" || die "the localized disk is another one"
  m 1 disk export b@1 "$dir/out" --config "$dir/eu.toml"
  one_line
  has "$err" "location 'us'"
  m 1 disk localize a --config "$dir/eu.toml"
  has "$err" "location 'us'"
}
