#!/usr/bin/env bash
# Prepares everything that building and testing need; a second run only checks that all is there.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

download() {
    "$here/libtorch.sh"
    "$here/cuda_headers.sh"
    "$here/model.sh"
    "$here/seaweedfs.sh"
    "$here/kubectl.sh"
    "$here/pause.sh"
    "$here/llama_tokenizer.sh"
}

compile() {
    "$here/kubernetes.sh"
    "$here/coredns.sh"
    "$here/helm.sh"
}

"$here/packages.sh"
download &
downloads=$!
compile
wait "$downloads"
say "all tools are ready; next: source tests/tools/env.sh"
