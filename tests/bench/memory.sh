#!/usr/bin/env bash
# Peak memory of each rank beside its estimate: real ranks over loopback TCP, SmolLM2-135M, a few short steps. Prints a table
# of 1, 2 and 4 ranks, weights replicated and sharded, layers run again and kept, everything trained and adapters.
#
#   tests/bench/memory.sh [OPTIONS]    those of vicuna-memory-bench, such as --ranks 2 --bf16
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/tools/env.sh
tests/tools/model.sh > /dev/null
cargo build --release --locked --workspace --bins
exec "$CARGO_TARGET_DIR/release/vicuna-memory-bench" --model "$VICUNA_CACHE/smollm2-135m" --template chatml "$@"
