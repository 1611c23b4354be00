#!/usr/bin/env bash
# From `kill -9` of one of two ranks to the next finished step: ours beside torchrun's elastic DDP, in the same run, with medians
# and their ratio. Real processes on this machine, without a cluster.
#   tests/bench/recovery.sh [--model tiny|smollm2] [--kills 5]
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/bench/elastic/setup.sh "$@"
python3 tests/bench/elastic/recovery.py "$binaries" "$work/run" "$@"
