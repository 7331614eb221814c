# The guest of Scripts/chaos-tcpkill.sh: Debian's kernel with nbd.ko and btrfs in QEMU, and nothing in it but what client.py
# needs. To be sourced after Tests/system/lib.sh; `start_guest` builds the image where it is not in the cache, and boots it;
# client.py answers at the socket $guest once it is up.
#
# Needs GUEST_CACHE (a folder that stays) and KERNEL_TREE (what guest-kernel.sh printed). CHAOS_ACCEL is tcg (default, works
# everywhere) or kvm.
guest_tools=(nbd-client btrfs mkfs.btrfs)
guest_modules=(virtio_pci virtio_net virtio_console crc32c-intel crc32c_generic xxhash_generic nbd btrfs)

# guest_file FILE...: copies files, what the dynamic linker finds for them, and Python's compiled forms, to the same places.
guest_file() {
  local f l
  for f in "$@"; do
    mkdir -p "$tree$(dirname "$f")"
    cp -pL "$f" "$tree$f"
    case $f in
      *.py)
        l=$(dirname "$f")/__pycache__/$(basename "$f" .py).cpython-311.pyc
        [ ! -e "$l" ] || { mkdir -p "$tree$(dirname "$l")"; cp -p "$l" "$tree$l"; } ;;
      *) for l in $(ldd "$f" 2>/dev/null | grep -o '/[^ ]*'); do [ -e "$tree$l" ] || { mkdir -p "$tree$(dirname "$l")"; cp -pL "$l" "$tree$l"; }; done ;;
    esac
  done
}

# The part of the image that does not change from run to run.
guest_image() {
  local stamp version m f
  stamp=$({ cat "$ROOT/Tests/chaos/guest.sh"; echo "$KERNEL_TREE"; dpkg-query -W nbd-client btrfs-progs python3.11-minimal busybox-static; } | sha256sum | cut -c 1-12)
  IMAGE=$GUEST_CACHE/image-$stamp.cpio
  [ -s "$IMAGE" ] && return 0
  say "making the guest's image"
  tree=$WORK/tree version=$(ls "$KERNEL_TREE/lib/modules")
  mkdir -p "$tree"/{bin,sbin,usr/bin,usr/sbin,proc,sys,dev,tmp,run,etc,mods,chaos,root,var}
  cp "$(command -v busybox)" "$tree/bin/busybox"
  for f in $("$tree/bin/busybox" --list); do ln -s busybox "$tree/bin/$f" 2>/dev/null; done
  for f in "${guest_tools[@]}"; do
    m=$(PATH=$PATH:/usr/sbin:/sbin command -v "$f") || fail "no $f for the guest"
    guest_file "$m"
    rm -f "$tree/bin/$f"
  done
  rm -f "$tree/bin/python3"
  guest_file "$(readlink -f $PYTHON)"
  ln -s "$(readlink -f $PYTHON)" "$tree/bin/python3"
  # What client.py imports, what Python imports only when it is used, and the C library's helper for pthread_exit.
  for f in $($PYTHON -I -B -X utf8 "$ROOT/Tests/chaos/client.py" modules) /usr/lib/python3.11/encodings/*.py /usr/lib/python3.11/stringprep.py \
    /usr/lib/python3.11/os.py /usr/lib/python3.11/site.py /usr/lib/x86_64-linux-gnu/libgcc_s.so.1 /lib/x86_64-linux-gnu/libgcc_s.so.1; do
    [ ! -e "$f" ] || guest_file "$f"
  done
  mkdir -p "$tree/usr/lib/python3.11/lib-dynload"
  for m in "${guest_modules[@]}"; do
    modprobe -d "$KERNEL_TREE" -S "$version" --show-depends "$m" 2>/dev/null | sed -n 's/^insmod \([^ ]*\).*/\1/p'
  done | awk '!seen[$0]++' >"$WORK/modules"
  while read -r f; do cp "$f" "$tree/mods/"; basename "$f" >>"$tree/mods/order"; done <"$WORK/modules"
  grep -q '^nbd.ko' "$tree/mods/order" || fail "the guest's kernel has no nbd.ko"
  echo 'root:x:0:0::/root:/bin/sh' >"$tree/etc/passwd"
  cat >"$tree/init" <<'INIT'
#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root PYTHONHOME=/usr
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp; mount -t tmpfs run /run
while read -r m; do case $m in nbd.ko) insmod "/mods/$m" nbds_max=4 max_part=0 ;; *) insmod "/mods/$m" 2>/dev/null ;; esac; done </mods/order
ip link set lo up; ip addr add "$client/30" dev eth0; ip link set eth0 up
for n in 1 2 3 4 5 6 7 8 9 10; do ls /dev/vport*p1 >/dev/null 2>&1 && break; sleep 0.2; done
python3 -B /chaos/client.py guest /dev/vport*p1
echo "client.py ended with status $?"
poweroff -f
INIT
  chmod 755 "$tree/init"
  (cd "$tree" && find . -mindepth 1 | cpio --quiet -o -H newc) >"$IMAGE.new" || fail "the guest's image"
  truncate -s %512 "$IMAGE.new"
  mv "$IMAGE.new" "$IMAGE"
  rm -rf "$tree"
}

start_guest() {
  needs qemu-system-x86_64 cpio depmod modprobe busybox
  guest_image
  # Unpacked by the kernel over the first: this tree's scripts, compiled here, where it is faster.
  mkdir -p "$WORK/own/chaos"
  cp "$ROOT"/Tests/chaos/{client,load,wire}.py "$WORK/archive.tar" "$WORK/own/chaos/"
  $PYTHON -m compileall -q --invalidation-mode unchecked-hash "$WORK/own/chaos" || fail "compiling the client's scripts"
  { cat "$IMAGE"; (cd "$WORK/own" && find . -mindepth 1 | cpio --quiet -o -H newc); } >"$WORK/initrd"
  guest=$WORK/guest.sock
  local kernel n
  kernel=$(echo "$KERNEL_TREE"/boot/vmlinuz-*)
  qemu-system-x86_64 -accel "${CHAOS_ACCEL:-tcg,thread=multi}" -machine pc -cpu max -smp 2 -m 768 -nodefaults -no-user-config -display none -no-reboot \
    -kernel "$kernel" -initrd "$WORK/initrd" \
    -append "console=ttyS0 panic=-1 tsc=reliable no_timer_check mitigations=off nokaslr random.trust_cpu=on net.ifnames=0 loglevel=4 client=$client" \
    -serial "file:$WORK/guest-console.log" -monitor none \
    -netdev "tap,id=net,ifname=$interface,script=no,downscript=no" -device virtio-net-pci,netdev=net,romfile= \
    -object rng-random,id=rng,filename=/dev/urandom -device virtio-rng-pci,rng=rng \
    -chardev "socket,id=agent,path=$guest,server=on,wait=off" -device virtio-serial-pci -device virtserialport,chardev=agent,name=chaos \
    </dev/null >"$WORK/guest-qemu.log" 2>&1 &
  GUEST=$!
  PIDS+=("$GUEST")
  for n in $(seq 100); do [ -S "$guest" ] && return 0; sleep 0.05; done
  tail -n 3 "$WORK/guest-qemu.log"
  fail "QEMU did not start"
}
