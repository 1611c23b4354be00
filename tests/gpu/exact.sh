#!/usr/bin/env bash
# The trainer's elastic suite on a machine with a CUDA GPU: all ranks on the one card, over TCP, with leaves, losses and
# joins, and the same bits as one undisturbed rank. Needs PyTorch's libraries (its CUDA wheel).
#
#   tests/gpu/exact.sh ELASTIC    the test program of runtime/trainer/tests/elastic.rs (cargo test --no-run names it)
set -euo pipefail
torch="$(python3 -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parent / "lib")')"
site="$(dirname "$(dirname "$torch")")"
export LD_LIBRARY_PATH="$torch:$(ls -d "$site"/nvidia/*/lib 2> /dev/null | paste -sd:)"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
VICUNA_DEVICE=cuda exec "$1" --test-threads 1 --skip bad_input
