#!/usr/bin/env bash
# Headers of the CUDA runtime that libtorch is built against, from NVIDIA's wheels: the model crate compiles a few lines
# of C++ against them. No CUDA library is needed to build.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

build() {
    wheel "nvidia-cuda-runtime==$CUDA_HEADERS_VERSION" nvidia-cuda-crt==13.0.88
    mv unpacked/nvidia/cu13/include "$1/include"
}

cached "cuda-headers-$CUDA_HEADERS_VERSION" build
