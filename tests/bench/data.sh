#!/usr/bin/env bash
# A gigabyte of conversations: seconds and peak memory of cleaning it, and of preparing it for a training.
#   tests/bench/data.sh [MEGABYTES]
set -euo pipefail
source "$(dirname "$0")/../tools/env.sh"
cd "$VICUNA_REPOSITORY"
tests/tools/llama_tokenizer.sh
cargo build --release --locked --workspace --bins
exec python3 tests/bench/data.py "$CARGO_TARGET_DIR/release/vicuna-data" "$VICUNA_CACHE/llama2-tokenizer/tokenizer.json" "${1:-1000}"
