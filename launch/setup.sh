# Sourced by launch/quickstart.sh and ci/test.sh: what both need on the machine, or one line on how to get it.
# shellcheck shell=bash

fail() {
  printf 'error: %s\n  remedy: %s\n' "$1" "$2" >&2
  exit 2
}

say() { printf '\n== %s\n' "$1"; }

# apt_install COMMAND PACKAGE...: installs Debian packages where that is allowed, else names them.
apt_install() {
  local command=$1
  shift
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "'$command' is missing: installing $* with apt-get"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } >/dev/null \
      || fail "apt-get could not install $*" "install $* by hand, then run this again"
  else
    fail "'$command' is missing" "sudo apt-get install $*"
  fi
}

check_tools() {
  command -v cc >/dev/null || apt_install cc build-essential
  command -v python3 >/dev/null || apt_install python3 python3 ca-certificates
  command -v cargo >/dev/null || fail "cargo is missing" "install Rust 1.95 or newer with rustup, then run this again"
  local version
  version=$(rustc --version | cut -d' ' -f2 | cut -d- -f1)
  [ "$(printf '%s\n1.95.0\n' "$version" | sort -V | head -n1)" = 1.95.0 ] \
    || fail "rustc $version is too old" "rustup update stable (1.95 or newer)"
}
