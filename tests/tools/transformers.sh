#!/usr/bin/env bash
# Installs Hugging Face transformers for the CPU, which the model's golden test compares with.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

version=5.24.0

build() {
    install_into "$1" --no-deps "torch==$LIBTORCH_VERSION" nvidia-cuda-cupti==13.0.85 nvidia-cuda-runtime==13.0.96
    install_into "$1" "transformers==$version" filelock typing-extensions sympy networkx jinja2 fsspec
    stand_in_for_cuda "$1/torch/lib"
}

install_into() {
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --target "$@"
}

# PyPI's torch is linked with gigabytes of CUDA libraries, none of which is called without a GPU.
# Libraries that only have the names which it looks for take their place.
stand_in_for_cuda() {
    local library symbols
    symbols="$(nm -D --undefined-only --with-symbol-versions "$1"/*.so | awk '$1 == "U" { print $2 }' | sort -u)"
    for library in $(needed_by "$1"/*.so | grep -E '^lib(cu|nv|nccl)'); do
        [[ -n "$(find "$1/../.." -name "$library" -print -quit)" ]] || stand_in "$1/$library" <<< "$symbols"
    done
}

needed_by() { readelf -d "$@" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | sort -u; }

# stand_in FILE: a library of this name with those of the symbols on stdin that carry its version.
# Symbols without a version may be in any library that is always loaded; all are in NCCL's.
stand_in() {
    local name version pattern
    name="$(basename "$1")"
    version="$name" pattern=""
    case "$name" in
        libnvshmem_host.so.*) version=NVSHMEM ;;
        libnccl.so.*) pattern='^(cu|nccl)[A-Za-z0-9_]*$|' ;;
    esac
    sed -nE "/$pattern@$version\$/ { s/@.*//; s/.*/void &(void) {}/p }" > functions.c
    echo "$version { global: *; };" > versions
    cc -shared -w -fno-builtin -Wl,-soname,"$name" -Wl,--version-script=versions -o "$1" functions.c
}

cached "transformers-$version" build
echo "PYTHONPATH=$VICUNA_CACHE/transformers-$version"
