#!/usr/bin/env bash
# Installs Playwright, which drives Debian's chromium in the browser test; it brings its own Node and no browser.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

build() {
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --only-binary=:all: \
        --target "$1" "playwright==$PLAYWRIGHT_VERSION"
}

cached "playwright-$PLAYWRIGHT_VERSION" build
