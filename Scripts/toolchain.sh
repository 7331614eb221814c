# Finds Swift and puts it on PATH; to be sourced. Ends the script with one line where there is none.
find_swift() {
  local dir
  for dir in "" /opt/swift/usr/bin "$HOME/.swiftly/bin" "${SWIFTLY_BIN_DIR:-}" "$HOME/.local/share/swiftly/bin"; do
    if [ -n "$dir" ] && [ -x "$dir/swift" ]; then PATH=$dir:$PATH; fi
    if command -v swift >/dev/null; then
      local version
      version=$(swift --version 2>/dev/null | sed -n 's/.*Swift version \([0-9]*\.[0-9]*\).*/\1/p' | head -n 1)
      case $version in
        6.[2-9]* | 6.[1-9][0-9]* | [7-9].* | [1-9][0-9].*) export PATH; return 0 ;;
        *) echo "${0##*/}: the Swift on PATH is ${version:-none that runs}, 6.2 or later is needed: see https://www.swift.org/install/linux/" >&2; exit 1 ;;
      esac
    fi
  done
  echo "${0##*/}: no Swift toolchain on PATH, in /opt/swift or from swiftly: get 6.2 or later at https://www.swift.org/install/linux/ and run this again" >&2
  exit 1
}
