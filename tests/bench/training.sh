#!/usr/bin/env bash
# A step's gradients on the CPU beside transformers, eager and compiled, in one run: SmolLM2-135M's shape, random weights,
# one micro-batch of 4 x 256 tokens, every other 32 of which are learned as replies are; ours with the bits of its exact
# mode. Prints tokens/s and ratios.
#
#   tests/bench/training.sh [THREADS [ROUNDS]]    2 threads, the best of 3 rounds if not given
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/tools/env.sh
tests/tools/transformers.sh
cargo build --release --locked --workspace --bins
exec python3 tests/bench/training.py "$CARGO_TARGET_DIR/release" "$VICUNA_CACHE" "${1:-2}" "${2:-3}"
