#!/usr/bin/env bash
# Installs OpenAI's own clients, which the gateway's conformance tests drive it with.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

build_python() {
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --target "$1" \
        "openai==$OPENAI_PYTHON_VERSION"
}

build_node() {
    npm install --silent --no-audit --no-fund --no-package-lock --prefix "$1" "openai@$OPENAI_NODE_VERSION"
}

cached "openai-python-$OPENAI_PYTHON_VERSION" build_python
cached "openai-node-$OPENAI_NODE_VERSION" build_node
