#!/usr/bin/env bash
# Open WebUI over the gateway, unchanged: it lists our models, and chats, streamed and not, with a worker that is replaced
# between two questions. Not part of `make test`: it installs 1.2 GB and takes about a minute.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/tools/env.sh
tests/tools/open_webui.sh
cargo build --release --locked --workspace --bins --example mock-trust --example mock-worker
PYTHONPATH="$VICUNA_CACHE/open-webui-$OPEN_WEBUI_VERSION" exec python3 tests/clients/open_webui.py "$CARGO_TARGET_DIR/release"
