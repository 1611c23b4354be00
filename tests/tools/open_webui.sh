#!/usr/bin/env bash
# Installs Open WebUI (about 1.2 GB) without what it computes models of its own with: torch and whatever only works with
# it, which would be several GB more. For tests/clients/open_webui.sh; no other test needs it.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

# Not needed to speak with a model that is served elsewhere.
left_out='^(torch|triton|nvidia-.*|cuda-.*|sentence-transformers|faster-whisper|ctranslate2|opencv-python-headless|accelerate|rapidocr|av|shapely|scikit-learn|scipy|pyarrow|sympy|mpmath|networkx|onnxruntime|sentencepiece|pypandoc)=='

pip_install() { python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore "$@"; }

build() {
    pip_install --dry-run --ignore-installed --report report.json "open-webui==$OPEN_WEBUI_VERSION"
    python3 -c '
import json
for found in json.load(open("report.json"))["install"]:
    print(found["metadata"]["name"].lower(), found["metadata"]["version"], sep="==")
' | grep -Ev "$left_out" > wanted
    pip_install --no-deps --target "$1" --requirement wanted
}

cached "open-webui-$OPEN_WEBUI_VERSION" build
