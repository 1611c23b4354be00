#!/usr/bin/env bash
# What a gateway costs: ours, vllm-router and nginx in front of backends that answer at once, in one run; and
# 10,000 idle streams through ours. Prints tables with ratios, and leaves them in target/bench/gateway.json.
#
#   tests/bench/gateway.sh [SECONDS [PEER...]]    seconds of each measurement, 10 if not given; only these peers
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/tools/env.sh
tests/tools/gateways.sh
cargo build --release --locked --workspace --bins --examples
ulimit -n "$(ulimit -Hn)"
exec python3 tests/bench/gateway.py "$CARGO_TARGET_DIR/release" "$VICUNA_CACHE" "${1:-10}" "${@:2}"
