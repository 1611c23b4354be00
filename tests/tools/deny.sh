#!/usr/bin/env bash
# Builds cargo-deny into the cache (about 6 minutes on 2 cores); `make deny` uses it.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

build() {
    cargo install --quiet --locked --root "$1" --target-dir "$PWD/target" "cargo-deny@$CARGO_DENY_VERSION"
}
cached "cargo-deny-$CARGO_DENY_VERSION" build
