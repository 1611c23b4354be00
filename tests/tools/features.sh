#!/usr/bin/env bash
# Fails when tests are built with other features of a dependency than programs are: everything above that dependency
# would be compiled twice, which takes minutes that nobody notices.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/tools/env.sh

# built_with EDGES [OPTION...]: every crate with its features, as cargo unites them for the whole workspace.
built_with() {
    local edges="$1"
    shift
    cargo tree --locked --workspace --edges "$edges" --format '{p} [{f}]' --prefix none --no-dedupe "$@" | sed 's/ (\*)$//' | sort -u
}

programs="$(built_with normal,build)"
tests="$(built_with normal,build,dev)"
golden="$(built_with normal,build,dev --exclude vicuna-tests)"
changed="$(comm -23 <(sort -u <<< "$programs"$'\n'"$golden") <(echo "$tests"))"
if [[ -n "$changed" ]]; then
    echo "these get other features when tests are built; give the dependency in Cargo.toml the features of both:"
    echo "$changed"
    exit 1
fi
