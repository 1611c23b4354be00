#!/usr/bin/env bash
# Installs Gradio, whose chat interface a test has speak with the gateway; it runs with tests/tools/openai.sh's client.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

build() {
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --target "$1" \
        "gradio==$GRADIO_VERSION"
}

cached "gradio-$GRADIO_VERSION" build
