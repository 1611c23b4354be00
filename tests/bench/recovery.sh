#!/usr/bin/env bash
# From `kill -9` of one of two ranks to the next finished step: ours beside torchrun's elastic DDP, in the same run, with medians
# and their ratio. Real processes on this machine, without a cluster.
#   tests/bench/recovery.sh [--model tiny|smollm2] [--kills 5]
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/tools/env.sh
tests/tools/transformers.sh > /dev/null
cargo build --release --locked --workspace --bins --examples
binaries="$CARGO_TARGET_DIR/release" work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
if [[ " $* " == *" smollm2 "* ]]; then
    tests/tools/model.sh > /dev/null
    BENCH_MODEL="$(find "$VICUNA_CACHE/smollm2-135m" -name '*.gguf' | head -1)"
else
    BENCH_MODEL="$work/model"
    "$binaries/vicuna-tiny-model" --out "$BENCH_MODEL" > /dev/null
fi
export BENCH_MODEL PYTHONPATH="$VICUNA_CACHE/transformers-5.24.0"
python3 tests/bench/recovery/bench.py "$binaries" "$work/run" "$@"
