#!/usr/bin/env bash
# Installs what the gateway's pages are made with, TypeScript's compiler and esbuild, and runs it:
#   tests/tools/ui.sh          only installs
#   tests/tools/ui.sh build    checks the types and writes runtime/gateway/ui/dist
#   tests/tools/ui.sh check    fails where types or tests do, or where dist is not what the sources give
set -euo pipefail
source "$(dirname "$0")/cache.sh"

tools="ui-$TYPESCRIPT_VERSION-$ESBUILD_VERSION-$NODE_TYPES_VERSION"
modules="$VICUNA_CACHE/$tools/node_modules"
ui="$VICUNA_REPOSITORY/runtime/gateway/ui"

install_tools() {
    npm install --silent --no-audit --no-fund --no-package-lock --prefix "$1" "typescript@$TYPESCRIPT_VERSION" \
        "esbuild@$ESBUILD_VERSION" "@types/node@$NODE_TYPES_VERSION"
}

check_types() { "$modules/.bin/tsc" --noEmit --project "$ui/tsconfig.json" --typeRoots "$modules/@types"; }

# The bundle names its sources from the folder that it is made in: always the same, wherever the clone is.
bundle() ( # OUT: one readable script and one style sheet; nothing is left of the types.
    cd "$ui"
    "$modules/.bin/esbuild" src/app.ts src/style.css --bundle --format=esm --target=es2022 --charset=utf8 \
        --log-level=warning --outdir="$1"
    cp src/index.html "$1/"
)

# What needs no page is tested without a browser.
run_tests() {
    local out
    out="$(mktemp -d)"
    "$modules/.bin/esbuild" "$ui"/tests/*.ts --bundle --platform=node --format=esm --log-level=warning \
        --out-extension:.js=.mjs --outdir="$out"
    node --test --test-reporter=dot "$out"/*.mjs || return 1
    rm -rf "$out"
}

is_up_to_date() {
    local out
    out="$(mktemp -d)"
    bundle "$out"
    diff -r "$out" "$ui/dist" > "$out.diff" || {
        head -n 20 "$out.diff"
        say "runtime/gateway/ui/dist is not what runtime/gateway/ui/src gives: run make ui and commit it"
        return 1
    }
    rm -rf "$out" "$out.diff"
}

cached "$tools" install_tools
case "${1:-}" in
    "") ;;
    build) check_types && rm -rf "$ui/dist" && bundle "$ui/dist" ;;
    check) check_types && run_tests && is_up_to_date ;;
    *) say "unknown word $1: build or check" && exit 2 ;;
esac
