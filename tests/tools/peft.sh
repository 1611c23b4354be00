#!/usr/bin/env bash
# Installs PEFT, which the golden test of adapters compares with. It runs on tests/tools/transformers.sh's.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

version=0.21.2

build() {
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps \
        --target "$1" "peft==$version" accelerate==1.15.0 psutil
}

cached "peft-$version" build
