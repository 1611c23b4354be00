#!/usr/bin/env bash
# Trainer processes on the GPUs of one machine, a card each in turn, over TCP: what a killed rank, a newcomer and a rank that
# is told to leave do to the weights, beside one process that nothing happens to; and how fast one and several ranks train.
# Needs PyTorch's libraries (its CUDA wheel) and python3; no cluster.
#
#   tests/gpu/ranks.sh BINARIES    vicuna-trainer, vicuna-tiny-model and the example `coordinator`
set -euo pipefail
binaries="$(realpath "$1")" work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
torch="$(python3 -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parent / "lib")')"
site="$(dirname "$(dirname "$torch")")"
export LIBRARIES="$torch:$(ls -d "$site"/nvidia/*/lib 2> /dev/null | paste -sd:)"
nvidia-smi --query-gpu=index,name,driver_version --format=csv,noheader
LD_LIBRARY_PATH="$LIBRARIES" "$binaries/vicuna-tiny-model" --out "$work/tiny" > /dev/null
exec python3 "$(dirname "$0")/ranks.py" "$binaries" "$work"
