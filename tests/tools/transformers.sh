#!/usr/bin/env bash
# Installs Hugging Face transformers for the CPU, which the model's golden test compares with.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

version=5.24.0

build() {
    install_into "$1" --no-deps "torch==$LIBTORCH_VERSION" nvidia-cuda-cupti==13.0.85 nvidia-cuda-runtime==13.0.96
    install_into "$1" "transformers==$version" filelock typing-extensions sympy networkx jinja2 fsspec
}

install_into() {
    python3 -m pip install --quiet --disable-pip-version-check --target "$@"
}

cached "transformers-$version" build
echo "PYTHONPATH=$VICUNA_CACHE/transformers-$version"
