#!/usr/bin/env bash
# Goodput while nodes come and go as on a public spot trace, scaled in time and number: ours beside torchrun's elastic DDP, real
# processes on this machine, without a cluster. (operator/examples/goodput.rs simulates whole traces with many nodes.)
#   tests/bench/goodput.sh [--trace FILE] [--minutes 120] [--speed 12] [--nodes 3] [--notice 5] [--model tiny|smollm2]
set -euo pipefail
cd "$(dirname "$0")/../.."
trace="${VICUNA_TEST_DATA:-$PWD/../shared/data}/spot/bamboo_p3-trace.csv"
if [[ "${1:-}" == --trace ]]; then trace="$(realpath "$2")"; shift 2; fi
[[ -f "$trace" ]] || { echo "no trace $trace: give one with --trace (lines MS,add|remove,NODE)" >&2; exit 2; }
source tests/bench/elastic/setup.sh "$@"
python3 tests/bench/elastic/goodput.py "$binaries" "$work/run" "$trace" "$@"
