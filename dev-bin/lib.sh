# shellcheck shell=bash
# Shared by the scripts beside it; sourced, never run.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit 70
export TARGET=${CARGO_TARGET_DIR:-$ROOT/target}

say() { printf '%s\n' "$*"; }
step() { printf '\n== %s\n' "$*"; }
# die CODE WHAT...: 1 usage, 69 something missing, 78 configuration.
die() {
    local code=$1
    shift
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit "$code"
}

have() { command -v "$1" >/dev/null 2>&1; }

# need_packages COMMAND=PACKAGE...: installs the packages whose command is missing.
need_packages() {
    local pair missing=()
    for pair in "$@"; do
        PATH=$PATH:/usr/sbin:/sbin have "${pair%%=*}" || missing+=("${pair#*=}")
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    have apt-get || die 69 "needs ${missing[*]}: install these packages and try again"
    [ "$(id -u)" = 0 ] || die 69 "needs ${missing[*]}: run 'sudo apt-get install ${missing[*]}' and try again"
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >/dev/null || true
    # Some packages start a service on this machine. Only their programs are wanted.
    local policy=/usr/sbin/policy-rc.d ours=0 failed=0
    if [ ! -e "$policy" ]; then
        ours=1
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 0755 "$policy"
    fi
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null || failed=1
    [ "$ours" = 0 ] || rm -f "$policy"
    [ "$failed" = 0 ] || die 69 "could not install ${missing[*]}"
}

# as_owner COMMAND...: runs it as whoever owns the checkout's caller, so that a
# build under sudo leaves no file of root's in the tree.
as_owner() {
    if [ "$(id -u)" = 0 ] && [ -n "${SUDO_USER:-}" ] && [ "$SUDO_USER" != root ]; then
        sudo -u "$SUDO_USER" -H -- "$@"
    else
        "$@"
    fi
}

# find_cargo: under sudo the toolchain is the invoking user's.
find_cargo() {
    have cargo && return 0
    local home
    home=$(getent passwd "${SUDO_USER:-$(id -un)}" | cut -d: -f6)
    if [ -x "$home/.cargo/bin/cargo" ]; then
        PATH=$home/.cargo/bin:$PATH
        return 0
    fi
    die 69 "cargo was not found: install a Rust toolchain (1.91 or newer) and try again"
}

# build CRATE...: release binaries of these packages in $TARGET/release.
build() {
    find_cargo
    need_packages cc=build-essential
    local package args=()
    for package in "$@"; do args+=(-p "$package"); done
    as_owner env "PATH=$PATH" cargo build --release --quiet --locked "${args[@]}" ||
        die 70 "the build failed"
}
