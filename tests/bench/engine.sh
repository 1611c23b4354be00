#!/usr/bin/env bash
# The worker's engine on the CPU beside llama.cpp and transformers, in one run: SmolLM2-135M, its Q4_1 file for ours and
# llama.cpp, bf16 for transformers and ours. A prompt, one sequence, eight sequences; prints tokens/s and ratios.
#
#   tests/bench/engine.sh [THREADS [ROUNDS [STEPS]]]    2 threads, the best of 3 rounds, 64 tokens a sequence if not given
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/tools/env.sh
tests/tools/llama_cpp.sh
tests/tools/transformers.sh
cargo build --release --locked --workspace --bins
exec python3 tests/bench/engine.py "$CARGO_TARGET_DIR/release" "$VICUNA_CACHE" "${1:-2}" "${2:-3}" "${3:-64}"
