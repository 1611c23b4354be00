#!/usr/bin/env bash
# Lays out the CPU side of libtorch (headers and libraries) for tch, from PyTorch's own wheels.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

build() {
    local out="$1/libtorch" library
    wheel "torch==$LIBTORCH_VERSION" nvidia-cuda-cupti==13.0.85 nvidia-cuda-runtime==13.0.96
    mkdir -p "$out/lib"
    mv unpacked/torch/include "$out/include"
    for library in libc10.so libtorch_cpu.so; do mv "unpacked/torch/lib/$library" "$out/lib/"; done
    find unpacked \( -name 'libgomp.so.1' -o -name 'libcudart.so.13' -o -name 'libcupti.so.13' \) \
        -type f -exec cp {} "$out/lib/" \;
    ln -s libtorch_cpu.so "$out/lib/libtorch.so"
}

cached "libtorch-$LIBTORCH_VERSION" build
echo "LIBTORCH=$LIBTORCH"
