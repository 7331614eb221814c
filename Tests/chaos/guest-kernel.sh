#!/bin/bash
# Fetches Debian's newest cloud kernel for the guest, and prints where it is: Tests/chaos/guest-kernel.sh CACHE
# It is unpacked there, never installed. Exit status 77 where apt does not give it.
set -u
cache=${1:?usage: guest-kernel.sh CACHE}
newest() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1; }
have() { [ -d "$1/lib/modules" ] && echo "$1"; }
package=$(newest)
have "$cache/$package" && exit 0
apt-get update >/dev/null 2>&1
package=$(newest)
have "$cache/$package" && exit 0
# Without apt's lists, one that an earlier run fetched will do.
[ -n "$package" ] || { for tree in "$cache"/linux-image-*; do have "$tree" && exit 0; done; echo "apt offers no kernel for the guest" >&2; exit 77; }
mkdir -p "$cache"
work=$(mktemp -d "$cache/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
(cd "$work" && apt-get -o APT::Sandbox::User=root download "$package" >apt.log 2>&1) || { tail -n 2 "$work/apt.log" >&2; echo "apt could not fetch $package" >&2; exit 77; }
dpkg-deb -x "$work"/*.deb "$work/tree" && depmod -b "$work/tree" "$(ls "$work/tree/lib/modules")" || { echo "$package could not be unpacked" >&2; exit 77; }
mv "$work/tree" "$cache/$package"
have "$cache/$package"
